"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import visionllm.atomic_file
from visionllm.atomic_file import (
    recover_folder,
    remove_leftovers,
    replacing,
    replacing_folder,
    write_json,
)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_replaced_at_the_end(tmp_path):
    file = tmp_path / "deep" / "answer.txt"
    with replacing(file) as part:
        assert part.name == file.name and part.parent.parent == file.parent
        part.write_text("new")
        assert not file.exists()
    assert file.read_text() == "new" and names(file.parent) == ["answer.txt"]
    write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}


def test_an_exception_leaves_what_was_there(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"))
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_json(tmp_path / "a.json", 1)
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.skipif(os.name != "posix", reason="access rights of POSIX")
@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_respected(tmp_path, umask, rights):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", 1)
        with replacing(tmp_path / "b.safetensors") as part:
            save_file({"a": np.zeros(2)}, part)
    finally:
        os.umask(before)
    assert {file: (tmp_path / file).stat().st_mode & 0o777 for file in names(tmp_path)} == {
        "a.json": rights,
        "b.safetensors": rights,
    }


def test_what_a_writer_leaves_beside_goes_too(tmp_path):
    with pytest.raises(OSError), replacing(tmp_path / "a.bin") as part:
        (part.parent / ".tmp123").write_text("half")
        raise OSError("no space left on device")
    assert names(tmp_path) == []


def test_leftovers_of_one_name_are_removed(tmp_path):
    (tmp_path / ".train-12ab").mkdir()
    (tmp_path / ".train-12ab" / "train.csv").touch()
    for name in (".train-34cd", ".training", "train.csv", ".validation-12ab"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "train.csv")
    assert names(tmp_path) == [".training", ".validation-12ab", "train.csv"]


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


def model(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(text)


def test_a_folder_is_replaced_at_the_end(tmp_path):
    folder = tmp_path / "deep" / "model"
    for text in ("first", "second"):
        with replacing_folder(folder) as fresh:
            model(fresh, text)
            assert not folder.exists() or (folder / "weights").read_text() == "first"
        assert (folder / "weights").read_text() == text and names(folder.parent) == ["model"]
    with pytest.raises(OSError), replacing_folder(folder) as fresh:
        model(fresh, "third")
        raise OSError("no space left on device")
    assert (folder / "weights").read_text() == "second" and names(folder.parent) == ["model"]


@pytest.fixture(params=["exchanged", "renamed"])
def way(request, monkeypatch):
    """Folders change places in one step, where the system can do it, or in two."""
    if request.param == "renamed":
        monkeypatch.setattr("visionllm.atomic_file._exchange", lambda one, other: False)
    elif not sys.platform.startswith("linux"):
        pytest.skip("folders are exchanged on Linux only")
    return request.param


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_folder_is_there_again_after_a_kill(tmp_path, monkeypatch, way, after):
    """Killed before the first rename, between the two, and after the second."""
    folder = tmp_path / "model"
    model(folder, "old")
    path_class, done = type(folder), []
    rename, exchange = path_class.rename, visionllm.atomic_file._exchange
    rmtree = shutil.rmtree
    steps = {"exchanged": 1, "renamed": 2}[way]

    def counted(step):
        def run(*arguments):
            if len(done) == min(after, steps):
                raise Killed
            result = step(*arguments)
            done.extend([step] if result is not False else [])
            return result

        return run

    def removed(path, ignore_errors):
        if done:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(path_class, "rename", counted(rename))
        patch.setattr("visionllm.atomic_file._exchange", counted(exchange))
        patch.setattr("visionllm.atomic_file.shutil.rmtree", removed)
        with pytest.raises(Killed), replacing_folder(folder) as fresh:
            model(fresh, "new")
    assert shutil.rmtree is rmtree
    if way == "exchanged":
        assert folder.is_dir()
    recover_folder(folder)
    assert (folder / "weights").read_text() == ("old" if after == 0 else "new")
    with replacing_folder(folder) as fresh:
        model(fresh, "newer")
    assert (folder / "weights").read_text() == "newer" and names(tmp_path) == ["model"]


def test_what_is_to_be_kept_stays(tmp_path, way):
    folder = tmp_path / "model"
    model(folder, "old")
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "ab").write_text("object")
    (folder / "README.md").write_text("read me")
    (folder / "notes").symlink_to("README.md")
    with replacing_folder(folder, keep=lambda name: name != "old") as fresh:
        model(fresh, "new")
        (folder / "old").touch()
    assert names(folder) == [".git", "README.md", "notes", "weights"]
    assert (folder / "weights").read_text() == "new" and (folder / "notes").read_text() == "read me"
    assert (folder / "notes").is_symlink() and (folder / ".git" / "objects" / "ab").read_text() == "object"


def test_a_link_to_a_folder_stays_one(tmp_path, way):
    model(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    with replacing_folder(tmp_path / "link") as fresh:
        model(fresh, "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "weights").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


READER = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
print("ready", flush=True)
while not (folder.parent / "end").exists():
    assert (folder / "weights").read_text(), "never absent, never empty"
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders are exchanged on Linux only")
def test_a_reader_always_finds_a_folder(tmp_path):
    model(tmp_path / "model", "0")
    command = [sys.executable, "-c", READER, str(tmp_path / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "ready\n"
        for number in range(200):
            with replacing_folder(tmp_path / "model") as fresh:
                model(fresh, str(number))
        (tmp_path / "end").touch()
        errors = reader.communicate(timeout=60)[1]
    assert reader.returncode == 0, errors


def test_a_folder_that_cannot_be_exchanged_stays(tmp_path, monkeypatch):
    """As a mount point."""
    model(tmp_path / "model", "old")

    def busy(one, other):
        raise OSError(errno.EBUSY, "cannot be replaced")

    monkeypatch.setattr("visionllm.atomic_file._exchange", busy)
    with pytest.raises(OSError, match="cannot be replaced"), replacing_folder(tmp_path / "model") as fresh:
        model(fresh, "new")
    assert (tmp_path / "model" / "weights").read_text() == "old" and names(tmp_path) == ["model"]
