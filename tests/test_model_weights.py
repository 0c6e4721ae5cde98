"""A network as a folder: what is written comes back, what does not fit is refused, no halves stay."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_network import NAMES, SMALL, TOKENIZER_FILE, pictures, small_network

from visionllm.instruction import Instruction
from visionllm.model.config import PRESETS, ModelConfig
from visionllm.model.network import Network, build_network
from visionllm.model.weight_files import rewrite
from visionllm.model.weights import NoRandomNumbers
from visionllm.tensor_file import TensorFile, write_tensors
from visionllm.tokenizer import Tokenizer

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
WEIGHT = "llm.layers.0.q.weight"


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the saved network to spoil."""
    return shutil.copytree(saved, tmp_path / "network")


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of the file, or removes them (None); the file says nothing about that."""
    with TensorFile(folder / WEIGHTS) as file:
        state = {name: file.read(name) for name in file.shapes} | changes
        metadata = file.metadata
    write_tensors(folder / WEIGHTS, {name: t for name, t in state.items() if t is not None}, metadata)


def change_config(folder: Path, **changes: object) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


def test_round_trip_is_exact(network, saved):
    loaded = Network.from_pretrained(saved)
    assert loaded.config == network.config and loaded.tokenizer.files == network.tokenizer.files
    assert not loaded.training
    expected, found = network.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, p in loaded.named_parameters() if not p.requires_grad] != []
    instructions = [Instruction(classes=NAMES)] * 2
    for a, b in zip(
        network.find(pictures(2), instructions), loaded.find(pictures(2), instructions), strict=True
    ):
        assert torch.equal(a.scores, b.scores) and torch.equal(a.boxes, b.boxes)


def test_sixteen_bits_round_once(network, saved, tmp_path):
    network.save_pretrained(tmp_path / "a", torch.bfloat16)
    size = (tmp_path / "a" / WEIGHTS).stat().st_size
    assert size < 0.51 * (saved / WEIGHTS).stat().st_size
    loaded = Network.from_pretrained(tmp_path / "a")
    for name, tensor in network.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float()), name
    loaded.save_pretrained(tmp_path / "b", torch.bfloat16)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


IMPORTS = """
import sys, torch
before = set(sys.modules)
import numpy, visionllm
model = visionllm.load(sys.argv[1])
model.detect(numpy.zeros((20, 30, 3), numpy.uint8), ["dog", "cup"])
heavy = ("sympy", "torch._dynamo", "torch._inductor", "scipy", "matplotlib")
print([name for name in heavy if name in sys.modules and name not in before])
"""


def test_loading_and_detecting_import_no_compiler(saved):
    """Importing torch's compiler and sympy takes longer than everything else that loading does."""
    command = [sys.executable, "-c", IMPORTS, str(saved)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_loading_fills_nothing_at_random(saved):
    state = torch.get_rng_state()
    Network.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), state)
    torch.nn.Linear(2, 2)
    assert not torch.equal(torch.get_rng_state(), state), "afterwards modules are filled again"


def test_saving_twice_gives_the_same_bytes(network, saved, tmp_path):
    network.save_pretrained(tmp_path)
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted([CONFIG, WEIGHTS, TOKENIZER])


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TOKENIZER])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Network.from_pretrained(folder)


def test_all_differences_are_listed(folder):
    state = load_file(folder / WEIGHTS)
    change_weights(
        folder,
        **{
            WEIGHT: None,
            "llm.layers.9.q.weight": torch.zeros(2, 2),
            "llm.norm.weight": torch.zeros(7),
            "slot_head.no_object": torch.zeros(state["slot_head.no_object"].shape, dtype=torch.int64),
            "embedding.weight": state["embedding.weight"].double(),
        },
    )
    with pytest.raises(ValueError) as error:
        Network.from_pretrained(folder)
    for part in (
        str(folder),
        "5 differences",
        f"missing {WEIGHT}",
        "unexpected llm.layers.9.q.weight",
        "llm.norm.weight: expected shape [32], got [7]",
        "slot_head.no_object: expected float32, bfloat16 or float16, got torch.int64",
        "embedding.weight: expected float32, bfloat16 or float16, got torch.float64",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, tmp_path, value):
    spoilt = load_file(folder / WEIGHTS)[WEIGHT].clone()
    spoilt[1, 2] = value
    change_weights(folder, **{WEIGHT: spoilt})
    with pytest.raises(ValueError, match=f"not finite: {WEIGHT}"):
        Network.from_pretrained(folder)
    network = small_network()
    with torch.no_grad():
        network.llm.layers[0].q.weight[1, 2] = value
    with pytest.raises(ValueError, match=f"not finite: {WEIGHT}"):
        network.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_beyond_half_precision_are_refused(tmp_path):
    network = small_network()
    with torch.no_grad():
        network.llm.layers[0].q.weight[1, 2] = 1e5
    network.save_pretrained(tmp_path / "bf16", torch.bfloat16)
    with pytest.raises(ValueError, match=f"not finite: {WEIGHT}"):
        network.save_pretrained(tmp_path / "fp16", torch.float16)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
def test_a_truncated_file_is_refused(folder, share):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=WEIGHTS):
        Network.from_pretrained(folder)


def test_pickles_are_never_loaded(folder, tmp_path):
    mark = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (mark,))

    (folder / WEIGHTS).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="not a safetensors file"):
        Network.from_pretrained(folder)
    torch.save({"a": Trap()}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="not a safetensors file"):
        Network.from_pretrained(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap()))
    assert mark.exists()  # the trap works


def test_a_broken_tokenizer_is_refused(folder):
    (folder / TOKENIZER).write_bytes((folder / TOKENIZER).read_bytes()[:1000])
    with pytest.raises(ValueError, match="tokenizer"):
        Network.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*edited")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam": 4}, "unknown fields beam"),
        ({"model_type": "llama"}, '"model_type": "visionllm"'),
        ({"dim": "32"}, "dim must be int, got '32'"),
        ({"dim": 32.0}, "dim must be int, got 32.0"),
        ({"freeze_depthwise": 1}, "freeze_depthwise must be bool, got 1"),
        ({"lora_rank": True}, "lora_rank must be int, got True"),
        ({"lora_alpha": "16"}, "lora_alpha must be a finite float, got '16'"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite float, got nan"),
        ({"lora_targets": "q"}, "lora_targets must be tuple, got 'q'"),
        ({"lora_targets": ["q", "queries"]}, "lora_targets must be of q, k, v"),
        ({"lora_targets": [["q"]]}, "lora_targets must be of q, k, v"),
        ({"class_rows": "both"}, "class_rows must be 'names' or 'static', got 'both'"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"lora_rank": -1}, "lora_rank must be at least 0, got -1"),
        ({"llm_heads": 5}, "llm_dim must be a multiple of llm_heads, got 32 and 5"),
        ({"dim": 40}, "dim must be a multiple of 16, got 40"),
        ({"llm_heads": 32}, "llm_dim / llm_heads must be even, got 32 / 32"),
        ({"num_queries": 86}, "num_queries must be at most 85"),
        ({"vocab_size": 100}, "vocab_size must be at least 2048"),
        ({"dim": 64, "heads": 4}, "expected shape"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError) as error:
        Network.from_pretrained(folder)
    assert message in str(error.value)


@pytest.mark.filterwarnings("ignore:.*edited")
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe{}", b"null"])
def test_a_configuration_that_is_no_json_object_is_refused(folder, text):
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=f"{CONFIG}: expected"):
        Network.from_pretrained(folder)


def test_a_configuration_comes_back():
    config = dataclasses.replace(SMALL, lora_targets=("q", "down"), objectness_power=1, class_rows="static")
    assert ModelConfig.from_json(config.to_json()) == config
    assert ModelConfig.from_json('{"model_type": "visionllm"}') == PRESETS["tiny"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 64


@pytest.mark.parametrize("fails", ["os.fsync", "visionllm.atomic_file._exchange"])
@pytest.mark.parametrize("before", [False, True])
def test_when_writing_fails_nothing_changes(network, tmp_path, monkeypatch, fails, before):
    if before:
        network.save_pretrained(tmp_path, torch.bfloat16)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fails, full)
    with pytest.raises(OSError, match="No space left"):
        network.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_the_same_seed_gives_the_same_weights(tokenizer):
    torch.manual_seed(1)
    first = build_network(SMALL, tokenizer, seed=3).state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = build_network(SMALL, tokenizer, seed=3).state_dict()
    other = build_network(SMALL, tokenizer, seed=4).state_dict()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert not torch.equal(other[WEIGHT], first[WEIGHT])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone


def test_a_tokenizer_that_is_too_large_is_refused(tokenizer):
    with pytest.raises(ValueError, match="vocab_size must be at least 2048, .* got 2047"):
        build_network(dataclasses.replace(SMALL, vocab_size=2047), tokenizer)


MEMORY = """
import sys, torch
from pathlib import Path
from small_network import small_network
from visionllm.model.network import Network

def peak():  # bytes; ru_maxrss counts the parent's memory too
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

torch.set_num_threads(1)
small_network(llm_layers=1)  # what the first network imports
before = peak()
network = Network.from_pretrained(sys.argv[1])
print(peak() - before, sum(t.numel() * t.element_size() for t in network.state_dict().values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("base", "layers", "dtype"),
    [("float32", 6, torch.bfloat16), ("bfloat16", 4, None), ("int8", 8, None)],
)
def test_loading_takes_the_memory_of_the_weights(tmp_path, base, layers, dtype):
    sizes = {"llm_dim": 1024, "llm_layers": layers, "llm_heads": 16, "llm_kv_heads": 16, "llm_ffn_dim": 2816}
    config = dataclasses.replace(SMALL, base_dtype=base, **sizes)
    with NoRandomNumbers():
        network = Network(config, Tokenizer.from_file(TOKENIZER_FILE))
    for tensor in network.state_dict().values():
        tensor.zero_()
    network.save_pretrained(tmp_path, dtype)
    del network
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    grown, weights = map(int, answer.stdout.split())
    assert weights > (300e6 if base == "float32" else 100e6)
    assert 0.9 * weights < grown < 1.1 * weights


def test_a_damaged_weight_is_named(folder):
    """Also where the file still describes a network that fits."""
    with TensorFile(folder / WEIGHTS) as file:
        place = file._starts[WEIGHT] + 3
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[place] ^= 1  # a sign or an exponent: finite all the same
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=f"{WEIGHT}: damaged"):
        Network.from_pretrained(folder)


def test_a_folder_without_checksums_is_refused_and_rewritten(network, folder):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    with pytest.raises(ValueError, match="has no checksums"):
        Network.from_pretrained(folder)
    rewrite(folder)
    found = Network.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())


def test_known_names_and_tokenizer_belong_to_the_weights(folder):
    data = (folder / TOKENIZER).read_bytes()
    (folder / TOKENIZER).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{TOKENIZER}: is not what was written with the weights"):
        Network.from_pretrained(folder)


def test_an_edited_configuration_is_taken_with_a_warning(folder):
    change_config(folder, score_threshold=0.75)
    with pytest.warns(UserWarning, match="edited"):
        network = Network.from_pretrained(folder)
    assert network.config.score_threshold == 0.75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.save_pretrained(folder)
        Network.from_pretrained(folder)
