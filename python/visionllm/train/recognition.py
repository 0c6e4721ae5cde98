"""Recognition: the pyramid's features at every known object against the text features of all names.

Detection learns boxes long before it learns what things are called, and pays for encoder, decoder and LLM at
every picture. This objective runs the backbone, its lateral projections and the text encoder alone, at six
times the pictures a second, and asks for more at each: every object, listed or not, against every name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionllm.model.image_tokenizer import two_stage
from visionllm.ops import ms_deform_attn, ms_deform_attn_reference
from visionllm.ops.choice import uses_operators
from visionllm.train.losses import pad_boxes, router_loss

if TYPE_CHECKING:
    from visionllm.data.train_batch import TrainBatch
    from visionllm.model.network import Network

# Four points per scale, in box sizes from the centre: where an object's own pixels are likely.
SAMPLE_POINTS = ((-0.2, -0.2), (0.2, -0.2), (-0.2, 0.2), (0.2, 0.2))


def recognition_loss(network: Network, batch: TrainBatch, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Cross-entropy over names at the objects of a batch.

    Args:
        names: all class names of the training data.

    Returns:
        "recognition", "router" where the network has one, "total" (their sum), and the detached
        "metric/name_accuracy".

    Raises:
        ValueError: the batch has an object whose name is not among the names.
    """
    device = network.device
    row = {name: i for i, name in enumerate(names)}
    boxes, wanted = [], []
    for b, instruction in enumerate(batch.instructions):
        found = [instruction.classes[label] for label in batch.labels[b]] + batch.unlisted_names[b]
        missing = sorted(set(found) - row.keys())
        if missing:
            raise ValueError(f"recognition: expected a name among the {len(names)} given, got {missing[0]!r}")
        boxes.append(np.concatenate([batch.boxes[b], batch.unlisted[b]]))
        wanted.append([row[name] for name in found])
    objects, valid = pad_boxes(boxes, device)  # [B, N, 4], [B, N]

    tokenizer = two_stage(network.image_tokenizer, "recognition")
    drawings = ~torch.tensor(batch.photo, device=device)
    scales, drawing, _ = tokenizer.pyramid(torch.from_numpy(batch.images).to(device), drawings)
    shapes, starts, positions = tokenizer.flatten(scales)
    points = torch.tensor(SAMPLE_POINTS, device=device)
    locations = objects[:, :, None, :2] + points * objects[:, :, None, 2:]  # [B, N, P, 2]
    heads, levels = network.config.heads, len(scales)
    locations = locations[:, :, None, None].expand(-1, -1, heads, levels, -1, -1)
    weights = torch.full(locations.shape[:-1], 1 / (levels * len(SAMPLE_POINTS)), device=device)
    value = positions.float().unflatten(-1, (heads, -1))
    attend = ms_deform_attn if uses_operators(value) else ms_deform_attn_reference
    at_objects = attend(value, shapes, starts, locations.contiguous(), weights)  # [B, N, C]

    features = network.alignment["encoder"](tokenizer.encoder_norm(at_objects[valid]))
    ids = network.tokenizer.name_ids(names)
    text = network.encode_names(ids.to(device))
    logits = (features @ text.to(features.dtype).T).float() * text.shape[-1] ** -0.5
    rows = torch.tensor([i for rows in wanted for i in rows], device=device)
    if len(rows) == 0:
        loss = logits.sum() * 0.0  # without objects it still takes part in the exchange of gradients
    else:
        loss = F.cross_entropy(logits, rows, label_smoothing=0.05)
    losses = {"recognition": loss}
    if drawing is not None:
        losses["router"] = router_loss(drawing, drawings)
    hits = (logits.detach().argmax(-1) == rows).float()
    return {
        **losses,
        "total": torch.stack(list(losses.values())).sum(),
        "metric/name_accuracy": hits.mean() if len(rows) else torch.zeros((), device=device),
    }
