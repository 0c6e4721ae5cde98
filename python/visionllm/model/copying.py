"""Words that an answer takes over from its question: "which is larger, the cat or the dog?" — "dog".

An LLM of a few layers learns a vocabulary's pieces long before it learns to repeat any that it was given. So
next to the vocabulary's chances stand those of a pointer into the text that was asked (See et al.,
arXiv:1704.04368), and a gate says which of the two a piece comes from. What stood behind the piece that was
copied last is likelier from the start, so that a name, once begun, is written to its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.config import ModelConfig

if TYPE_CHECKING:
    from visionllm.tokenizer import Tokenizer

COPY_DIM = 16
GATE_CLOSED = -8.0  # logit of "copied" at the start: nothing changes by it, and it can be learned
FOLLOW = 4.0  # logit at the start of what stood behind the last piece
LEAST = 1e-12  # chance of a piece that stands nowhere


@dataclass
class CopySource:
    """The text that answers may copy from.

    Attributes:
        ids: int64 [B, S], its pieces in order; mask: bool [B, S], which of them may be copied.
        keys: [B, S, COPY_DIM], of `CopyHead.keys`.
    """

    ids: Tensor
    mask: Tensor
    keys: Tensor

    def select(self, rows: Tensor) -> CopySource:
        """The rows [n] in this order; a row may be taken several times."""
        return CopySource(self.ids[rows], self.mask[rows], self.keys[rows])


class CopyHead(nn.Module):
    """States of the LLM → the chances of pieces that stand in a text, and of copying at all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.llm_dim, COPY_DIM, bias=False)
        self.key = nn.Linear(config.llm_dim, COPY_DIM, bias=False)
        self.gate = nn.Linear(config.llm_dim, 1)
        self.follow = nn.Parameter(torch.tensor([FOLLOW]))
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, GATE_CLOSED)

    def keys(self, states: Tensor) -> Tensor:
        """[B, S, C], of the text to copy from → [B, S, COPY_DIM]."""
        return self.key(states)

    def forward(
        self, states: Tensor, last: Tensor, source: CopySource, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What comes behind T places.

        Args:
            states: [B, T, C]; last: int64 [B, T], the pieces that were read there.
            mask: bool [B, T, S], what each place may copy; None: what the source says.

        Returns:
            fp32 [B, T, S], the chances of the source's pieces, and [B, T], the logit of copying; both are
            those of never where there is nothing to copy.
        """
        mask = source.mask[:, None] if mask is None else mask
        scores = (self.query(states) @ source.keys.transpose(1, 2)).float() * COPY_DIM**-0.5
        before = F.pad(source.ids, (1, -1), value=-1)
        scores = scores + self.follow.float() * (before[:, None] == last[..., None])
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        chances = scores.softmax(-1) * mask
        gate = self.gate(states).squeeze(-1).float()
        return chances, torch.where(mask.any(-1), gate, torch.finfo(gate.dtype).min)


def copyable(ids: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Which of a prompt's tokens [..., P] are pieces of its text: no image, class or padding tokens."""
    return (ids >= 0) & (ids < tokenizer.vocab_size) & (ids != tokenizer.bos)


def mixed(logits: Tensor, chances: Tensor, gate: Tensor, ids: Tensor) -> Tensor:
    """Log-chances of a vocabulary's pieces, written or copied, of n places: fp32 [n, V].

    Args:
        logits: fp32 [n, V], of the text head; chances: [n, S] and gate: [n], of `CopyHead`.
        ids: int64 [n, S], the pieces that the chances are of.
    """
    ids = ids.clamp(0, logits.shape[-1] - 1)  # what is no piece has no chance
    copied = torch.zeros_like(logits).scatter_add(1, ids, chances)
    written = F.logsigmoid(-gate)[:, None] + logits.log_softmax(-1)
    return torch.logaddexp(written, F.logsigmoid(gate)[:, None] + copied.clamp(min=LEAST).log())


def mixed_loss(loss: Tensor, copied: Tensor, gate: Tensor) -> Tensor:
    """Minus the log-chance of one piece each, of n places.

    Args:
        loss: [n], what it would be without copying; copied: [n], the chance that it is the one copied.
        gate: [n], of `CopyHead`.
    """
    return -torch.logaddexp(F.logsigmoid(-gate) - loss, F.logsigmoid(gate) + copied.clamp(min=LEAST).log())
