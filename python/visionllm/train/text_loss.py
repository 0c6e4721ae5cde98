"""Next-token cross-entropy of captions, answers and output formats (VisionLLM, App. B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visionllm.model.copying import CopySource, copyable, mixed, mixed_loss
from visionllm.model.told import told_of
from visionllm.model.word_tokens import colours_at
from visionllm.tokenizer import PADDING, pad
from visionllm.train.losses import seen_in_training

if TYPE_CHECKING:
    from visionllm.data.train_batch import TrainBatch
    from visionllm.model.image_tokenizer import ImageTokens
    from visionllm.model.network import Network
    from visionllm.model.told import Told
    from visionllm.tokenizer import Prompts, Tokenizer

FORMAT_WEIGHT = 0.3  # of the output formats that are written beside captions and answers


@dataclass
class Seen:
    """What words need of a batch's pictures.

    Attributes:
        tokens: of its image tokens the features, last boxes and last objectness (the rest is empty).
        colours: [B, M, 3 · COLOUR_GRID²], of `colours_at`.
    """

    tokens: ImageTokens
    colours: Tensor


def text_loss(network: Network, batch: TrainBatch) -> dict[str, Tensor]:
    """Captions or answers of a batch; and of instructions, without a picture, their output formats."""
    device = network.device
    prompts = network.tokenizer.prompts(batch.instructions, network.config.num_queries).to(device)
    seen = batch.seen or see(network, batch, prompts)
    prefix = network.embed(prompts, seen.tokens)
    lengths = (prompts.ids != PADDING).sum(1)
    given, wanted = written(network, batch.answers, batch.turns)
    asked = given.masked_fill(wanted != PADDING, PADDING)  # further questions; answers are not read for names
    told = told_of(network, prompts, seen.tokens, seen.colours, asked)
    loss, right = written_loss(network, prefix, lengths, given, wanted, told, prompts.ids)
    losses = {"text": loss}
    if batch.formats:
        ids = network.tokenizer.text_ids([words for words, _ in batch.formats]).to(device)
        words = network.word_embeddings(ids)
        formats = written(network, [wanted for _, wanted in batch.formats])
        found, _ = written_loss(network, words, (ids != PADDING).sum(1), *formats)
        losses["format"] = FORMAT_WEIGHT * found
    result = dict(losses)
    result["total"] = torch.stack(list(losses.values())).sum()
    result["metric/text_accuracy"] = right
    return result


def see(network: Network, batch: TrainBatch, prompts: Prompts) -> Seen:
    """The batch's pictures, in training; kept with a batch that comes again, where nothing of it changes."""
    parts = (network.text_encoder, network.image_tokenizer)
    frozen = not any(p.requires_grad for part in parts for p in part.parameters())
    was_training = network.image_tokenizer.training
    network.image_tokenizer.train(was_training and not frozen)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        tokens = seen_in_training(network, batch, network.encode_text(prompts))
        images = torch.from_numpy(batch.images).to(network.device)
        sizes = None if batch.sizes is None else torch.from_numpy(batch.sizes)
        seen = Seen(tokens, colours_at(images, tokens.boxes[-1].detach(), sizes))
    network.image_tokenizer.train(was_training)
    if frozen and batch.comes_again:
        # The same the first time as when it comes again: a resumed run meets another first time.
        batch.seen = seen = Seen(tokens.of_last_layer(), seen.colours.half())
    return seen


def written_loss(
    network: Network,
    prefix: Tensor,
    lengths: Tensor,
    given: Tensor,
    wanted: Tensor,
    told: Told | None = None,
    prompt_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of texts behind their prompts.

    Args:
        prefix: [B, P, C], prompts with their padding last; lengths: int64 [B], their tokens.
        given, wanted: int64 [B, T], of `written`; told: of `told_of`.
        prompt_ids: int64 [B, P], of prompts that answers may copy from; None: they may not.

    Returns:
        the mean cross-entropy of a piece, those of a text of n pieces weighing 1 / √n: neither the many of a
        caption nor the few of an answer drown the others; and the share of pieces that are the likeliest
        (detached).
    """
    device, (b, p), t = prefix.device, prefix.shape[:2], given.shape[1]
    # The answer stands directly behind its prompt, where decoding puts it.
    x = joined(prefix, network.word_embeddings(given).to(prefix.dtype), lengths)
    mask = torch.arange(p + t, device=device) < lengths[:, None] + (given != PADDING).sum(1, keepdim=True)
    states, _ = network.llm(x, mask, x.new_zeros(b, 0, 1, x.shape[-1]), words=True, seen=told)
    at = (lengths[:, None] + torch.arange(t, device=device)).clamp(max=p + t - 1)
    answers = states[torch.arange(b, device=device)[:, None], at]  # [B, T, C]
    known = wanted != PADDING
    pieces = network.embedding.weight[: network.tokenizer.vocab_size]
    weight = text_weights(wanted)[known]
    losses = network.text_head.loss(answers[known], pieces, wanted[known])
    with torch.no_grad():
        logits = network.text_head(answers[known], pieces)
    if prompt_ids is not None and network.config.word_layers:
        source, mask = copy_source(network, states, prompt_ids, lengths, given, wanted)
        chances, gate = network.copy_head(answers, given, source, mask)
        chances, gate, ids = chances[known], gate[known], source.ids[known.nonzero()[:, 0]]
        copied = (chances * (ids == wanted[known][:, None])).sum(1)
        losses = mixed_loss(losses, copied, gate)
        logits = mixed(logits, chances.detach(), gate.detach(), ids)
    loss = (losses * weight).sum() / weight.sum()
    return loss, (logits.argmax(-1) == wanted[known]).float().mean()


def joined(first: Tensor, second: Tensor, lengths: Tensor) -> Tensor:
    """Rows [B, T, ...] directly behind the first `lengths` [B] entries of rows [B, P, ...] → [B, P + T, ...].

    What was behind those entries, their padding, comes last.
    """
    p, t = first.shape[1], second.shape[1]
    order = torch.arange(p + t, device=first.device)
    behind = order - lengths[:, None]  # [B, P + T], place in the second
    place = torch.where(behind < 0, order, torch.where(behind < t, p + behind, order - t))
    return torch.cat([first, second], 1)[torch.arange(len(first), device=first.device)[:, None], place]


def copy_source(
    network: Network, states: Tensor, prompt_ids: Tensor, lengths: Tensor, given: Tensor, wanted: Tensor
) -> tuple[CopySource, Tensor]:
    """What answers may copy from: each from the question of its own turn.

    Args:
        states: [B, P + T, C], of prompts and answers as `joined`; the others: as for `written_loss`.

    Returns:
        all places, and bool [B, T, P + T], which of them may be copied behind each piece that is given.
    """
    tokenizer = network.tokenizer
    ids = joined(prompt_ids, given, lengths)
    turn = (given == tokenizer.eos).cumsum(1)  # [B, T]
    asked = joined(torch.ones_like(prompt_ids), (wanted == PADDING).long(), lengths).bool()
    asked &= copyable(ids, tokenizer) & (ids != tokenizer.eos)
    of_turn = joined(torch.zeros_like(prompt_ids), turn, lengths)
    may = asked[:, None] & (of_turn[:, None] == turn[..., None])
    return CopySource(ids, asked, network.copy_head.keys(states)), may


def text_weights(wanted: Tensor) -> Tensor:
    """1 / √n for the pieces of a text of n: pieces [B, T] with PADDING around every text → [B, T]."""
    known = (wanted != PADDING).long()
    starts = known - F.pad(known, (1, 0))[:, :-1] > 0
    which = (starts.cumsum(1) * known).clamp(min=0)  # 0: no text
    counts = torch.zeros(len(wanted), int(which.max()) + 1, device=wanted.device)
    counts = counts.scatter_add(1, which, torch.ones_like(wanted, dtype=counts.dtype))
    return counts.gather(1, which).rsqrt() * known


def written(
    network: Network, texts: list[str], turns: list[list[tuple[str, str]]] | None = None
) -> tuple[Tensor, Tensor]:
    """Pieces that are read, [B, T], and what follows each where that is learned; PADDING elsewhere.

    turns: as `TrainBatch.turns`.
    """
    rows = zip(texts, turns or [[]] * len(texts), strict=True)
    ids = [written_ids(network.tokenizer, *row) for row in rows]
    given, wanted = (pad(part, PADDING).to(network.device) for part in zip(*ids, strict=True))
    return given, wanted


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
