"""The training loop: batches in, updated weights, logs and checkpoints out.

One step is a pure function of (weights, optimiser state, seed, step, rank): the batch is ``batches[step]``
and every random generator is seeded anew from (seed, step, rank). So a run continued from a checkpoint equals
an uninterrupted one bit for bit, except when the schedule follows the clock (``max_minutes``).
"""

from __future__ import annotations

import logging
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from visionllm.atomic_file import recover_folder, replacing_folder
from visionllm.train.average import WeightAverage
from visionllm.train.checkpoint import (
    CheckpointError,
    load_optimizer_tensors,
    load_tensors,
    network_tensors,
    optimizer_tensors,
    read_checkpoint,
    write_checkpoint,
)
from visionllm.train.config import TrainConfig, config_to_dict
from visionllm.train.distributed import Processes, SharedGradients
from visionllm.train.launch import launcher_lost
from visionllm.train.precision import use_autocast
from visionllm.train.run_log import RunLog
from visionllm.train.schedule import ActiveClock, learning_rate_factor

logger = logging.getLogger("visionllm.train")

LAPS = ("step", "validation", "checkpoint")  # what the clock of a time-limited run counts


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Batches(Protocol):
    """Training batches by step; the same index always gives the same batch."""

    def __getitem__(self, step: int) -> Any: ...


Validate = Callable[[nn.Module], dict[str, float]]


class TrainingRun:
    """A network in training.

    Args:
        network: has ``loss(batch) -> dict`` whose "total" is minimised, ``parameter_groups(lr, backbone_lr,
            weight_decay)`` and ``save_pretrained(folder)``. Already on ``processes.device``.
        batches: ``batches[step]`` is this process's batch of that step.
        config: lengths, rates, intervals.
        processes: this process among its peers.
        validate: called on every process at the same steps, with the averaged weights in the network;
            returns the numbers to log.

    Files under ``config.output``: ``checkpoints/``, ``train.csv``, ``validation.csv``, ``tensorboard/`` and
    ``model/``, the averaged weights as a pretrained folder, renewed at every validation.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Batches,
        config: TrainConfig,
        processes: Processes,
        validate: Validate | None = None,
    ) -> None:
        self.network: Any = network
        self.batches = batches
        self.config = config
        self.processes = processes
        self.validate = validate
        self.output = Path(config.output)
        self.step = 0  # steps done
        self.bad_steps = 0  # non-finite ones in a row
        self.clock = ActiveClock()
        processes.broadcast(list(network_tensors(network).values()))
        self.average = WeightAverage(network, config.ema_decay) if config.ema_decay > 0 else None
        # Agreed on at every step: bad loss, stop, checkpoint due, and the seconds of LAPS.
        self.gradients = SharedGradients(network, processes, numbers=3 + len(LAPS))
        groups = cast(Any, network).parameter_groups(config.lr, config.backbone_lr, config.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True
        )
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.autocast = use_autocast(config.autocast, processes.device)
        self._stop = False
        self._seconds = dict.fromkeys(LAPS, 0.0)

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0..1: of the steps or, in a time-limited run, of the active time."""
        if self.config.max_minutes > 0:
            return min(1.0, self.clock.seconds / (60.0 * self.config.max_minutes))
        return min(1.0, self.step / self.config.steps)

    def save(self) -> Path | None:
        """Write a checkpoint (the first process does; the others return None)."""
        if not self.processes.first:
            return None
        tensors = {f"model.{name}": value for name, value in network_tensors(self.network).items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.averages.items()}
        optimizer = optimizer_tensors(self.optimizer, self.network)
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        state = {
            "step": self.step,
            "bad_steps": self.bad_steps,
            "average_updates": self.average.updates if self.average is not None else 0,
            "clock": self.clock.state(),
            "processes": self.processes.size,
            "config": config_to_dict(self.config),
        }
        return write_checkpoint(
            self.output / "checkpoints", self.step, tensors, state, self.config.checkpoint.keep
        )

    def load(self, file: str | Path) -> None:
        """Continue from a checkpoint file, which every process reads."""
        tensors, state = read_checkpoint(file)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        load_tensors(network_tensors(self.network), parts["model"], "network")
        if self.average is not None:
            if not parts["average"]:
                raise CheckpointError(f"{file} has no averaged weights; resume with ema_decay=0")
            load_tensors(self.average.averages, parts["average"], "weight average")
            self.average.updates = int(state["average_updates"])
        load_optimizer_tensors(self.optimizer, self.network, parts["optimizer"])
        self.step, self.bad_steps = int(state["step"]), int(state["bad_steps"])
        self.clock.load(state["clock"])
        self.gradients.settle(good=True)
        for key in ("seed", "batch_size", "image_size"):
            before, now = state["config"].get(key), getattr(self.config, key)
            if before != now:
                logger.warning("%s was %s before, is %s now: the data differ from here on", key, before, now)
        if state["processes"] != self.processes.size:
            logger.warning(
                "the run had %d processes before, has %d now: the data differ from here on",
                state["processes"],
                self.processes.size,
            )

    def export(self, folder: str | Path) -> None:
        """Write the averaged weights (without averaging: the plain ones) as a pretrained folder."""
        if not self.processes.first:
            return
        with replacing_folder(folder) as fresh, self._averaged():
            self.network.save_pretrained(fresh)

    def run(self) -> bool:
        """Train to the end, or until SIGINT or SIGTERM; True when the end was reached.

        Either way a checkpoint is written. Raises NonFiniteError after ``config.bad_steps`` bad steps in a
        row, without writing one.
        """
        first = self.processes.first
        if first:
            recover_folder(self.output / "model")
        log = RunLog(self.output, self.step, self.config.tensorboard) if first else None
        bar = tqdm(
            total=self.config.steps or None,
            initial=self.step,
            unit="step",
            disable=not (first and sys.stderr.isatty()),
        )
        try:
            with self._signals():
                finished = self._steps(log, bar)
            if finished:
                if self._validated != self.step:
                    self._validation(log)
                self.save()
            else:
                file = self.save()
                if file is not None:
                    logger.info(
                        "interrupted at step %d, saved %s\nresume with: visionllm train --resume %s",
                        self.step,
                        file,
                        self.output,
                    )
            return finished
        finally:
            bar.close()
            if log is not None:
                log.close()

    def _steps(self, log: RunLog | None, bar: Any) -> bool:
        config, interval = self.config, _Interval()
        last_checkpoint = time.monotonic()
        self._validated = -1
        self.network.train()
        stream = batch_stream(self.batches, self.step, config.workers)
        while self.progress < 1.0:
            started = time.perf_counter()
            due = 0 < 60.0 * config.checkpoint.minutes <= time.monotonic() - last_checkpoint
            stop, due = self._one_step(stream, interval, due)
            seconds = time.perf_counter() - started
            self._seconds["step"] = seconds
            interval.finish(seconds)
            bar.update()

            if self.step % config.log_every == 0:
                self._log(log, bar, interval)
                interval = _Interval()
            if stop:
                return False
            if config.validation.every > 0 and self.step % config.validation.every == 0:
                started = time.perf_counter()
                self._validation(log)
                self._seconds["validation"] = time.perf_counter() - started
            if due or (config.checkpoint.steps > 0 and self.step % config.checkpoint.steps == 0):
                started = time.perf_counter()
                self.save()
                self._seconds["checkpoint"] = time.perf_counter() - started
                last_checkpoint = time.monotonic()
        return True

    def _one_step(
        self, stream: Iterator[Any], interval: _Interval, checkpoint_due: bool
    ) -> tuple[bool, bool]:
        """One step; whether to stop and whether to write a checkpoint after it, as all processes agreed."""
        config = self.config
        seed_generators(config.seed, self.step, self.processes.rank)
        with interval.part("data"):
            batch = next(stream)
        self.gradients.zero()
        with interval.part("forward"):
            device = self.processes.device.type
            with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
                losses = self.network.loss(batch)
            values = torch.stack([value.detach().float().reshape(()) for value in losses.values()])
            numbers = dict(zip(losses, values.tolist(), strict=True))
            good = bool(np.isfinite(numbers["total"]))
        with interval.part("backward"):
            if good:
                losses["total"].backward()
            del losses
        with interval.part("exchange"):
            stop = self._stop or launcher_lost()
            bad, stop_share, due_share, *laps = self.gradients.reduce(
                [not good, stop, checkpoint_due, *self._seconds.values()]
            )
            for kind, seconds in zip(LAPS, laps, strict=True):
                if seconds > 0:
                    self.clock.add(kind, seconds)
            self._seconds = dict.fromkeys(LAPS, 0.0)
        with interval.part("optimizer"):
            norm = self.gradients.clip(config.clip_norm)
            good_everywhere = bad == 0 and bool(np.isfinite(norm))
            self.gradients.settle(good_everywhere)
            factor = learning_rate_factor(self.step, self.progress, config.warmup, config.lr_floor)
            if good_everywhere:
                for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                    group["lr"] = rate * factor
                self.optimizer.step()
                if self.average is not None:
                    self.average.update()
        self.step += 1
        if good_everywhere:
            self.bad_steps = 0
            interval.losses(numbers, getattr(batch, "task", "detection"), norm, factor)
        else:
            self.bad_steps += 1
            terms = {name: value for name, value in numbers.items() if not np.isfinite(value)}
            logger.warning(
                "step %d skipped (%d in a row): gradient norm %s, terms that are not finite here: %s",
                self.step,
                self.bad_steps,
                norm,
                terms or "none",
            )
            if self.bad_steps >= config.bad_steps:
                raise NonFiniteError(
                    f"{self.bad_steps} steps in a row had a loss or gradient that is not finite, up to "
                    f"step {self.step}; the last checkpoint in {self.output / 'checkpoints'} is older"
                )
        return stop_share > 0, due_share > 0

    def _log(self, log: RunLog | None, bar: Any, interval: _Interval) -> None:
        rows = self.processes.gather(interval.means())
        if log is None:
            return
        rows = [row for row in rows if row]
        row = {key: float(np.mean([r[key] for r in rows if key in r])) for key in rows[0]}
        row["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        row["samples_per_s"] = self.config.batch_size * self.processes.size / row["seconds_step"]
        row["active_minutes"] = self.clock.seconds / 60.0
        # ru_maxrss: kilobytes on Linux, bytes on macOS.
        row["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1e9 if sys.platform == "darwin" else 1e6
        )
        log.write("train", self.step, {"progress": self.progress, **row})
        bar.set_postfix_str(f"{100 * self.progress:.1f}% loss {row.get('total', float('nan')):.3f}")
        if bar.disable:
            logger.info(
                "step %d  %.1f %%  loss %.4f  lr %.2e  %.1f pictures/s",
                self.step,
                100 * self.progress,
                row.get("total", float("nan")),
                row["lr"],
                row["samples_per_s"],
            )

    def _validation(self, log: RunLog | None) -> None:
        self._validated = self.step
        if self.validate is not None:
            started = time.perf_counter()
            self.network.eval()
            try:
                with self._averaged(), torch.no_grad():
                    metrics = self.validate(self.network)
            finally:
                self.network.train()
            metrics = {**metrics, "seconds": time.perf_counter() - started}
            if log is not None:
                log.write("validation", self.step, {"active_minutes": self.clock.seconds / 60.0, **metrics})
                numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                logger.info("validation at step %d: %s", self.step, numbers)
        self.export(self.output / "model")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with self.average.applied() if self.average is not None else nullcontext():
            yield

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step at hand; a second SIGINT ends it at once, unsaved."""

        def request(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self._interrupts:
                raise KeyboardInterrupt
            self._interrupts += number == signal.SIGINT
            self._stop = True

        self._stop, self._interrupts = False, 0
        try:
            previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the caller's signals stay as they are
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Interval:
    """Sums over the steps since the last row of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def _add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._add(f"seconds_{name}", time.perf_counter() - started)

    def losses(self, numbers: dict[str, float], task: str, norm: float, factor: float) -> None:
        """Of a step: each term by its name, those of a task beside detection as ``task/name``."""
        if task != "detection":
            numbers = {name if name == "total" else f"{task}/{name}": x for name, x in numbers.items()} | {
                f"{task}/total": numbers["total"]
            }
        for name, value in {**numbers, "gradient_norm": norm, "lr_factor": factor}.items():
            self._add(name, value)

    def finish(self, seconds: float) -> None:
        self._add("seconds_step", seconds)

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class _Steps(torch.utils.data.Sampler[int]):
    """The step numbers from ``start`` on, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


def batch_stream(batches: Batches, start: int, workers: int) -> Iterator[Any]:
    """``batches[start]``, ``batches[start + 1]``, ... made in this process or ahead in ``workers`` others."""
    steps = _Steps(start)
    if workers == 0:
        return (batches[step] for step in steps)
    loader: Any = torch.utils.data.DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_unchanged,
    )
    return iter(loader)


def _unchanged(batch: Any) -> Any:
    return batch


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed torch's, NumPy's and Python's global generators from (seed, step, rank)."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(4)  # uint32
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2])
    random.seed(int(words[3]))
