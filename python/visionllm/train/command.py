"""``visionllm train``: arguments, training processes, resuming."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from visionllm.train.config import (
    STAGES,
    ConfigError,
    TrainConfig,
    load_config,
    preset_names,
    read_config,
    write_config,
)
from visionllm.train.launch import INTERRUPTED, launch, launched

if TYPE_CHECKING:
    from visionllm.train.distributed import Processes

logger = logging.getLogger("visionllm.train")

TRACEBACK_VARIABLE = "VISIONLLM_TRACEBACK"
T = TypeVar("T")


class StartError(RuntimeError):
    """A file or value that a run cannot start with."""


def parser() -> argparse.ArgumentParser:
    """The arguments of ``visionllm train``."""
    arguments = argparse.ArgumentParser(
        prog="visionllm train",
        description="Train a model. Writes checkpoints, train.csv, validation.csv, TensorBoard events and "
        "model/ (the averaged weights as a pretrained folder) to the output folder.",
        epilog="Example: visionllm train --preset tiny --processes 2 scenes.glyphs=glyphs max_minutes=100",
    )
    arguments.add_argument("--preset", choices=preset_names(), default="tiny", help="what to start from")
    arguments.add_argument(
        "--stage",
        type=int,
        choices=STAGES,
        help="1: detection alone; 2: all tasks, the backbone frozen, from the weights in init=DIR",
    )
    arguments.add_argument("--config", metavar="FILE", help="YAML file with changes to the preset")
    arguments.add_argument(
        "--resume",
        metavar="DIR",
        help="continue the run in this output folder with its own configuration (overrides still apply); "
        "'auto': continue in the configured output folder if it has a checkpoint, else start. With steps=N "
        "the result is that of a run without a break, bit for bit; with max_minutes=N the learning rate "
        "follows the clock",
    )
    arguments.add_argument("--processes", type=int, metavar="N", help="training processes on this machine")
    arguments.add_argument(
        "--export",
        metavar="DIR",
        help="with --resume: only write the last checkpoint's averaged weights there as a pretrained folder",
    )
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="changes to single keys")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``visionllm train``; 0: finished, 1: failed, 2: unusable arguments, 130: interrupted and saved.

    Errors of files and values are one line on stderr; VISIONLLM_TRACEBACK=1 shows where they arose.
    """
    from visionllm.train.inputs import check_inputs

    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_intermixed_args(argv)
    try:
        config, checkpoint = settle(arguments)
        check_inputs(config, checkpoint is not None)
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of torchrun's processes one a machine says so
            print(f"visionllm train: {error}", file=sys.stderr)
        return 2
    if config.processes > 0 and not launched() and arguments.export is None:
        return launch(config.processes, [sys.executable, "-m", "visionllm.train", *argv])
    from visionllm.train.build import network_and_data

    return train(config, checkpoint, network_and_data, arguments.export)


def settle(arguments: argparse.Namespace) -> tuple[TrainConfig, Path | None]:
    """The configuration and the checkpoint to continue from. Raises ConfigError."""
    overrides = list(arguments.overrides)
    if arguments.processes is not None:
        overrides.append(f"processes={arguments.processes}")
    if arguments.resume not in (None, "auto"):
        folder = Path(arguments.resume)
        for name in ("config", "stage"):
            if getattr(arguments, name) is not None:
                raise ConfigError(
                    f"--resume DIR brings its own configuration: use key=value instead of --{name}"
                )
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"--resume {folder}: no config.yaml there, so no run to continue")
        # The folder may have been moved since.
        config = read_config(folder / "config.yaml", [*overrides, f"output={folder}"])
        return config, _latest(folder, needed=True)
    if arguments.export is not None:
        raise ConfigError("--export needs --resume DIR")
    config = load_config(arguments.preset, arguments.config, overrides, arguments.stage)
    checkpoint = _latest(Path(config.output), needed=False)
    if checkpoint is not None and arguments.resume is None and not launched():
        raise ConfigError(
            f"{config.output} has checkpoints of an earlier run: continue it with --resume {config.output}, "
            "or choose another folder with output=..."
        )
    return config, checkpoint if arguments.resume is not None else None


def train(
    config: TrainConfig,
    checkpoint: Path | None,
    build: Callable[[TrainConfig, Any, bool], tuple[Any, Any, Any]],
    export: str | None = None,
) -> int:
    """Train in this process; ``build(config, processes, resuming)`` makes network, batches and validation."""
    import torch

    from visionllm.train.checkpoint import CheckpointError
    from visionllm.train.distributed import join
    from visionllm.train.loop import NonFiniteError, TrainingRun

    processes = join(config.device, group=config.parallel != "flat")
    logging.basicConfig(
        level=logging.INFO if processes.first else logging.WARNING,
        format=f"%(asctime)s [{processes.rank}] %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        network, batches, validate = on_every_process(
            processes, lambda: build(config, processes, checkpoint is not None)
        )
        run = TrainingRun(network, batches, config, processes, validate)
        if checkpoint is not None:
            on_every_process(processes, lambda: run.load(checkpoint))
            logger.info("continuing from %s", checkpoint)
        if export is not None:
            run.export(export)
            return 0
        if processes.first:
            run.output.mkdir(parents=True, exist_ok=True)
            write_config(config, run.output / "config.yaml")
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        logger.info(
            "training %.2f M of %.2f M parameters in %d process(es), %s, bfloat16 autocast %s",
            trained / 1e6,
            sum(p.numel() for p in network.parameters()) / 1e6,
            processes.size,
            processes.device,
            "on" if run.autocast else "off",
        )
        return 0 if run.run() else INTERRUPTED
    except (StartError, NonFiniteError) as error:  # raised by all processes alike
        if processes.first:
            print(f"visionllm train: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ValueError, OSError) as error:  # this process's own
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"visionllm train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"visionllm train: stopped without saving; checkpoints are in {config.output}", file=sys.stderr)
        return INTERRUPTED
    finally:
        processes.leave()


def on_every_process(processes: Processes, action: Callable[[], T]) -> T:
    """What this process's ``action()`` returns. Where one's fails, all processes raise its error.

    Raises:
        StartError: with the message of the first error of a file or value, the same on all processes.
    """
    from visionllm.train.checkpoint import CheckpointError

    result: list[T] = []
    problem = None
    try:
        result.append(action())
    except (CheckpointError, ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        problem = str(error)
    for found in processes.gather(problem):
        if found is not None:
            raise StartError(found)
    return result[0]


def _latest(folder: Path, needed: bool) -> Path | None:
    files = sorted((folder / "checkpoints").glob("checkpoint-*.safetensors"))
    files += [file.parent for file in (folder / "checkpoints").glob("checkpoint-*/state.json")]
    files.sort(key=lambda file: file.name[len("checkpoint-") :][:8])  # by step
    if not files and needed:
        raise ConfigError(f"{folder / 'checkpoints'} has no checkpoint to continue from")
    return files[-1] if files else None
