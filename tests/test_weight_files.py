"""A model's folder on the disk: whole, in shards or not, and nothing but what was written comes back."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from visionllm.model.weight_files import INDEX, WEIGHTS, WeightsReader, WeightsWriter, rewrite

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.float64)
TENSORS = {
    **{f"of.{str(dtype)[6:]}": torch.arange(-3, 4).to(dtype) for dtype in DTYPES},
    "transposed": torch.randn(5, 3).t(),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "large": torch.randn(700, 1000),  # larger than what is read at a time
}
FILES = {"config.json": b'{"a": 1}', "tokenizer.model": b"pieces"}


def write(folder: Path, tensors=TENSORS, files=FILES, **options) -> Path:
    with WeightsWriter(folder, **options) as writer:
        for name, data in files.items():
            writer.add_file(name, data)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    with WeightsReader(folder) as reader:
        tensors = {name: reader.read(name) for name in reader.shapes}
        return tensors, {name: reader.file(name) for name in reader.files}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=["one file", "shards"])
def folder(request, tmp_path) -> Path:
    return write(tmp_path / "model", **({} if request.param == "one file" else {"shard_bytes": 100}))


def test_what_is_written_comes_back(folder):
    tensors, files = read(folder)
    assert files == FILES and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    with WeightsReader(folder) as reader:
        assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
        assert reader.dtypes == {name: tensor.dtype for name, tensor in TENSORS.items()}


def test_other_programs_read_it(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"].keys() == TENSORS.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())


def test_the_same_tensors_give_the_same_bytes(folder, tmp_path):
    options = {"shard_bytes": 100} if (folder / INDEX).exists() else {}
    again = write(tmp_path / "again", **options)
    assert names(again) == names(folder)
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in names(folder))


def test_reading_into_a_place_converts(folder):
    with WeightsReader(folder) as reader:
        for name, tensor in TENSORS.items():
            for into in (
                torch.empty(tensor.shape, dtype=torch.float64),
                torch.empty(tensor.shape, dtype=tensor.dtype),
                torch.empty(tensor.shape[::-1], dtype=torch.float64).permute(tuple(range(tensor.ndim))[::-1]),
            ):
                assert reader.read(name, into) is into
                assert torch.equal(into, tensor.to(into.dtype)), name
        with pytest.raises(ValueError, match=r"large: expected shape \[1000, 700\], .*has \[700, 1000\]"):
            reader.read("large", torch.empty(1000, 700))


def test_one_shard_is_held_at_a_time(tmp_path):
    with WeightsWriter(tmp_path / "model", shard_bytes=1000) as writer:
        for number in range(20):
            writer.add(f"{number}", torch.zeros(100))  # 400 bytes
            assert writer._pending_bytes <= 1000
        writer.add("larger than a shard", torch.zeros(1000))
    assert len([name for name in names(tmp_path / "model") if name != INDEX]) == 11


def test_what_cannot_be_written_is_refused(tmp_path):
    for name, tensor, message in [
        ("a", torch.zeros(1), "a is added twice"),
        ("b", torch.tensor([1.0, float("nan")]), "not finite: b"),
        ("b", torch.full((70000,), 1e38).index_fill(0, torch.tensor([7]), float("-inf")), "not finite: b"),
        (
            "b",
            torch.zeros(1, dtype=torch.complex64),
            "b: expected one of .*, got torch.complex64",
        ),
    ]:
        with pytest.raises(ValueError, match=message), WeightsWriter(tmp_path / "model") as writer:
            writer.add("a", torch.zeros(1))
            writer.add(name, tensor)
    for name in (WEIGHTS, INDEX, "../a", "model-00001-of-00002.safetensors"):
        with (
            pytest.raises(ValueError, match="the name of a file"),
            WeightsWriter(tmp_path / "model") as writer,
        ):
            writer.add_file(name, b"")
    assert names(tmp_path) == []
    write(tmp_path / "model", {"large": torch.full((70000,), 1e38)})  # whose sum is infinite


def test_a_new_model_takes_the_place_of_the_old(tmp_path):
    folder = write(tmp_path / "model", shard_bytes=100, files=FILES | {"known_names.txt": b"dog\n"})
    (folder / "README.md").write_text("read me")
    write(folder, {"a": torch.ones(1)})
    assert names(folder) == ["README.md", "config.json", WEIGHTS, "tokenizer.model"]
    write(folder, shard_bytes=3_000_000)  # as others would, in one shard
    with pytest.raises(RuntimeError), WeightsWriter(folder) as writer:
        writer.add("a", torch.ones(1))
        raise RuntimeError
    assert torch.equal(read(folder)[0]["large"], TENSORS["large"])
    assert (folder / "README.md").read_text() == "read me" and names(tmp_path) == ["model"]


def test_a_reader_keeps_what_it_opened(folder):
    with WeightsReader(folder) as reader:
        write(folder, {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})
        assert reader.replaced
        assert torch.equal(reader.read("large"), TENSORS["large"])
        assert reader.file("tokenizer.model") == b"pieces"
    assert not read(folder)[0]["large"].any()


SAVER = """
import sys, torch
from pathlib import Path
from visionllm.model.weight_files import WeightsWriter
folder, number = Path(sys.argv[1]), 0
while not (folder.parent / "end").exists():
    number += 1
    with WeightsWriter(folder, shard_bytes=4000 if number % 3 else 100_000) as writer:
        writer.add_file("config.json", str(number).encode())
        for name in "abcdef":
            writer.add(name, torch.full((1000,), float(number)))
    if number == 1:
        print("ready", flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders are exchanged on Linux only")
def test_a_reader_never_sees_a_mixture(tmp_path):
    folder, seen = tmp_path / "model", set()
    with subprocess.Popen(
        [sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True
    ) as saver:
        try:
            assert saver.stdout is not None and saver.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 120
            while len(seen) < 8 and time.monotonic() < deadline:
                tensors, files = read(folder)
                values = {float(value) for tensor in tensors.values() for value in tensor.unique()}
                assert values == {float(files["config.json"])}
                seen |= values
        finally:
            (tmp_path / "end").touch()
            saver.wait(60)
    assert len(seen) == 8


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


def test_a_damaged_tensor_is_named(folder):
    with WeightsReader(folder) as reader:
        places = {name: (reader.where(name), reader._shard_of[name]._starts[name]) for name in reader.shapes}
    for name, (file, start) in places.items():
        if name == "empty":
            continue
        flip(file, 8 * start + 5)
        with WeightsReader(folder) as reader:
            for other in reader.shapes.keys() - {name}:
                reader.read(other)
            with pytest.raises(ValueError, match=f"{file.name}: {name}: damaged: expected checksum"):
                reader.read(name)
        flip(file, 8 * start + 5)
    read(folder)


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 100}])
def test_headers_and_the_index_are_checked(tmp_path, options):
    small = {name: tensor for name, tensor in TENSORS.items() if name != "large"}
    folder = write(tmp_path / "model", small, **options)
    for file in folder.iterdir():
        if file.name in FILES:
            continue
        data = file.read_bytes()
        header = len(data) if file.name == INDEX else 8 + int.from_bytes(data[:8], "little")
        for place in range(0, 8 * header, 61):
            flip(file, place)
            with pytest.raises((ValueError, FileNotFoundError), match=r"model.*safetensors|no .*safetensors"):
                read(folder)
            file.write_bytes(data)
    read(folder)


def test_truncated_files_are_refused(folder):
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:length])
            with pytest.raises(ValueError, match=f"{file.name}: .*truncated"):
                read(folder)
        file.write_bytes(data + b"\0")
        with pytest.raises(ValueError, match=f"{file.name}: .*expected {len(data)}"):
            read(folder)
        file.write_bytes(data)


def test_a_file_that_shrinks_while_it_is_read(folder):
    with WeightsReader(folder) as reader:
        file = reader.where("large")
        with open(file, "r+b") as opened:
            opened.truncate(file.stat().st_size - 1_000_000)
        with pytest.raises(ValueError, match=f"{file.name}: large: the file ends within it"):
            reader.read("large")


def test_missing_and_swapped_shards(tmp_path):
    folder = write(tmp_path / "model", shard_bytes=100)
    flipped = {name: tensor.flip(0) if tensor.ndim else tensor for name, tensor in TENSORS.items()}
    other = write(tmp_path / "other", flipped, shard_bytes=100)
    shards = sorted(folder.glob("model-*"))
    assert [path.name for path in shards] == [path.name for path in sorted(other.glob("model-*"))]
    shards[1].rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match=rf"has no {shards[1].name}, which holds \w+"):
        read(folder)
    shutil.copy(other / shards[1].name, shards[1])
    with pytest.raises(ValueError, match=rf"{shards[1].name}: \S+ is that of another model"):
        read(folder)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(ValueError, match=rf"{shards[1].name}: \w+ \S+, unlike {INDEX} says"):
        read(folder)


def test_other_files_belong_to_the_weights(folder):
    (folder / "tokenizer.model").write_bytes(b"piecez")
    with pytest.raises(ValueError, match=r"tokenizer.model: is not what was written with the weights"):
        read(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.model, which belongs to its weights"):
        read(folder)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "config.json").write_bytes(b'{"a": 2}')
    with WeightsReader(folder) as reader:
        with pytest.warns(UserWarning, match=r"config.json: is not what was written.*weight_files"):
            assert reader.file("config.json", editable=True) == b'{"a": 2}'
        with pytest.raises(FileNotFoundError, match=r"no notes.txt that belongs"):
            reader.file("notes.txt")
    with pytest.warns(UserWarning, match=r"config.json"):
        rewrite(folder)
    assert read(folder)[1]["config.json"] == b'{"a": 2}'


def test_folders_without_checksums(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"has no checksums: .*python -m \S+ {tmp_path}"):
        WeightsReader(tmp_path)
    with WeightsReader(tmp_path, unchecked=True) as reader:
        assert torch.equal(reader.read("large"), TENSORS["large"]) and reader.file("config.json") == b"{}"
    rewrite(tmp_path)
    found, files = read(tmp_path)
    assert files == {"config.json": b"{}"}
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in TENSORS.items()
    )


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_an_error_or_none(folder, seed):
    """50 times: bits flipped, a piece cut off, zeroed or written over, in any file."""
    generator = random.Random(seed)
    files = [file for file in sorted(folder.iterdir()) if file.name != "config.json"]
    refused = 0
    for _ in range(50):
        file = generator.choice(files)
        data = file.read_bytes()
        damaged = bytearray(data)
        # Half of them in the first bytes, where headers are.
        place = generator.randrange(min(len(data), 600) if generator.random() < 0.5 else len(data))
        length = generator.choice((1, 4, 512, 4096))
        kind = generator.choice(("bits", "cut", "zeros", "noise", "twice"))
        if kind == "bits":
            for _ in range(generator.randrange(1, 4)):
                damaged[generator.randrange(place, len(data))] ^= 1 << generator.randrange(8)
        elif kind == "cut":
            del damaged[place:]
        elif kind == "zeros":
            damaged[place : place + length] = bytes(len(damaged[place : place + length]))
        elif kind == "noise":
            damaged[place : place + length] = generator.randbytes(len(damaged[place : place + length]))
        else:
            damaged[place:place] = damaged[place : place + length]
        file.write_bytes(damaged)
        try:
            tensors, others = read(folder)
            assert others == FILES and tensors.keys() == TENSORS.keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items()), kind
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
            refused += 1
        file.write_bytes(data)
    assert refused > 40
    read(folder)


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 1_000_000}])
def test_a_full_disk_leaves_the_old_folder(tmp_path, options):
    """The kernel refuses what makes a file larger than 2 MB."""
    resource = pytest.importorskip("resource")
    folder = write(tmp_path / "model", **options)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(folder, {"a": torch.ones(400_000), "b": torch.ones(600_000)}, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 3), (3, 1), (2, 0)], ids=str)
@pytest.mark.parametrize("shard_bytes", [10, 10**6])
def test_rounded_tensors(tmp_path, shape, shard_bytes):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensor[0] = 0
    with WeightsWriter(tmp_path / "a", shard_bytes=shard_bytes) as writer:
        writer.add("w", tensor, rounded=True)
        writer.add("other", TENSORS["transposed"])
    with WeightsReader(tmp_path / "a") as reader:
        assert reader.shapes == {"w": shape, "other": (3, 5)} and reader.dtypes["w"] == torch.float32
        found = reader.read("w")
        assert sorted(reader.stored) == ["other", "w", "w.rounded"]
        assert reader.read_stored("w").dtype == torch.int8
        places = [torch.empty(shape, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        for place in places:
            assert reader.read("w", into=place) is place
        assert len(reader.checksum("w")) == 2 * len(reader.checksum("other"))
    assert torch.equal(places[0], found) and torch.allclose(places[1].float(), found, rtol=2**-8, atol=0)
    largest = tensor.flatten(1).abs().amax(1) if tensor.numel() else tensor.new_zeros(len(tensor))
    step = (largest / 127).view(-1, *[1] * (len(shape) - 1))
    assert ((found - tensor).abs() <= step / 2 * 1.001).all()
    with WeightsWriter(tmp_path / "b", shard_bytes=shard_bytes) as writer:
        writer.add("w", found, rounded=True)
    with WeightsReader(tmp_path / "b") as reader:
        assert torch.equal(reader.read("w"), found)


def test_rewriting_keeps_rounded_tensors(tmp_path):
    with WeightsWriter(tmp_path / "a") as writer:
        writer.add("w", torch.randn(6, 4), rounded=True)
    before = (tmp_path / "a" / WEIGHTS).read_bytes()
    rewrite(tmp_path / "a")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    "tensors",
    [
        {"w.rounded": torch.ones(3)},
        {"w": torch.ones(3, 2), "w.rounded": torch.ones(3)},
        {"w": torch.ones(4, 2, dtype=torch.int8), "w.rounded": torch.ones(3)},
    ],
    ids=["no tensor", "not int8", "other rows"],
)
def test_scales_of_nothing_are_refused(tmp_path, tensors):
    write(tmp_path, tensors, {})
    with pytest.raises(ValueError, match=r"w\.rounded \[3\] belongs to no int8 tensor of as many rows"):
        WeightsReader(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_rounded_away(tmp_path, value):
    tensor = torch.ones(3, 2)
    tensor[1, 0] = value
    with pytest.raises(ValueError, match="not finite: w"), WeightsWriter(tmp_path / "a") as writer:
        writer.add("w", tensor, rounded=True)
    assert not (tmp_path / "a").exists()
