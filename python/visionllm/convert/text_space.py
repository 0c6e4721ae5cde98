"""A detector that read one text encoder reads another: names keep their meaning.

The text features of the names that the detector's model knows are a cloud of points in either encoder's
space. A ridge regression takes the new points to the old ones, t ≈ W m + b; it goes into the linear layers
that text features meet: what the language fusion makes of them, and what image tokens are compared with. On
names that the model never knew it says little: those are to be learned.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from visionllm.model.image_tokenizer import two_stage
from visionllm.model.network import Network

RIDGE = 0.1  # of the mean variance; from 0.03 to 0.2 image tokens were named equally well


@torch.no_grad()
def carry_names(old: Network, new: Network) -> float:
    """Has the new network's image tokenizer, which is the old one's, read its own text encoder's features.

    Returns:
        the share of the old features' variance that the regression explains.

    Raises:
        ValueError: the old network knows no names.
    """
    if not old.known_names:
        raise ValueError("carry_names: expected a network with known names, got none")
    new.known_names = old.known_names
    networks = (old.eval(), new.eval())  # the new one's LLM has no memory yet
    targets, points = (n.encode_names(n.tokenizer.name_ids(n.known_names)).double() for n in networks)
    middle, wanted_middle = points.mean(0), targets.mean(0)
    x, y = points - middle, targets - wanted_middle
    square = x.T @ x
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    w = torch.linalg.solve(square, x.T @ y)  # [C_new, C_old]
    b = wanted_middle - middle @ w
    read, reads = (two_stage(n.image_tokenizer, "carry_names").fusion.key_value for n in (old, new))
    weight = read.weight.double()
    reads.weight.copy_(weight @ w.T)
    reads.bias.copy_(read.bias.double() + weight @ b)
    # Likenesses are divided by the root of the text features' size.
    scale = (len(w) / w.shape[1]) ** 0.5
    for part in new.alignment:
        known, linear = (cast(nn.Linear, n.alignment[part]) for n in (old, new))
        linear.weight.copy_(scale * (w @ known.weight.double()))
        linear.bias.copy_(scale * (w @ known.bias.double()))
    return float(1 - (x @ w - y).square().sum() / y.square().sum())
