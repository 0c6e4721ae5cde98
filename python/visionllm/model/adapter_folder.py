"""A trained model without what it shares with its base: a folder of the tensors that differ.

    base.json           which base: a checksum over the tensors that stay
    config.json, model.safetensors, …    as in a model folder, but the weights are those that differ alone

What was published by others stays where it is, and what is shipped is what was trained.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from visionllm.model import known_names
from visionllm.model.config import ModelConfig
from visionllm.model.weight_files import (
    BASE,
    CONFIG,
    MODEL_FILES,
    WeightsReader,
    WeightsWriter,
    is_finite,
)
from visionllm.model.weights import NoRandomNumbers, check
from visionllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from visionllm.model.network import Network

# The base's own; an adapter brings the others, such as known_names.txt.
TOKENIZER_FILES = tuple(name for name in MODEL_FILES if "tokenizer" in name)


def checksum_of(reader: WeightsReader, names: Iterable[str]) -> str:
    """Of these tensors, by the checksums that stand in their files: none is read."""
    text = "".join(f"{name} {reader.dtypes[name]} {reader.checksum(name)}\n" for name in sorted(names))
    return f"{zlib.crc32(text.encode()):08x}"


def write_adapter(base: Path, model: Path, output: Path, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Writes the tensors in which a model differs from its base.

    Args:
        base, model: model folders; tensors may be of different types in them.
        dtype: of the adapter's tensors; None: as in the model.

    Returns:
        how many there are, and their bytes.

    Raises:
        ValueError: the base lacks a tensor or has it in another shape, or they have other tokenizers.
    """
    with WeightsReader(base) as old, WeightsReader(model) as new, WeightsWriter(output) as writer:
        for name in TOKENIZER_FILES:
            if old.files.get(name) != new.files.get(name):
                raise ValueError(f"{model}: {name} is not that of {base}")
        names = new.shapes.keys() | old.shapes.keys()
        differing = sorted(name for name in names if new.shapes.get(name) != old.shapes.get(name))
        if differing:
            raise ValueError(
                f"{model}: {len(differing)} tensors have other shapes in {base}, or are in one alone: "
                f"{', '.join(differing[:20])}"
            )
        count, size, same = 0, 0, []
        for name in new.shapes:
            tensor, before = new.read(name), old.read(name)
            if torch.equal(tensor, before.to(tensor.dtype)):  # as it is converted when it is loaded
                same.append(name)
                continue
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            writer.add(name, tensor)
            count, size = count + 1, size + tensor.numel() * tensor.element_size()
        content = {"tensors": len(same), "checksum": checksum_of(old, same)}
        writer.add_file(BASE, (json.dumps(content) + "\n").encode())
        for name in (CONFIG, known_names.FILE):
            if name in new.files:
                writer.add_file(name, new.file(name, editable=name == CONFIG))
    return count, size


def load_adapted(network_class: type[Network], base: Path, adapter: Path) -> Network:
    """The model of a base and an adapter to it; each tensor is read once, into its place.

    Raises:
        FileNotFoundError, ValueError: as for a model folder; or the base is not the adapter's.
    """
    with WeightsReader(base) as old, WeightsReader(adapter) as new:
        expected = json.loads(new.file(BASE))
        stay = [name for name in old.shapes if name not in new.shapes]
        if len(stay) != expected["tensors"] or checksum_of(old, stay) != expected["checksum"]:
            raise ValueError(
                f"{adapter}: belongs to another base than {base}: expected {expected['tensors']} tensors "
                f"with checksum {expected['checksum']}, got {len(stay)} with {checksum_of(old, stay)}"
            )
        config = ModelConfig.from_json(new.file(CONFIG, editable=True), str(adapter / CONFIG))
        for name in old.files.keys() - {CONFIG, known_names.FILE}:
            old.file(name)  # checked
        with NoRandomNumbers():
            network = network_class(config, Tokenizer.from_folder(base))
        state = network.state_dict()
        check(state, {**old.shapes, **new.shapes}, {**old.dtypes, **new.dtypes}, f"{base} with {adapter}")
        for name, tensor in state.items():
            reader = new if name in new.shapes else old
            reader.read(name, into=tensor)
            if not is_finite(tensor):
                raise ValueError(f"{reader.where(name)}: not finite: {name} as {tensor.dtype}")
        if known_names.FILE in new.files:
            new.file(known_names.FILE)  # checked
            network.known_names = known_names.read_names(adapter / known_names.FILE)
    return network.eval()
