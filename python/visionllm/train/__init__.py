"""Training: ``visionllm train``, or ``torchrun -m visionllm.train`` for several machines."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``train`` command with these arguments (``sys.argv[1:]`` when None); returns the exit code."""
    from visionllm.train.command import main as run

    return run(argv)


__all__ = ["main"]
