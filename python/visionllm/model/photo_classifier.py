"""What ImageNet's classifier, which has seen a million photos, calls the part of a photo inside a box.

A few hundred annotated photos cannot teach what eighty kinds of things look like. The trunk that is kept as
it was pretrained (`keep_pretrained`) comes with a classifier that knows most of them, and its last layers can
read the C5 of a whole photo as well, averaged over an image token's box:

    f     = mean of ReLU6(head C5) over the box; g = the same over the whole photo
    s_n   = log of the sum of softmax(classes f) over the ImageNet classes that are called n, at least FLOOR
    names = softmax over all n and "nothing" of (rows [f, g, place of the box])_n + GAIN s_n

The rows are fitted on annotated photos (train/photo_classifier.py, which also measures what each part is good
for); of names that ImageNet lacks, such as "giraffe", they are all there is. What the whole photo looks like
and where in it a box lies tells them much: skis are found below people, on snow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.backbone import OUTPUT_CHANNELS, fold_batch_norm
from visionllm.model.boxes import cxcywh_to_xyxy
from visionllm.model.convolution import Convolution

if TYPE_CHECKING:
    from visionllm.model.config import ModelConfig
    from visionllm.model.image_tokenizer import ImageTokens

CHANNELS, CLASSES = 1280, 1000  # EfficientNet-Lite0's last layer, and ImageNet's classes
FEATURES = 2 * CHANNELS + 5  # f, g and `place`
FLOOR, GAIN = -9.0, 0.4
LEAST_SIDE = 1e-3  # of a box, in cells of C5, and of the photo where its logarithm is taken


class PhotoClassifier(nn.Module):
    """Part of a network with ``config.classifier_names``; never trained with it."""

    members: Tensor

    def __init__(self, names: int) -> None:
        super().__init__()
        self.head = Convolution(OUTPUT_CHANNELS[-1], CHANNELS, 1)
        self.classes = nn.Linear(CHANNELS, CLASSES)
        self.rows = nn.Linear(FEATURES, names + 1)  # the last one is "nothing"
        nn.init.zeros_(self.rows.weight)
        nn.init.zeros_(self.rows.bias)
        # Which name an ImageNet class bears; that of "nothing" where it bears none.
        self.register_buffer("members", torch.full((CLASSES,), names, dtype=torch.int16))
        self.requires_grad_(False)

    def load_imagenet(self, state: Mapping[str, Tensor], epsilon: float = 1e-3) -> None:
        """Takes the last layers of a published EfficientNet-Lite0 state dict; the others are the trunk's.

        Raises:
            KeyError, RuntimeError: a name is missing or a shape differs.
        """
        fold_batch_norm(self.head, state, "_conv_head", "_bn1", epsilon)
        with torch.no_grad():
            self.classes.weight.copy_(state["_fc.weight"])
            self.classes.bias.copy_(state["_fc.bias"])

    def features(self, c5: Tensor, boxes: Tensor) -> Tensor:
        """[f, g, place], [B, M, FEATURES], of pretrained C5 [B, C, h, w] and boxes [B, M, 4], see `place`."""
        cells, boxes = self.head(c5, relu6=True).float(), boxes.float()
        whole = cells.mean((2, 3))[:, None].expand(-1, boxes.shape[1], -1)
        return torch.cat([averaged(cells, boxes), whole, place(boxes)], -1)

    def told(self, features: Tensor) -> Tensor:
        """GAIN s, [..., names + 1], of features [..., FEATURES]; that of "nothing" is GAIN FLOOR."""
        shares = F.linear(features[..., :CHANNELS], self.classes.weight, self.classes.bias).softmax(-1)
        of_name = F.one_hot(self.members.long(), len(self.rows.bias)).to(shares.dtype)  # [CLASSES, names + 1]
        of_name[:, -1] = 0
        return GAIN * (shares @ of_name).log().clamp(min=FLOOR)

    def forward(self, c5: Tensor, boxes: Tensor) -> Tensor:
        """C5 and boxes as for `features` → probabilities of the names and of "nothing", [B, M, names + 1]."""
        features = self.features(c5, boxes)
        return (F.linear(features, self.rows.weight, self.rows.bias) + self.told(features)).softmax(-1)


def place(boxes: Tensor) -> Tensor:
    """[..., 5], of boxes [..., 4] cxcywh in 0..1: centres, logarithms of sides and of their ratio."""
    sides = boxes[..., 2:].clamp(min=LEAST_SIDE).log()
    return torch.cat([boxes[..., :2], sides, sides[..., :1] - sides[..., 1:]], -1)


def averaged(features: Tensor, boxes: Tensor) -> Tensor:
    """Means of features [B, C, h, w] over boxes [B, M, 4] (cxcywh in 0..1), [B, M, C].

    Cells that a box covers in part count in part; of a box without extent, the cell that it lies in counts.
    """
    height, width = features.shape[-2:]
    corners = cxcywh_to_xyxy(boxes).clamp(0, 1)
    across = _covered(corners[..., 0] * width, corners[..., 2] * width, width)
    down = _covered(corners[..., 1] * height, corners[..., 3] * height, height)
    weights = (down[..., :, None] * across[..., None, :]).flatten(2)  # [B, M, h w]
    return weights @ features.flatten(2).transpose(1, 2)


def _covered(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """[B, M] from where to where → [B, M, cells], which share of what is covered lies in which cell."""
    start = start.clamp(max=cells - LEAST_SIDE)
    end = torch.maximum(end, start + LEAST_SIDE)
    cell = torch.arange(cells, device=start.device, dtype=start.dtype)
    inside = torch.minimum(end[..., None], cell + 1) - torch.maximum(start[..., None], cell)
    return inside.clamp(min=0) / (end - start)[..., None]


def chances(called: Tensor, names: Sequence[str], listed: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """How likely a box is what is listed, by the classifier.

    A name that it does not know is as likely as none of the listed ones that it knows.

    Args:
        called: [B, M, names + 1], of `PhotoClassifier`.
        names: the classifier's. listed: those of each picture; case does not count.

    Returns:
        fp32 [B, M, K], K the most names of a list, behind a shorter one 0; and bool [B], whether the
        classifier knows any of a picture's names.
    """
    row = {name.casefold(): n for n, name in enumerate(names)}
    unknown, missing = len(names), len(names) + 1
    rows = torch.full((len(listed), max(map(len, listed), default=0)), missing)
    for b, asked in enumerate(listed):
        found = [row.get(name.casefold(), unknown) for name in asked]
        rows[b, : len(found)] = torch.tensor(found, dtype=torch.int64)
    known = torch.zeros(len(listed), len(names) + 2).scatter_(1, rows, 1.0)[:, : len(names)]
    rows, known = rows.to(called.device), known.to(called.device)
    own = called[..., :-1]
    other = (1 - (own * known[:, None]).sum(-1, keepdim=True)).clamp(0, 1)  # [B, M, 1]
    columns = torch.cat([own, other, torch.zeros_like(other)], -1)
    return columns.gather(2, rows[:, None].expand(-1, called.shape[1], -1)), known.sum(1) > 0


def renamed(
    config: ModelConfig, tokens: ImageTokens, listed: Sequence[Sequence[str]], probabilities: Tensor
) -> Tensor:
    """Class probabilities after a word of the classifier, where it knows any of the listed names:

        p'_k = (sum of p) · p_k^(1 − w) q_k^w / (sum of these), w = `ModelConfig.classifier_power`

    Whether there is an object at all stays as it was: as a factor of the score q cost as much AP of photos as
    better names brought, as it raises what is nothing and looks a little like something rare. Drawings stay
    as they were, too.

    Args:
        listed: the names of each picture.
        probabilities: [B, M, K], of these names, without "no object".
    """
    if tokens.called is None or config.classifier_power == 0:
        return probabilities
    assert tokens.drawing is not None
    q, knows = chances(tokens.called, config.classifier_names, listed)
    both = probabilities ** (1 - config.classifier_power) * q**config.classifier_power
    both = both * (probabilities.sum(-1, keepdim=True) / both.sum(-1, keepdim=True).clamp(min=1e-12))
    says = knows & (tokens.drawing <= 0)  # [B]
    return torch.where(says[:, None, None], both, probabilities)
