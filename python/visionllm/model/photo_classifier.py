"""What ImageNet's classifier, which has seen a million photos, calls the part of a photo inside a box.

A few hundred annotated photos cannot teach what eighty kinds of things look like. The trunk that is kept as
it was pretrained (`keep_pretrained`) comes with a classifier that knows most of them. Its last layers can
read the C5 of a whole photo, averaged over an image token's box; of the boxes most likely to be objects, the
whole of it looks once more, at the part of the original photo inside them:

    c     = mean of ReLU6(head C5) of that part; of the other boxes f
    f     = mean of ReLU6(head C5) of the photo over the box; g = the same over the whole photo
    s_n   = log of the sum of softmax(classes ·) over the ImageNet classes that are called n, at least FLOOR,
            of c and of f: the mean of both
    names = softmax over all n and "nothing" of (rows [c, f, g, place of the box])_n + GAIN s_n

The rows are fitted on annotated photos (train/photo_classifier.py, which also measures what each part is good
for); of names that ImageNet lacks, such as "giraffe", they are all there is. What the whole photo looks like
and where in it a box lies tells them much: skis are found below people, on snow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.image import cut_out
from visionllm.model.backbone import OUTPUT_CHANNELS, EfficientNetLite, fold_batch_norm
from visionllm.model.boxes import cxcywh_to_xyxy, distinct
from visionllm.model.convolution import Convolution

if TYPE_CHECKING:
    from visionllm.model.config import ModelConfig
    from visionllm.model.image_tokenizer import ImageTokens

CHANNELS, CLASSES = 1280, 1000  # EfficientNet-Lite0's last layer, and ImageNet's classes
PARTS = (CHANNELS, CHANNELS, CHANNELS, 5)  # c, f, g and `place`
CLOSER_SIDE = 96  # pixels of a part of a photo: 1 ms each; of 160 pixels, 2.7 ms, they name a little better
CLOSER_LEAST = 1 / 80  # of a part's sides, of the photo's
CLOSER_BATCH = 16  # parts at once
REPEATS = 0.8  # IoU from which on one look does for two boxes
FLOOR, GAIN = -9.0, 0.4
LEAST_SIDE = 1e-3  # of a box, in cells of C5, and of the photo where its logarithm is taken


class PhotoClassifier(nn.Module):
    """Part of a network with ``config.classifier_names``; never trained with it."""

    members: Tensor

    def __init__(self, names: int) -> None:
        super().__init__()
        self.head = Convolution(OUTPUT_CHANNELS[-1], CHANNELS, 1)
        self.classes = nn.Linear(CHANNELS, CLASSES)
        self.rows = nn.Linear(sum(PARTS), names + 1)  # the last one is "nothing"
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

    def cells(self, c5: Tensor) -> Tensor:
        """Pretrained C5 [B, C, h, w] → ReLU6(head C5), fp32 [B, CHANNELS, h, w]."""
        return self.head(c5, relu6=True).float()

    def from_afar(self, cells: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f, g and place, [B, M or 1, of PARTS], of cells [B, CHANNELS, h, w] and boxes [B, M, 4] cxcywh."""
        boxes = boxes.float()
        # A mean in bfloat16 would be off by a hundredth.
        with torch.autocast(cells.device.type, enabled=False):
            return averaged(cells, boxes), cells.mean((2, 3))[:, None], place(boxes)

    def told(self, closer: Tensor, inside: Tensor) -> Tensor:
        """GAIN s, [..., names + 1], of c and f [..., CHANNELS]; that of "nothing" is GAIN FLOOR."""
        both, looked_at = self._named_classes(inside), (closer != inside).any(-1)  # elsewhere c is f
        both[looked_at] = (both[looked_at] + self._named_classes(closer[looked_at])) / 2
        return GAIN * both

    def _named_classes(self, features: Tensor) -> Tensor:
        """s of features [..., CHANNELS] alone, [..., names + 1]."""
        of_name = F.one_hot(self.members.long(), len(self.rows.bias)).to(features.dtype)
        of_name[:, -1] = 0  # [CLASSES, names + 1]
        shares = F.linear(features, self.classes.weight, self.classes.bias).softmax(-1)
        return (shares @ of_name).log().clamp(min=FLOOR)

    def forward(self, closer: Tensor, inside: Tensor, whole: Tensor, where: Tensor) -> Tensor:
        """c, f, g and place → probabilities of the names and of "nothing", [B, M, names + 1]."""
        logits = self.rows.bias + self.told(closer, inside)
        parts = (closer, inside, whole, where)
        for part, weight in zip(parts, self.rows.weight.split(PARTS, 1), strict=True):
            logits = logits + F.linear(part, weight)
        return logits.softmax(-1)

    def look(self, trunk: EfficientNetLite, photo: np.ndarray, boxes: Tensor) -> Tensor:
        """c of boxes in a photo, fp32 [n, CHANNELS].

        Args:
            trunk: with pretrained stages.
            photo: uint8 [H, W, 3], as it was before any resizing; boxes: [n, 4] cxcywh in 0..1.
        """
        corners = cxcywh_to_xyxy(boxes.float()).cpu().numpy()
        parts = torch.from_numpy(cut_out(photo, corners, CLOSER_SIDE, CLOSER_LEAST)).to(boxes.device)
        rows = [self.cells(trunk.pretrained_c5(part)).mean((2, 3)) for part in parts.split(CLOSER_BATCH)]
        return torch.cat(rows)


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


def call_boxes(
    config: ModelConfig,
    trunk: EfficientNetLite,
    classifier: PhotoClassifier,
    tokens: ImageTokens,
    listed: Sequence[Sequence[str]],
    originals: Sequence[np.ndarray] | None = None,
) -> Tensor | None:
    """What the classifier calls the M queries' last boxes, [B, M, names + 1], for `ImageTokens.called`.

    Args:
        listed: the names that each picture's boxes may be called.
        originals: the pictures before resizing, uint8 [H, W, 3]; None: there is no closer look.

    Returns:
        None where no picture may be a photo, no listed name is known, or it has no say.
    """
    known = {name.casefold() for name in config.classifier_names}
    asked = [any(name.casefold() in known for name in names) for names in listed]
    if tokens.pretrained_c5 is None or config.classifier_power == 0 or not any(asked):
        return None
    assert tokens.drawing is not None
    boxes, objectness = (one[-1][:, : config.num_queries] for one in (tokens.boxes, tokens.objectness))
    inside, whole, where = classifier.from_afar(classifier.cells(tokens.pretrained_c5), boxes)
    if originals is None or config.classifier_boxes == 0:
        return classifier(inside, inside, whole, where)
    closer = inside.clone()
    for b, photo in enumerate((tokens.drawing <= 0).tolist()):
        if photo and asked[b]:
            chosen, which = distinct(boxes[b], objectness[b], config.classifier_boxes, REPEATS)
            looked = classifier.look(trunk, originals[b], boxes[b, chosen])
            closer[b, which >= 0] = looked[which[which >= 0]]
    return classifier(closer, inside, whole, where)


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
