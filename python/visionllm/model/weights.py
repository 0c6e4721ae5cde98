"""A network as a folder: config.json, weights, the tokenizer's files, and known_names.txt if it has any.

Written whole, checked on load (`visionllm.model.weight_files`). Loading needs the memory of the weights and
no more: the network is built without filling it, which takes none, and every tensor is read into its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from visionllm.model import known_names
from visionllm.model.config import ModelConfig
from visionllm.model.weight_files import ATTEMPTS, BASE, CONFIG, WeightsReader, WeightsWriter
from visionllm.tensor_file import is_finite
from visionllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from visionllm.model.network import Network

# torch.nn.init's functions, where they dispatch themselves, take their tensor by name.
RANDOM_FILLS = {
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.random_,
    init.normal_,
    init.uniform_,
    init.kaiming_normal_,
    init.kaiming_uniform_,
}
# Published weights that nothing trains, of an architecture that was made for products of 8 bits: written in 8
# bits wherever others are in 16.
PUBLISHED = tuple(
    f"image_tokenizer.{part}." for part in ("backbone.pretrained", "classifier.head", "classifier.classes")
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def save_network(network: Network, directory: Path, dtype: torch.dtype | None) -> None:
    """Writes the folder, whole or not at all.

    dtype: of floating-point weights; where it has 16 bits, `PUBLISHED` ones are rounded to 8. int8 stays.

    Raises:
        ValueError: a weight is not finite; after the cast: fp16 turns what it cannot hold into infinity.
        OSError: the disk is full, among others. What was there stays.
    """
    with WeightsWriter(directory) as writer:
        for name, data in network.tokenizer.files.items():
            writer.add_file(name, data)
        writer.add_file(CONFIG, network.config.to_json().encode())
        if network.known_names:
            writer.add_file(known_names.FILE, known_names.text_of(network.known_names).encode())
        for name, tensor in network.state_dict().items():
            # The scales of int8 rows are few, and carry the error of every value of theirs.
            casts = tensor.is_floating_point() and not name.endswith(".weight_scale")
            narrow = dtype in (torch.bfloat16, torch.float16)
            rounded = narrow and tensor.ndim > 1 and name.startswith(PUBLISHED)
            wanted = dtype if dtype and casts and not rounded else tensor.dtype
            writer.add(name, tensor.detach().to("cpu", wanted), rounded)


class NoRandomNumbers(TorchFunctionMode):
    """Leaves tensors as they are where they would be filled at random: loading overwrites them.

    Memory that nobody has written to is only an address (of 349 MB of weights, 10 MB were real), so that this
    is as good as building on the device "meta", for which torch imports its compiler and sympy: 1 s. Buffers
    that are no weights are made as always, and all tensors stay where they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_network(network_class: type[Network], directory: Path) -> Network:
    """Builds the network that config.json describes and fills it.

    Weights come in the types that the network has: fp32, but for a frozen base in ``config.base_dtype``.
    """
    for _ in range(ATTEMPTS):
        with WeightsReader(directory) as reader:
            network = _load(network_class, reader)
            if not reader.replaced:
                return network.eval()
    raise OSError(f"{directory}: replaced again and again while it was being read")


def _load(network_class: type[Network], reader: WeightsReader) -> Network:
    folder = reader.folder
    if BASE in reader.files:
        raise ValueError(
            f"{folder}: an adapter, not a model: load the model it was trained from, with this as adapter"
        )
    config = ModelConfig.from_json(reader.file(CONFIG, editable=True), str(folder / CONFIG))
    for name in reader.files.keys() - {CONFIG}:
        reader.file(name)  # checked
    tokenizer = Tokenizer.from_folder(folder)
    with NoRandomNumbers():
        network = network_class(config, tokenizer)
    state = network.state_dict()  # the network's own memory
    check(state, reader.shapes, reader.dtypes, str(folder))
    for name, tensor in state.items():
        reader.read(name, into=tensor)
        if not is_finite(tensor):
            raise ValueError(f"{reader.where(name)}: not finite: {name} as {tensor.dtype}")
    if known_names.FILE in reader.files:
        network.known_names = known_names.read_names(folder / known_names.FILE)
    return network


def check(
    expected: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    where: str,
) -> None:
    """Compares a folder's names, shapes and types with the network's.

    Floating-point types convert into each other; others, such as int8, must be the network's.

    Raises:
        ValueError: listing every difference (the first 20).
    """
    problems = [f"missing {name}" for name in expected.keys() - shapes.keys()]
    problems += [f"unexpected {name}" for name in shapes.keys() - expected.keys()]
    for name in expected.keys() & shapes.keys():
        wanted, found = expected[name], dtypes[name]
        if tuple(wanted.shape) != shapes[name]:
            problems.append(f"{name}: expected shape {list(wanted.shape)}, got {list(shapes[name])}")
        elif wanted.is_floating_point() and found not in FLOATS:
            problems.append(f"{name}: expected float32, bfloat16 or float16, got {found}")
        elif not wanted.is_floating_point() and found != wanted.dtype:
            problems.append(f"{name}: expected {str(wanted.dtype).removeprefix('torch.')}, got {found}")
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        raise ValueError(f"{where}: {len(problems)} differences from config.json's network:\n  {shown}")
