"""A network as a folder: config.json, model.safetensors, tokenizer.model, and known_names.txt if it has any.

Written whole, checked on load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.nn import init
from torch.overrides import TorchFunctionMode

from visionllm.atomic_file import replacing
from visionllm.model import known_names
from visionllm.model.config import ModelConfig
from visionllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from visionllm.model.network import Network

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
# torch.nn.init's functions, where they dispatch themselves, take their tensor by name.
RANDOM_FILLS = {
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    init.normal_,
    init.uniform_,
    init.kaiming_normal_,
    init.kaiming_uniform_,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def save_network(network: Network, directory: Path, dtype: torch.dtype | None) -> None:
    """Writes the folder's files; floating-point weights in the given type."""
    state = network.state_dict()
    tensors = {name: t.detach().cpu().to(dtype or t.dtype).contiguous() for name, t in state.items()}
    check_finite(tensors, "save_pretrained")  # after the cast: fp16 turns what it cannot hold into infinity
    for name, data in (
        (WEIGHTS, save(tensors, metadata={"format": "pt"})),
        (TOKENIZER, network.tokenizer.model),
        (CONFIG, network.config.to_json().encode()),
    ):
        with replacing(directory / name) as part:
            part.write_bytes(data)
    if network.known_names:
        with replacing(directory / known_names.FILE) as part:
            known_names.write_names(network.known_names, part)
    else:
        (directory / known_names.FILE).unlink(missing_ok=True)


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves tensors as they are where they would be filled at random: loading overwrites them.

    Building on the device "meta" would do the same, but torch imports its compiler and sympy for it: 1 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_network(network_class: type[Network], directory: Path) -> Network:
    """Builds the network that config.json describes and fills it; every weight becomes fp32."""
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"from_pretrained: {directory} has no {name}")
    config = ModelConfig.from_json((directory / CONFIG).read_bytes(), str(directory / CONFIG))
    tokenizer = Tokenizer.from_file(directory / TOKENIZER)
    try:
        state = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS}: not a safetensors file: {error}") from error
    with _NoRandomNumbers():
        network = network_class(config, tokenizer)
    check(network.state_dict(), state, str(directory / WEIGHTS))
    check_finite(state, str(directory / WEIGHTS))
    network.known_names = known_names.read_names(directory / known_names.FILE)
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return network.eval()


def check(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    """Compares names, shapes and types.

    Raises:
        ValueError: listing every difference (the first 20).
    """
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape:
            problems.append(
                f"{name}: expected shape {list(expected[name].shape)}, got {list(found[name].shape)}"
            )
        elif found[name].dtype not in FLOATS:
            problems.append(f"{name}: expected float32, bfloat16 or float16, got {found[name].dtype}")
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        raise ValueError(f"{where}: {len(problems)} differences from config.json's network:\n  {shown}")


def check_finite(tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raises ValueError naming the tensors that hold NaN or an infinity."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{where}: not finite: {', '.join(broken[:5])} ({len(broken)} in all)")
