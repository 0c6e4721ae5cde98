"""What a run writes down: a CSV with one row per interval, and the same numbers to TensorBoard."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path

from visionllm.atomic_file import remove_leftovers, replacing


class RunLog:
    """Appends rows of named numbers to ``<folder>/<name>.csv`` and to TensorBoard events beside them.

    The first column is ``step``. Rows beyond ``resume_step`` are dropped when the log is opened, so that a
    resumed run leaves no doubled rows. A name that is new widens the file. ``tensorboard``: "auto" uses it
    when it is installed, "on" raises ImportError saying what to install when it is not.
    """

    def __init__(self, folder: str | Path, resume_step: int = 0, tensorboard: str = "auto") -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._columns: dict[str, list[str]] = {}
        for name in ("train", "validation"):
            self._reopen(name, resume_step)
        self._events = None
        if tensorboard != "off":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                if tensorboard == "on":
                    raise ImportError(
                        "tensorboard=on needs the package tensorboard: pip install tensorboard, "
                        "or set tensorboard=off"
                    ) from error
            else:
                self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """One row of the log ``name`` ("train" or "validation")."""
        row = {"step": str(step), **{key: _text(value) for key, value in values.items()}}
        columns = self._columns[name]
        new = [key for key in row if key not in columns]
        if new:
            self._rewrite(name, self._rows(name), [*columns, *new])
            columns.extend(new)
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([row.get(column, "") for column in columns])
        _append(self._file(name), line.getvalue().encode())
        if self._events is not None:
            for key, value in values.items():
                if math.isfinite(value):
                    self._events.add_scalar(f"{name}/{key}", value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._events is not None:
            self._events.close()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.csv"

    def _rows(self, name: str) -> list[dict[str, str]]:
        if not self._file(name).exists():
            return []
        with open(self._file(name), newline="") as file:
            return list(csv.DictReader(file))

    def _reopen(self, name: str, resume_step: int) -> None:
        remove_leftovers(self._file(name))
        rows = self._rows(name)
        self._columns[name] = [key for key in rows[0] if key is not None] if rows else []
        # A row that a crash cut short has no number or no end; it belongs to a step that is done again.
        kept = [
            r
            for r in rows
            if r["step"].isdigit() and int(r["step"]) <= resume_step and None not in r.values()
        ]
        if len(kept) != len(rows):
            self._rewrite(name, kept, self._columns[name])

    def _rewrite(self, name: str, rows: list[dict[str, str]], columns: list[str]) -> None:
        with replacing(self._file(name)) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _append(file: Path, data: bytes) -> None:
    """All of the data, or on a full disk nothing: rows to come begin at the begin of a line."""
    with open(file, "ab", buffering=0) as opened:
        end = opened.seek(0, os.SEEK_END)
        written = opened.write(data)
        if written < len(data):
            opened.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"
