"""Next-token cross-entropy of captions, answers and output formats (VisionLLM, App. B)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visionllm.tokenizer import PADDING, pad
from visionllm.train.losses import seen_in_training

if TYPE_CHECKING:
    from visionllm.data.mixture import TrainBatch
    from visionllm.model.network import Network
    from visionllm.tokenizer import Tokenizer

FORMAT_WEIGHT = 0.3  # of the output formats that are written beside captions and answers


def text_loss(network: Network, batch: TrainBatch) -> dict[str, Tensor]:
    """Captions or answers of a batch; and of instructions, without a picture, their output formats."""
    device = network.device
    prompts = network.tokenizer.prompts(batch.instructions, network.config.num_queries).to(device)
    text = network.encode_text(prompts)
    tokens = seen_in_training(network, batch, text)
    prefix = network.embed(prompts, tokens, named=True)
    lengths = (prompts.ids != PADDING).sum(1)
    loss, right = written_loss(network, prefix, lengths, batch.answers, batch.turns)
    losses = {"text": loss}
    if batch.formats:
        ids = network.tokenizer.text_ids([words for words, _ in batch.formats]).to(device)
        words = network.word_embeddings(ids)
        formats = [wanted for _, wanted in batch.formats]
        found, _ = written_loss(network, words, (ids != PADDING).sum(1), formats)
        losses["format"] = FORMAT_WEIGHT * found
    result = dict(losses)
    result["total"] = torch.stack(list(losses.values())).sum()
    result["metric/text_accuracy"] = right
    return result


def written_loss(
    network: Network,
    prefix: Tensor,
    lengths: Tensor,
    texts: list[str],
    turns: list[list[tuple[str, str]]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Of texts behind their prompts.

    Args:
        prefix: [B, P, C], prompts with their padding last; lengths: int64 [B], their tokens.
        turns: as `TrainBatch.turns`.

    Returns:
        the mean cross-entropy of a piece, and the share of pieces that are the likeliest (detached).
    """
    device, b = prefix.device, len(prefix)
    rows = [written_ids(network.tokenizer, *row) for row in zip(texts, turns or [[]] * b, strict=True)]
    given, wanted = (pad(part, PADDING).to(device) for part in zip(*rows, strict=True))  # [B, T]
    # The answer stands directly behind its prompt, where decoding puts it: rows are shifted together.
    p, t = prefix.shape[1], given.shape[1]
    order = torch.arange(p + t, device=device)
    behind = order - lengths[:, None]  # [B, P + T], position in the answer
    row = torch.arange(b, device=device)[:, None]
    words = network.word_embeddings(given).to(prefix.dtype)
    is_answer = (behind >= 0) & (behind < t)
    x = torch.where(
        is_answer[..., None], words[row, behind.clamp(0, t - 1)], prefix[row, order.clamp(max=p - 1)]
    )
    mask = order < lengths[:, None] + (given != PADDING).sum(1, keepdim=True)
    states, _ = network.llm(x, mask, x.new_zeros(b, 0, 1, x.shape[-1]))
    at = (lengths[:, None] + torch.arange(t, device=device)).clamp(max=p + t - 1)
    known = wanted != PADDING
    chosen = states[row, at][known]  # [n, C]
    pieces = network.embedding.weight[: network.tokenizer.vocab_size]
    loss = network.text_head.loss(chosen, pieces, wanted[known])
    with torch.no_grad():
        likeliest = network.text_head(chosen, pieces).argmax(-1)
    return loss, (likeliest == wanted[known]).float().mean()


def written_ids(
    tokenizer: Tokenizer, text: str, turns: list[tuple[str, str]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pieces that are read, [T], and what follows each where that is learned, [T]: answers, not questions."""
    ids = tokenizer.answer_ids(text)
    given, wanted = ids[:-1], ids[1:]
    for question, answer in turns:
        asked, ids = tokenizer.encode(question), tokenizer.answer_ids(answer)
        # <eos> is read too; then the question, whose pieces nobody has to guess.
        given += (tokenizer.eos, *asked, *ids[:-1])
        wanted += (PADDING,) * (1 + len(asked)) + ids[1:]
    return given, wanted
