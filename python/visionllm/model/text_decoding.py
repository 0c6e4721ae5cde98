"""Words one after the other: the head that reads them; greedy, sampled, beam and grammar-bound decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.base_linear import frozen_product
from visionllm.model.copying import mixed
from visionllm.model.llm import row_dtype
from visionllm.ops import slot_head_cross_entropy
from visionllm.ops.choice import autocast, uses_operators
from visionllm.text_options import TextOptions

if TYPE_CHECKING:
    from visionllm.model.config import ModelConfig
    from visionllm.model.llm import KVCache
    from visionllm.model.network import Network


class Grammar(Protocol):
    """What text may be written, character by character."""

    def allows(self, text: str) -> bool:
        """Whether some allowed text begins so."""
        ...

    def complete(self, text: str) -> bool:
        """Whether the text may end here."""
        ...


class TextHead(nn.Module):
    """States [..., C] → logits over the vocabulary's pieces.

    config.llm_head: "query": a trained projection of the states against the embeddings; "tied": the states
    against the embeddings; "linear": the states against rows of the head's own, frozen unless fp32.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.llm_head
        self.scale = 1.0
        if self.kind == "query":
            self.query = nn.Linear(config.llm_dim, config.llm_dim, bias=False)
            self.scale = config.llm_dim**-0.5
        elif self.kind == "linear":
            dtype = row_dtype(config)
            rows = torch.empty(config.vocab_size, config.llm_dim, dtype=dtype)
            self.rows = nn.Parameter(rows, requires_grad=dtype == torch.float32)
            nn.init.normal_(self.rows, std=config.llm_dim**-0.5)

    def operands(self, states: Tensor, pieces: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied, [..., C] and [V, C]. Rows that are not fp32 are taken as they are."""
        query = self.query(states) if self.kind == "query" else states
        rows = self.rows[: len(pieces)] if self.kind == "linear" else pieces
        return (query if rows.dtype == torch.float32 else query.to(rows.dtype)), rows

    def forward(self, states: Tensor, pieces: Tensor) -> Tensor:
        """pieces: [V, C], the embeddings → fp32 [..., V]."""
        query, rows = self.operands(states, pieces)
        if rows.dtype != torch.float32 and not rows.requires_grad:
            logits = frozen_product(query, rows).float()
        else:
            logits = (query @ rows.to(query.dtype).T).float()
        return logits if self.scale == 1.0 else logits * self.scale

    def loss(self, states: Tensor, pieces: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy of each: states [n, C], pieces [V, C], wanted int64 [n] → [n]."""
        if not uses_operators(states):
            return F.cross_entropy(self(states, pieces), wanted, reduction="none")
        query, rows = self.operands(states, pieces)
        query = autocast(query) if rows.dtype == torch.float32 else query
        return slot_head_cross_entropy(query[None], rows, wanted[None], scale=self.scale)[0]


def decode_text(
    network: Network,
    cache: KVCache,
    options: TextOptions,
    on_text: Callable[[int, str], None] | None = None,
    grammar: Grammar | None = None,
    first: Tensor | None = None,
) -> list[str]:
    """One text for each row of the cache, which holds the prompts.

    Args:
        first: int64 [B], what is read behind the prompts; None: <bos>.
        on_text: called with (row, the text that has come since) while it comes.
        grammar: what may be written; decoding is then greedy.
    """
    if options.beams > 1 and grammar is None:
        return _beam_search(network, cache, options, first)
    rows = len(cache.mask)
    generator = torch.Generator(network.device).manual_seed(options.seed)
    written: list[list[int]] = [[] for _ in range(rows)]
    shown = [""] * rows
    open_rows = list(range(rows))
    last = torch.full((rows,), network.tokenizer.bos, device=network.device) if first is None else first
    for _ in range(options.max_tokens):
        logits = _next_logits(network, cache, last)  # [open rows, V]
        if grammar is not None:
            for i, row in enumerate(open_rows):
                _forbid(logits[i], network, written[row], grammar)
        chosen = _draw(logits, options, generator) if grammar is None else logits.argmax(-1)
        going = []
        for i, (row, piece) in enumerate(zip(open_rows, chosen.tolist(), strict=True)):
            if piece == network.tokenizer.eos:
                continue
            written[row].append(piece)
            going.append(i)
            if on_text is not None:
                text = network.tokenizer.decode(written[row])
                # A character of several bytes comes in several pieces, of which the first are none yet.
                if text.startswith(shown[row]) and not text.endswith("�") and text != shown[row]:
                    on_text(row, text[len(shown[row]) :])
                    shown[row] = text
        if not going:
            break
        last = chosen
        if len(going) < len(open_rows):
            kept = torch.tensor(going, device=network.device)
            cache.select(kept)
            last, open_rows = last[kept], [open_rows[i] for i in going]
    texts = [network.tokenizer.decode(ids) for ids in written]
    if on_text is not None:
        for row, text in enumerate(texts):
            if len(text) > len(shown[row]):
                on_text(row, text[len(shown[row]) :])
    return [text.strip() for text in texts]


def _next_logits(network: Network, cache: KVCache, last: Tensor) -> Tensor:
    """Reads one piece a row, int64 [B], and gives the logits of what follows, fp32 [B, V]."""
    there = torch.ones(len(last), 1, dtype=torch.bool, device=last.device)
    states = network.llm.read(network.word_embeddings(last[:, None]), there, cache, words=True)
    logits = network.text_head(states[:, 0], network.embedding.weight[: network.tokenizer.vocab_size])
    if cache.source is None:
        return logits
    chances, gate = network.copy_head(states, last[:, None], cache.source)
    return mixed(logits, chances[:, 0], gate[:, 0], cache.source.ids)


def _draw(logits: Tensor, options: TextOptions, generator: torch.Generator) -> Tensor:
    if options.temperature == 0:
        return logits.argmax(-1)
    chances, order = (logits / options.temperature).softmax(-1).sort(-1, descending=True)
    # The first piece always stays, the others while those before them do not reach top_p.
    chances = chances * (chances.cumsum(-1) - chances < options.top_p)
    return order.gather(1, torch.multinomial(chances, 1, generator=generator)).squeeze(1)


def _forbid(logits: Tensor, network: Network, ids: list[int], grammar: Grammar) -> None:
    """Sets the logits [V] of pieces that the grammar does not allow after the written ones to −inf."""
    tokenizer = network.tokenizer
    text = tokenizer.decode(ids)
    order = logits.argsort(descending=True).tolist()
    # Only the best allowed piece matters, so pieces are tried from the likeliest on.
    for piece in order:
        if piece == network.tokenizer.eos:
            allowed = grammar.complete(text)
        else:
            longer = tokenizer.decode([*ids, piece])
            allowed = longer != text and grammar.allows(longer)
        if allowed:
            logits.fill_(float("-inf"))
            logits[piece] = 0.0
            return
    raise ValueError(f"the grammar allows nothing after {text!r} that the tokenizer can write")


def _beam_search(
    network: Network, cache: KVCache, options: TextOptions, first: Tensor | None = None
) -> list[str]:
    """The text of the highest mean log-probability a piece among those that each row's beams found."""
    rows, width, device = len(cache.mask), options.beams, network.device
    cache.select(torch.arange(rows, device=device).repeat_interleave(width))
    ids: list[list[int]] = [[] for _ in range(rows * width)]
    # All beams of a row are the same at first: only one of them counts.
    totals = torch.full((rows, width), float("-inf"), device=device)
    totals[:, 0] = 0.0
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(rows)]
    last = torch.full((rows,), network.tokenizer.bos, device=device) if first is None else first
    last = last.repeat_interleave(width)
    for length in range(1, options.max_tokens + 1):
        steps = F.log_softmax(_next_logits(network, cache, last), -1).view(rows, width, -1)
        vocabulary = steps.shape[-1]
        best, index = (totals[..., None] + steps).flatten(1).topk(2 * width, dim=1)
        done = [len(found) >= width for found in finished]  # as if they had been asked alone
        parents, pieces = [], []
        for row in range(rows):
            kept: list[tuple[float, int, int]] = []
            for total, flat in zip(best[row].tolist(), index[row].tolist(), strict=True):
                parent, piece = row * width + flat // vocabulary, flat % vocabulary
                if piece == network.tokenizer.eos:
                    if not done[row]:
                        finished[row].append((total / length, ids[parent]))
                elif len(kept) < width:
                    kept.append((total, parent, piece))
            totals[row] = torch.tensor([total for total, _, _ in kept], device=device)
            parents += [parent for _, parent, _ in kept]
            pieces += [piece for _, _, piece in kept]
        ids = [[*ids[parent], piece] for parent, piece in zip(parents, pieces, strict=True)]
        cache.select(torch.tensor(parents, device=device))
        last = torch.tensor(pieces, device=device)
        if all(len(found) >= width for found in finished):
            break
    for row, found in enumerate(finished):
        if not found:  # nothing ended in time: the best that there is
            found.append((float(totals[row, 0]) / options.max_tokens, ids[row * width]))
    return [network.tokenizer.decode(max(found)[1]).strip() for found in finished]
