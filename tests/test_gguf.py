"""GGUF files: values as the package gguf decodes them, broken and hostile files, and a whole LLaMA."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from gguf_files import LIST, TEXT, U32, U64, gguf, llama_pairs, pair, tensor, text
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models import Llama, hugging_face_llama, random_rows
from small_network import SMALL

from visionllm.convert import gguf_blocks
from visionllm.convert.gguf import gguf_config, open_gguf
from visionllm.convert.gguf_blocks import KINDS
from visionllm.convert.gguf_file import GGUFFile
from visionllm.convert.keys import ConvertError
from visionllm.convert.llama import fill_llama


def opened(path, raw: bytes) -> GGUFFile:
    path = path / "file.gguf"
    path.write_bytes(raw)
    return GGUFFile(path)


@pytest.mark.parametrize("number", KINDS, ids=lambda number: KINDS[number].name)
def test_values_are_those_of_the_package_gguf(tmp_path, number, monkeypatch):
    """Of random bytes, whose scales alone are numbers."""
    monkeypatch.setattr(gguf_blocks, "VALUES_AT_ONCE", 1024)  # several rounds
    kind, blocks = KINDS[number], 60
    raw = np.random.default_rng(0).integers(0, 256, (blocks, kind.bytes), np.uint8)
    scales = np.random.default_rng(1).standard_normal((blocks, 2)).astype("<f2").view(np.uint8)
    if kind.values == 256 and kind.name == "Q6_K":
        raw[:, 208:] = scales[:, :2]
    elif kind.values > 1:
        two = kind.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
        raw[:, : 4 if two else 2] = scales[:, : 4 if two else 2]
    else:
        raw = np.random.default_rng(0).standard_normal(blocks).astype("<f4").view(np.uint8)
        raw = raw.reshape(-1, kind.bytes)
    values = raw.size // kind.bytes * kind.values
    found = opened(tmp_path, gguf([], [tensor("x", [values // 4, 4], number, 0)], raw.tobytes())).read("x")
    expected = dequantize(raw.reshape(4, -1), GGMLQuantizationType(number))
    assert found.shape == (4, values // 4)
    if kind.values == 1:
        assert found.dtype == kind.decode
    assert np.array_equal(found.float().numpy(), expected.astype(np.float32), equal_nan=True)


def test_metadata_of_every_type(tmp_path):
    writer = GGUFWriter(tmp_path / "file.gguf", "llama")
    wanted = {
        "a.u8": 200, "a.i8": -3, "a.u16": 60000, "a.i16": -30000, "a.u32": 4_000_000_000, "a.i32": -5,
        "a.u64": 1 << 60, "a.i64": -(1 << 60), "a.f64": 0.1, "a.bool": True, "a.text": "Größe",
        "a.texts": ["a", "", "▁x"], "a.numbers": [1, 2, 3], "a.floats": [0.5, 1.5],
    }  # fmt: skip
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float64", "bool"):
        key = "a." + kind.replace("uint", "u").replace("int", "i").replace("float", "f")
        getattr(writer, f"add_{kind}")(key, wanted[key])
    writer.add_string("a.text", wanted["a.text"])
    for key in ("a.texts", "a.numbers", "a.floats"):
        writer.add_array(key, wanted[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(tmp_path / "file.gguf").metadata
    assert found == {"general.architecture": "llama", **wanted}
    assert found["a.bool"] is True and isinstance(found["a.texts"], list)


def test_an_array_of_arrays(tmp_path):
    inner = struct.pack("<IQ2I", U32, 2, 7, 8)
    value = struct.pack("<IQ", LIST, 2) + inner + struct.pack("<IQ", TEXT, 1) + text("x")
    assert opened(tmp_path, gguf([pair("k", LIST, value)], [])).metadata == {"k": [[7, 8], ["x"]]}


DATA = bytes(64)
WHOLE = gguf(llama_pairs(), [tensor("x", [8, 2], 0, 0)], DATA)


def of_tensors(*tensors: bytes, data: bytes = DATA, **rest) -> bytes:
    return gguf([], list(tensors), data, **rest)


HOSTILE = {
    "empty": (b"", "expected a GGUF file"),
    "another file": (b"PK\x03\x04" + bytes(100), "expected a GGUF file, got one that begins with b'PK"),
    "magic alone": (b"GGUF", "ends within the version"),
    "version": (gguf([], [], version=4), r"version: expected 2 or 3 \(little-endian\), got 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version: expected 2 or 3"),
    "tensors": (gguf([], [], counts=(1 << 62, 0)), "the number of tensors: expected at most"),
    "pairs": (gguf([], [], bytes(99), counts=(0, (1 << 64) - 1)), "the number of metadata fields: expected"),
    "key": (gguf([struct.pack("<Q", 1 << 40) + bytes(64)], []), "the length of a metadata key: expected"),
    "string": (gguf([pair("k", TEXT, struct.pack("<Q", 1 << 63))], []), "the length of field 'k': expected"),
    "not UTF-8": (gguf([pair("k", TEXT, text(b"\xff\xfe"))], []), "field 'k' is not UTF-8"),
    "type": (gguf([pair("k", 13, bytes(8))], []), "field 'k': unknown type 13"),
    "list": (gguf([pair("k", LIST, struct.pack("<IQ", U32, 1 << 61))], [], DATA), "the length of field 'k'"),
    "list of texts": (gguf([pair("k", LIST, struct.pack("<IQ", TEXT, 1 << 61))], [], DATA), "the length of"),
    "list of nothing": (gguf([pair("k", LIST, struct.pack("<IQ", 77, 1))], [], DATA), "unknown type 77"),
    "deep": (
        gguf([pair("k", LIST, struct.pack("<IQ", LIST, 1) * 50)], [], DATA), "field 'k': nested too deep"
    ),
    "twice": (gguf([pair("k", U32, bytes(4))] * 2, []), "metadata field 'k' is there twice"),
    "alignment 0": (gguf([pair("general.alignment", U32, bytes(4))], []), "expected a power of two, got 0"),
    "alignment 48": (
        gguf([pair("general.alignment", U32, struct.pack("<I", 48))], []), "expected a power of two, got 48"
    ),
    "huge alignment": (
        gguf([pair("general.alignment", U64, struct.pack("<Q", 1 << 63))], []), "expected a power of two"
    ),
    "alignment in words": (
        gguf([pair("general.alignment", TEXT, text("32"))], []), "expected a power of two, got '32'"
    ),
    "no dimensions": (of_tensors(tensor("x", [], 0, 0)), "expected 1 to 4 dimensions, got 0"),
    "many dimensions": (of_tensors(tensor("x", [1] * 5, 0, 0)), "expected 1 to 4 dimensions, got 5"),
    "most dimensions": (of_tensors(text("x") + b"\xff" * 24), "expected 1 to 4 dimensions, got 4294967295"),
    "no rows": (of_tensors(tensor("x", [4, 0], 0, 0)), "expected rows of a multiple of 1 values"),
    "half a block": (of_tensors(tensor("x", [40], 8, 0)), "expected rows of a multiple of 32 values"),
    "kind": (of_tensors(tensor("x", [256], 10, 0)), "expected one of F32, .*, got type 10"),
    "offset": (of_tensors(tensor("x", [4], 0, 4)), "an offset of a multiple of 32, got 4"),
    "beyond": (of_tensors(tensor("x", [4], 0, 64)), "expected 16 bytes at 64, got a file with 64"),
    "far beyond": (of_tensors(tensor("x", [4], 0, (1 << 64) - 32)), "it is not whole"),
    "overflow": (of_tensors(tensor("x", [1 << 32, 1 << 32], 0, 0)), "it is not whole"),
    "overflow of four": (of_tensors(tensor("x", [1 << 63] * 4, 0, 0)), "it is not whole"),
    "overlap": (of_tensors(tensor("x", [8, 2], 0, 0), tensor("y", [4], 0, 32)), "'x' and 'y' overlap"),
    "name twice": (of_tensors(tensor("x", [4], 0, 0), tensor("x", [4], 0, 32)), "tensor 'x' is there twice"),
    "no data": (of_tensors(tensor("x", [4], 0, 0), data=b""), "it is not whole"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    raw, message = HOSTILE[case]
    with pytest.raises(ConvertError, match=message):
        opened(tmp_path, raw)


def test_every_truncation_is_noticed(tmp_path):
    assert opened(tmp_path, WHOLE).read("x").shape == (2, 8)
    for length in range(len(WHOLE)):
        with pytest.raises(ConvertError):
            opened(tmp_path, WHOLE[:length])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_are_read_or_refused(tmp_path_factory, data):
    """Whatever a header says: a tensor, or ConvertError."""
    raw = bytearray(WHOLE)
    head = len(raw) - len(DATA)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, head - 1))] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 128, 255]))
    try:
        file = opened(tmp_path_factory.getbasetemp(), bytes(raw))
    except ConvertError:
        return
    for name, place in file.places.items():
        assert file.read(name).shape == place.shape


def test_a_missing_file(tmp_path):
    with pytest.raises(ConvertError, match="nothing.gguf: cannot be read: No such file"):
        GGUFFile(tmp_path / "nothing.gguf")


# ---- a LLaMA ---------------------------------------------------------------------------------------------

NAMES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def write_llama(path, model, kind: GGMLQuantizationType) -> None:
    """As llama.cpp's converter: names, the order of q's and k's rows, norms in F32."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    for name, value in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        array = value.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows = array.reshape(heads, 2, -1, array.shape[1])
                array = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
        there = next(new for old, new in NAMES.items() if old in name)
        layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        used = kind if array.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(f"{layer}{there}.weight", quantize(array, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@torch.no_grad()
def test_a_llama_computes_what_transformers_does(tmp_path, kind, tied):
    """With the weights as they are after quantisation, from the same file."""
    number = GGMLQuantizationType[kind]
    path = tmp_path / "model.gguf"
    model = hugging_face_llama(intermediate_size=128, tie_word_embeddings=tied)
    write_llama(path, model, number)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            stored = quantize(parameter.numpy(), number)
            parameter.copy_(torch.from_numpy(dequantize(stored, number).astype(np.float32)))
    source = open_gguf(path)
    config = gguf_config(source)
    assert config == {
        "vocab_size": 97, "llm_dim": 64, "llm_layers": 3, "llm_heads": 4, "llm_kv_heads": 2,
        "llm_ffn_dim": 128, "rope_theta": 10000.0, "rms_epsilon": 1e-6,
        "llm_head": "tied" if tied else "linear",
    }  # fmt: skip
    llama = Llama(dataclasses.replace(SMALL, **config)).eval()
    fill_llama(llama, source, "file")
    ids = random_rows(12, 5)
    expected = model(ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits
    assert (llama(ids) - expected)[ids >= 0].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture: expected 'llama', got 'qwen2'"),
        ({"llama.attention.head_count": None}, "head_count: expected a positive number, got None"),
        ({"llama.attention.head_count": 0}, "head_count: expected a positive number, got 0"),
        ({"llama.attention.head_count": 3}, r"k_proj.weight: expected 3 heads of even size, got \[16, 16\]"),
        ({"llama.embedding_length": "x"}, "llama.embedding_length: expected a positive number, got 'x'"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count: expected 16 / 2, got 4"),
        ({"llama.attention.key_length": 16}, "llama.attention.key_length: expected 16 / 2, got 16"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: expected 'none', got 'yarn'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "expected a positive number, got nan"),
    ],
)  # fmt: skip
def test_metadata_that_is_no_llama(tmp_path, changes, message):
    path = tmp_path / "file.gguf"
    tensors = [tensor("blk.0.attn_k.weight", [16, 16], 0, 0), tensor("token_embd.weight", [16, 4], 0, 1024)]
    path.write_bytes(gguf(llama_pairs(changes), tensors, bytes(2048)))
    with pytest.raises(ConvertError, match=message):
        gguf_config(open_gguf(path))


def test_unknown_tensors_are_unused_ones(tmp_path):
    path = tmp_path / "file.gguf"
    tensors = [tensor("token_embd.weight", [16, 4], 0, 0), tensor("blk.0.attn_q.bias", [16], 0, 256)]
    path.write_bytes(gguf(llama_pairs(), [*tensors, tensor("rope_freqs.weight", [4], 0, 320)], bytes(512)))
    source = open_gguf(path)
    llama = Llama(dataclasses.replace(SMALL, **gguf_config(source)))
    with pytest.raises(ConvertError) as error:
        fill_llama(llama, source, "file")
    for part in ("blk.0.attn_q.bias", "rope_freqs.weight", "llm.layers.0.q.weight"):
        assert part in str(error.value)


def test_the_package_reads_files_of_these_fields(tmp_path):
    """The hostile ones are whole but for what is wrong in them."""
    path = tmp_path / "file.gguf"
    path.write_bytes(gguf(llama_pairs(), [tensor("x", [8, 2], 0, 0)], np.arange(16, dtype="<f4").tobytes()))
    there = GGUFReader(path).tensors[0]
    assert np.array_equal(GGUFFile(path).read("x").numpy(), there.data.reshape(2, 8))
