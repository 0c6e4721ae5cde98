"""The training loop: batches in, updated weights, logs and checkpoints out.

One step is a pure function of (weights, optimiser state, seed, step): it has ``processes * accumulate``
micro-batches, and every random generator is seeded anew for each, from (seed, step, its number). So a run
continued from a checkpoint equals an uninterrupted one bit for bit, except when the schedule follows the
clock (``max_minutes``); and up to the order of sums on another number of processes with as many of them.
"""

from __future__ import annotations

import itertools
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
from visionllm.ops.precision import use_autocast
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
from visionllm.train.config import TrainConfig, accumulation, config_to_dict
from visionllm.train.distributed import Processes
from visionllm.train.launch import launcher_lost
from visionllm.train.parallel import checkpoint_blocks, parallel, share, with_state
from visionllm.train.run_log import RunLog
from visionllm.train.schedule import ActiveClock, learning_rate_factor
from visionllm.train.sharded_checkpoint import read_shards, read_state, stored_shapes, write_shards

logger = logging.getLogger("visionllm.train")

NO_AVERAGE = "{} has no averaged weights; resume with ema_decay=0"
LAPS = ("step", "validation", "checkpoint")  # what the clock of a time-limited run counts


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Batches(Protocol):
    """This process's micro-batches in order, ``accumulate`` a step; an index always gives the same one."""

    def __getitem__(self, index: int) -> Any: ...


Validate = Callable[[nn.Module], dict[str, float]]


class TrainingRun:
    """A network in training.

    Args:
        network: has ``loss(batch) -> dict`` whose "total" is minimised, ``parameter_groups(lr, backbone_lr,
            weight_decay)`` and ``save_pretrained(folder)``. Already on ``processes.device``.
        batches: ``batches[step * accumulate + k]`` is this process's micro-batch k of that step.
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
        self.accumulate = accumulation(config, processes.size)
        processes.broadcast(list(network_tensors(network).values()))
        if config.checkpointing:
            checkpoint_blocks(network)
        # Agreed on at every step: bad loss, stop, checkpoint due, and the seconds of LAPS.
        self.gradients = parallel(config.parallel, network, processes, numbers=3 + len(LAPS))
        self.average = WeightAverage(network, config.ema_decay) if config.ema_decay > 0 else None
        groups = cast(Any, network).parameter_groups(config.lr, config.backbone_lr, config.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True
        )
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.autocast = use_autocast(config.autocast, processes.device)
        self._stop = False
        self._seconds = dict.fromkeys(LAPS, 0.0)
        self._unwritten: dict[str, OSError] = {}  # what the last attempt to write failed at, and why

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0..1: of the steps or, in a time-limited run, of the active time."""
        if self.config.max_minutes > 0:
            return min(1.0, self.clock.seconds / (60.0 * self.config.max_minutes))
        return min(1.0, self.step / self.config.steps)

    @property
    def _pictures(self) -> int:
        """Of a step, over all processes."""
        return self.config.batch_size * self.processes.size * self.accumulate

    def save(self) -> Path | None:
        """Write a checkpoint: the first process does (the others return None), or all that hold shares."""
        sharded = self.config.parallel == "fsdp"
        if not (self.processes.first or sharded):
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
            "accumulate": self.accumulate,
            "config": config_to_dict(self.config),
        }
        folder, keep = self.output / "checkpoints", self.config.checkpoint.keep
        if sharded:
            file = write_shards(folder, self.step, tensors, state, keep, self.processes)
            return file if self.processes.first else None
        return write_checkpoint(folder, self.step, tensors, state, keep)

    def load(self, file: str | Path) -> None:
        """Continue from a checkpoint, a file or a folder of shares, which every process reads."""
        own = {"model": network_tensors(self.network)}
        if self.average is not None:
            own["average"] = self.average.averages
        if Path(file).is_dir():
            optimizer, state = self._load_shards(Path(file), own)
        else:
            optimizer, state = self._load_file(file, own)
        if self.average is not None:
            self.average.updates = int(state["average_updates"])
        load_optimizer_tensors(self.optimizer, self.network, optimizer)
        self.step, self.bad_steps = int(state["step"]), int(state["bad_steps"])
        self.clock.load(state["clock"])
        self.gradients.settle(good=True)
        for key in ("seed", "batch_size", "image_size"):
            before, now = state["config"].get(key), getattr(self.config, key)
            if before != now:
                logger.warning("%s was %s before, is %s now: the data differ from here on", key, before, now)
        before, now = (
            size * accumulate
            for size, accumulate in (
                (state["processes"], state.get("accumulate", 1)),
                (self.processes.size, self.accumulate),
            )
        )
        if before != now:
            logger.warning(
                "a step had %d micro-batches (processes * accumulate) before, has %d now: the data differ "
                "from here on",
                before,
                now,
            )

    def _load_file(
        self, file: str | Path, own: dict[str, dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Fill the run's own tensors by part and name; the optimiser's tensors, and the rest of the state."""
        tensors, state = read_checkpoint(file)
        like = dict(self.network.named_parameters())
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            owner = name.partition(".")[2] if part == "optimizer" else name
            parts[part][name] = share(value, like.get(owner))
        if "average" in own and not parts["average"]:
            raise CheckpointError(NO_AVERAGE.format(file))
        for part, what in (("model", "network"), ("average", "weight average")):
            if part in own:
                load_tensors(own[part], parts[part], what)
        return parts["optimizer"], state

    def _load_shards(
        self, folder: Path, own: dict[str, dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The same from a folder of shares."""
        state = read_state(folder, self.processes)
        stored = stored_shapes(folder)
        like = dict(self.network.named_parameters())
        into = {f"{part}.{name}": value for part, values in own.items() for name, value in values.items()}
        optimizer: dict[str, Tensor] = {}
        for key, (shape, dtype) in stored.items():
            part, _, name = key.partition(".")
            if part == "optimizer":
                parameter = like.get(name.partition(".")[2])
                value = torch.zeros(shape, dtype=dtype)
                if parameter is not None and parameter.shape == shape and len(shape) > 0:
                    # Shared among the processes as the parameter is.
                    value = torch.zeros_like(parameter, dtype=dtype).detach()
                into[key] = optimizer[name] = value
            elif part == "model" and key not in into:
                raise CheckpointError(f"{folder} does not fit: unexpected {key}")
        if "average" in own and not any(key.startswith("average.") for key in stored):
            raise CheckpointError(NO_AVERAGE.format(folder))
        read_shards(folder, into)
        return optimizer, state

    def export(self, folder: str | Path) -> None:
        """Write the averaged weights (without averaging: the plain ones) as a pretrained folder."""
        with self._averaged():
            state = self.gradients.state_dict()
            if self.processes.first:
                with with_state(self.network, state), replacing_folder(folder) as fresh:
                    self.network.save_pretrained(fresh)

    def run(self) -> bool:
        """Train to the end, or until SIGINT or SIGTERM; True when the end was reached.

        Either way a checkpoint is written. Raises NonFiniteError after ``config.bad_steps`` bad steps in a
        row, without writing one. A full disk is reported and the run goes on: older checkpoints and the older
        ``model/`` stay usable. Raises OSError for what still cannot be written at the end.
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
                if "model" in self._unwritten:
                    model = self.output / "model"
                    raise OSError(
                        f"{model} is that of an earlier step: {self._unwritten['model']}\n"
                        f"make room, then: visionllm train --resume {self.output} --export {model}"
                    )
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
                with self._going_on("tensorboard"):
                    log.close()

    def _steps(self, log: RunLog | None, bar: Any) -> bool:
        config, interval = self.config, _Interval()
        last_checkpoint = time.monotonic()
        self._validated = -1
        self.network.train()
        stream = batch_stream(self.batches, self.step * self.accumulate, config.workers)
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
                with self._going_on("checkpoint"):
                    self.save()
                self._seconds["checkpoint"] = time.perf_counter() - started
                last_checkpoint = time.monotonic()
        return True

    def _one_step(
        self, stream: Iterator[Any], interval: _Interval, checkpoint_due: bool
    ) -> tuple[bool, bool]:
        """One step; whether to stop and whether to write a checkpoint after it, as all processes agreed."""
        config = self.config
        parts: list[tuple[str, dict[str, float]]] = []  # of the micro-batches: the task and the losses
        self.gradients.zero()
        for part in range(self.accumulate):
            seed_generators(config.seed, self.step, part * self.processes.size + self.processes.rank)
            with interval.part("data"):
                batch = next(stream)
            with interval.part("forward"):
                device = self.processes.device.type
                with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
                    losses = self.gradients.loss(batch, last=part == self.accumulate - 1)
                values = torch.stack([value.detach().float().reshape(()) for value in losses.values()])
                numbers = dict(zip(losses, values.tolist(), strict=True))
                parts.append((getattr(batch, "task", "detection"), numbers))
            with interval.part("backward"):
                total = losses["total"] if self.accumulate == 1 else losses["total"] / self.accumulate
                self.gradients.backward(total, bool(np.isfinite(numbers["total"])))
                del losses, total
        good = all(np.isfinite(numbers["total"]) for _, numbers in parts)
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
                # Fused steps do not count as changes; what prediction keeps of the weights goes by the count.
                for parameter in self.network.parameters():
                    if parameter.requires_grad:
                        torch.autograd.graph.increment_version(parameter)
                if self.average is not None:
                    self.average.update()
        self.step += 1
        if good_everywhere:
            self.bad_steps = 0
            for task, numbers in parts:
                interval.losses(numbers, task, norm, factor)
        else:
            self.bad_steps += 1
            terms = {name: x for _, numbers in parts for name, x in numbers.items() if not np.isfinite(x)}
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
        row["samples_per_s"] = self._pictures / row["seconds_step"]
        row["active_minutes"] = self.clock.seconds / 60.0
        # ru_maxrss: kilobytes on Linux, bytes on macOS.
        row["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1e9 if sys.platform == "darwin" else 1e6
        )
        with self._going_on("train.csv"):
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
                with self._averaged(), self.gradients.whole(), torch.no_grad():
                    metrics = self.validate(self.network)
            finally:
                self.network.train()
            metrics = {**metrics, "seconds": time.perf_counter() - started}
            if log is not None:
                with self._going_on("validation.csv"):
                    minutes = {"active_minutes": self.clock.seconds / 60.0}
                    log.write("validation", self.step, {**minutes, **metrics})
                numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                logger.info("validation at step %d: %s", self.step, numbers)
        with self._going_on("model"):
            self.export(self.output / "model")

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """A full disk ends no run: what could not be written is logged, and stays as it was before."""
        try:
            yield
        except OSError as error:
            self._unwritten[what] = error
            logger.warning("step %d: %s not written, the older one stays: %s", self.step, what, error)
        else:
            self._unwritten.pop(what, None)

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

    def _add(self, name: str, value: float, count: int = 1) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._add(f"seconds_{name}", time.perf_counter() - started, count=0)

    def losses(self, numbers: dict[str, float], task: str, norm: float, factor: float) -> None:
        """Of a step: each term by its name, those of a task beside detection as ``task/name``."""
        if task != "detection":
            numbers = {name if name == "total" else f"{task}/{name}": x for name, x in numbers.items()} | {
                f"{task}/total": numbers["total"]
            }
        for name, value in {**numbers, "gradient_norm": norm, "lr_factor": factor}.items():
            self._add(name, value)

    def finish(self, seconds: float) -> None:
        self._add("seconds_step", seconds, count=0)
        for name in self.sums:
            if name.startswith("seconds_"):  # a part may come several times in a step
                self.counts[name] += 1

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class _Indices(torch.utils.data.Sampler[int]):
    """The numbers from ``start`` on, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def batch_stream(batches: Batches, start: int, workers: int) -> Iterator[Any]:
    """``batches[start]``, ``batches[start + 1]``, ... made in this process or ahead in ``workers`` others."""
    indices = _Indices(start)
    if workers == 0:
        return (batches[index] for index in indices)
    loader: Any = torch.utils.data.DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        collate_fn=_unchanged,
    )
    return iter(loader)


def _unchanged(batch: Any) -> Any:
    return batch


def seed_generators(seed: int, step: int, number: int) -> None:
    """Seed torch's, NumPy's and Python's global generators from (seed, step, number of the micro-batch)."""
    words = np.random.SeedSequence((seed, step, number)).generate_state(4)  # uint32
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2])
    random.seed(int(words[3]))
