"""Files and folders that are either whole or not there: written beside their place and moved into it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, with the name of ``path``, whose place it takes at the end.

    Its content is on the disk before it is moved. On an exception it is removed and ``path`` stays as it was;
    a process that is killed leaves it: see :func:`remove_leftovers`. Folders are made as needed; access
    rights are those of any new file (the umask).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: libraries write files beside the one they are asked for, and may be killed too.
    private = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
    part = private / path.name
    try:
        part.touch()
        rights = part.stat().st_mode
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        part.chmod(rights)  # those of a file that a library has put in its place can be others
        os.replace(part, path)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    sync_folder(path.parent)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left of ``path`` and of files whose name goes on with a hyphen.

    Nobody may be writing them.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{path.stem}-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(
    path: str | os.PathLike[str], keep: Callable[[str], bool] | None = None
) -> Iterator[Path]:
    """Like :func:`replacing`, for a folder: a path to make one at.

    Where the system can exchange two names (Linux), ``path`` is the old folder or the new one always.
    Elsewhere a process that is killed between two renames leaves no ``path``, and :func:`recover_folder` puts
    it back. Only one process may write to ``path``.

    Args:
        keep: which of the old folder's files and folders, by name, the new one takes over where it has none
            of that name (as hard links, where the file system has them); None: none.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    fresh, old = _beside(path)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield fresh
        _sync_tree(fresh)
        for entry in sorted(path.iterdir()) if keep is not None and path.is_dir() else ():
            if keep is not None and keep(entry.name) and not (fresh / entry.name).exists():
                _take_over(entry, fresh / entry.name)
        exchanged = path.exists() and _exchange(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if not exchanged:
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    sync_folder(path.parent)
    for leftover in (fresh, old):  # either has the old folder
        shutil.rmtree(leftover, ignore_errors=True)


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Put ``path`` in place if a process was killed while :func:`replacing_folder` exchanged it."""
    path = Path(os.path.realpath(path))
    fresh, old = _beside(path)
    if not path.exists() and old.is_dir():
        # The old folder moves away only when the new one is whole.
        (fresh if fresh.is_dir() else old).rename(path)


def _exchange(one: Path, other: Path) -> bool:
    """Both names change places in one step; False where this system or file system cannot do that."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # glibc before 2.28, musl before 1.2.6
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    problem = "cannot be replaced in one step; write to a new folder, also inside it"  # a mount point's EBUSY
    raise OSError(number, f"{os.strerror(number)}: {problem}", str(other))


def _take_over(source: Path, target: Path) -> None:
    def link(a: str, b: str) -> None:
        try:
            os.link(a, b, follow_symlinks=False)
        except OSError:
            shutil.copy2(a, b, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(str(source), str(target))


def _sync_tree(folder: Path) -> None:
    """Have all that is in a folder written to the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            file = Path(parent, name)
            if file.is_symlink():
                continue
            with open(file, "r+b") as opened:
                os.fsync(opened.fileno())
        sync_folder(Path(parent))


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def sync_folder(folder: Path) -> None:
    """Have the names in a folder written to the disk, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 1) -> None:
    """JSON in UTF-8, whole or not at all. Raises ValueError for NaN and infinities, which JSON lacks."""
    with replacing(path) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=indent, ensure_ascii=False, allow_nan=False)
        file.write("\n")
