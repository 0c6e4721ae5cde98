"""LLaMA-style decoder (RMSNorm, RoPE, SwiGLU, grouped KV; Touvron et al., 2302.13971), LoRA, parallel groups.

A pass takes a causal prefix and, after it, G groups of S slots. Each slot attends to the whole prefix and
causally to its own group; slot j of every group has position P + j, so that groups are exchangeable and one
pass decodes them all. Words are decoded one after the other over a cache of keys and values (`KVCache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.model.attention import attention
from visionllm.model.base_linear import DTYPES, NONE, OWN, BaseLinear
from visionllm.model.config import ModelConfig
from visionllm.model.lora import Adapter, LoRALinear
from visionllm.ops import query_attention
from visionllm.ops.choice import uses_operators

if TYPE_CHECKING:
    from visionllm.model.copying import CopySource
    from visionllm.model.told import Told

# Layers for words that start with a head that matches words, and the scale of its weights: a half of the same
# direction then gets a logit of about 4.
MATCHING_LAYERS, MATCHING_STD = 2, 2.2
DEFAULT_ADAPTER = "default"  # the network's own, that training changes


def row_dtype(config: ModelConfig) -> torch.dtype:
    """Of embeddings and of the head's rows: as the base, but bf16 beside int8, as a row is read alone."""
    return torch.bfloat16 if config.base_dtype == "int8" else DTYPES[config.base_dtype]


def base_embedding(config: ModelConfig) -> nn.Embedding:
    """Rows of the vocabulary's pieces [V, C]: trained in fp32, else frozen as the LLM's base."""
    dtype = row_dtype(config)
    embedding = nn.Embedding(config.vocab_size, config.llm_dim, dtype=dtype)
    nn.init.normal_(embedding.weight, std=0.5)
    embedding.weight.requires_grad_(dtype == torch.float32)
    return embedding


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight, in fp32."""

    def __init__(self, dim: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.epsilon)


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions [..., T] → cosine and sine [..., T, 1, head_dim / 2]."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[..., None, None].float() * frequency
    return angles.cos(), angles.sin()


@lru_cache(maxsize=32)
def first_positions(count: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """`rope_table` of positions 0 … count − 1. Callers share it: not to be changed."""
    with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference could not train later
        return rope_table(torch.arange(count, device=device), head_dim, theta)


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the two halves of every head: x [..., T, H, D], table [..., T, 1, D / 2]."""
    cosine, sine = (t.to(x.dtype) for t in table)
    low, high = x.chunk(2, -1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)


@dataclass(frozen=True)
class Layout:
    """How prefix and slots stand in a pass: x is [B, P + G·S, C].

    Attributes:
        mask: bool [B, P], True where the prefix has a token.
        lengths: int64 [B], how many.
        slots: S.
        table: cosine and sine [P + S, 1, D / 2], fp32, row i for position i.
        adapters: int64 [B], see `BaseLinear.forward`.
    """

    mask: Tensor
    lengths: Tensor
    slots: int
    table: tuple[Tensor, Tensor]
    adapters: Tensor | None = None

    @property
    def prefix_rope(self) -> tuple[Tensor, Tensor]:
        """Of positions 0 … P − 1, [P, 1, D / 2]."""
        cosine, sine = (t[: self.mask.shape[1]] for t in self.table)
        return cosine, sine

    @cached_property
    def slot_rope(self) -> tuple[Tensor, Tensor]:
        """Of a group's slots, [B, 1, S, 1, D / 2]."""
        rows = self.lengths[:, None] + torch.arange(self.slots, device=self.lengths.device)
        cosine, sine = (t[rows][:, None] for t in self.table)
        return cosine, sine


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_mask: Tensor
) -> Tensor:
    """`visionllm.ops.query_attention` in plain torch, after rotation.

    Args:
        q: [B, G, S, H, D], rotated; k, v: [B, G, S, H_kv, D].
        prefix_k, prefix_v: [B, P, H_kv, D]; prefix_mask: bool [B, P], True where there is a token.

    Returns:
        [B, G, S, H, D].
    """
    b, groups, slots, heads, d = q.shape
    kv_heads = k.shape[3]
    own_q = (q * d**-0.5).unflatten(3, (kv_heads, -1)).permute(0, 3, 1, 4, 2, 5)  # [B, Hkv, G, R, S, D]
    own_k = k.permute(0, 3, 1, 4, 2)[:, :, :, None]  # [B, Hkv, G, 1, D, S]
    own_v = v.permute(0, 3, 1, 2, 4)[:, :, :, None]  # [B, Hkv, G, 1, S, D]
    far = own_q.reshape(b, kv_heads, -1, d) @ prefix_k.permute(0, 2, 3, 1)  # [B, Hkv, G·R·S, P]
    far = far.masked_fill(~prefix_mask[:, None, None], float("-inf"))
    near = own_q @ own_k  # [B, Hkv, G, R, S, S]
    future = torch.ones(slots, slots, dtype=torch.bool, device=q.device).triu(1)
    near = near.masked_fill(future, float("-inf")).reshape(b, kv_heads, -1, slots)
    weights = torch.cat([far, near], -1).softmax(-1)  # summed in fp32 whatever its type
    far, near = weights.split([far.shape[-1], slots], -1)
    y = (near.reshape(b, kv_heads, groups, -1, slots, slots) @ own_v).reshape(b, kv_heads, -1, d)
    y = y + far @ prefix_v.transpose(1, 2)
    return y.view(b, kv_heads, groups, -1, slots, d).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)


class KVCache:
    """Rotated keys and values of what the LLM has read, so that it reads on without reading it again.

    Args:
        batch: B; capacity: the most tokens a row will hold, padding included.
        adapters: int64 [B], whose adapter reads and answers, of `LLM.adapter_rows`; None: the network's own.
    """

    def __init__(
        self, batch: int, capacity: int, device: torch.device, adapters: Tensor | None = None
    ) -> None:
        if adapters is not None and adapters.shape != (batch,):
            raise ValueError(f"KVCache: adapters must have shape [{batch}], got {list(adapters.shape)}")
        self.adapters = adapters
        self.keys: list[Tensor] = []  # per layer [B, capacity, H_kv, D]
        self.values: list[Tensor] = []
        self.mask = torch.zeros(batch, capacity, dtype=torch.bool, device=device)  # columns that hold a token
        self.used = 0  # columns written, padding included
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)  # tokens of each row
        self.source: CopySource | None = None  # what the words that are written may be copied from

    def select(self, rows: Tensor) -> None:
        """Keeps the rows [n] in this order; a row may be taken several times."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]
        self.adapters = None if self.adapters is None else self.adapters[rows]
        self.source = None if self.source is None else self.source.select(rows)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, T, H_kv, D] behind the used columns; all columns of this layer so far [B, n, H_kv, D]."""
        if layer == len(self.keys):
            for kept in (self.keys, self.values):
                kept.append(keys.new_zeros(len(keys), self.mask.shape[1], *keys.shape[2:]))
        end = self.used + keys.shape[1]
        self.keys[layer][:, self.used : end] = keys
        self.values[layer][:, self.used : end] = values
        return self.keys[layer][:, :end], self.values[layer][:, :end]


class LLMLayer(nn.Module):
    """One LLaMA block over the concatenation of prefix and slots."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.llm_dim
        self.heads, self.kv_heads = config.llm_heads, config.llm_kv_heads
        self.head_dim = dim // self.heads

        dtype = DTYPES[config.base_dtype]

        def linear(name: str, inputs: int, outputs: int) -> BaseLinear:
            if config.lora_rank and name in config.lora_targets:
                rank, alpha, dropout = config.lora_rank, config.lora_alpha, config.lora_dropout
                return LoRALinear(inputs, outputs, rank, alpha, dropout=dropout, dtype=dtype)
            return BaseLinear(inputs, outputs, dtype=dtype)

        self.attention_norm = RMSNorm(dim, config.rms_epsilon)
        self.q = linear("q", dim, dim)
        self.k = linear("k", dim, self.kv_heads * self.head_dim)
        self.v = linear("v", dim, self.kv_heads * self.head_dim)
        self.o = linear("o", dim, dim)
        self.ffn_norm = RMSNorm(dim, config.rms_epsilon)
        self.gate = linear("gate", dim, config.llm_ffn_dim)
        self.up = linear("up", dim, config.llm_ffn_dim)
        self.down = linear("down", config.llm_ffn_dim, dim)

    def start_silent(self) -> None:
        """Has the layer change nothing at first."""
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.down.weight)

    @torch.no_grad()
    def start_matching(self) -> None:
        """Has the first key head, and the query heads that share it, look for what has the same words.

        Queries and keys then have the same random projection, which keeps inner products, in RoPE's slow
        half, which turns them little. What is asked for is then found among image tokens from
        the first step on; without it tiny answered where things are at chance after 1200 steps.
        """
        half = self.head_dim // 2
        slow = torch.arange(self.head_dim) % half >= half // 2
        rows = torch.randn(self.head_dim, self.q.in_features) * MATCHING_STD * self.q.in_features**-0.5
        rows = rows * slow[:, None]
        shared = self.heads // self.kv_heads
        self.k.weight[: self.head_dim] = rows
        self.q.weight[: shared * self.head_dim] = rows.repeat(shared, 1)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x: [B, P + G·S, C]."""
        b, n, c = x.shape
        p = layout.mask.shape[1]
        chosen = layout.adapters
        q, k, v = self.project(x, chosen)
        # Padding stands behind the text, where a causal query of the text cannot see it.
        far_q, far_k = (apply_rope(t[:, :p], layout.prefix_rope) for t in (q, k))
        far_v = v[:, :p]
        y = self.attend(far_q, far_k, far_v)
        if n > p:
            own_q, own_k, own_v = (t[:, p:].unflatten(1, (-1, layout.slots)) for t in (q, k, v))
            own = self.grouped(own_q, own_k, own_v, far_k, far_v, layout)
            y = torch.cat([y, own.reshape(b, n - p, c)], 1)
        return self.finish(x, y, chosen)

    def read(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache, layer: int
    ) -> Tensor:
        """x: [B, T, C], behind what the cache holds; mask: bool [B, 1, T, n], who sees which column."""
        q, k, v = self.project(x, cache.adapters)
        k, v = cache.write(layer, apply_rope(k, rope), v)
        return self.finish(x, self.attend(apply_rope(q, rope), k, v, mask), cache.adapters)

    def answer(self, x: Tensor, layout: Layout, cache: KVCache, layer: int) -> Tensor:
        """x: slots [B, G·S, C] over a prefix that stands in the cache."""
        q, k, v = (t.unflatten(1, (-1, layout.slots)) for t in self.project(x, cache.adapters))
        far_k, far_v = (kept[layer][:, : cache.used] for kept in (cache.keys, cache.values))
        y = self.grouped(q, k, v, far_k, far_v, layout).reshape(x.shape)
        return self.finish(x, y, cache.adapters)

    def project(self, x: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, H_kv, D]; chosen: adapters, int64 [B]."""
        normed = self.q.entering(self.attention_norm(x))
        return (
            self.q(normed, chosen=chosen).unflatten(-1, (self.heads, -1)),
            self.k(normed, chosen=chosen).unflatten(-1, (self.kv_heads, -1)),
            self.v(normed, chosen=chosen).unflatten(-1, (self.kv_heads, -1)),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rotated [B, T, H, D], [B, n, H_kv, D] twice → [B, T, C]; causal without a mask."""
        wide_k, wide_v = (t.repeat_interleave(self.heads // self.kv_heads, 2).transpose(1, 2) for t in (k, v))
        y = attention(q.transpose(1, 2), wide_k, wide_v, mask, causal=mask is None)
        return y.transpose(1, 2).flatten(2)

    def grouped(
        self, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, layout: Layout
    ) -> Tensor:
        """Slots [B, G, S, H or H_kv, D], not rotated, over a rotated prefix → [B, G, S, H, D]."""
        if uses_operators(q):
            rope = (layout.table[0][:, 0], layout.table[1][:, 0])
            return query_attention(q, k, v, far_k, far_v, layout.lengths, rope)
        q, k = (apply_rope(t, layout.slot_rope) for t in (q, k))
        return grouped_attention(q, k, v, far_k, far_v, layout.mask)

    def finish(self, x: Tensor, y: Tensor, chosen: Tensor | None) -> Tensor:
        """The block behind its attention y: [B, T, C] both."""
        x = self.o(y, shortcut=x, chosen=chosen)
        normed = self.gate.entering(self.ffn_norm(x))
        inner = self.gate(normed, "silu", chosen=chosen) * self.up(normed, chosen=chosen)
        return self.down(inner, shortcut=x, chosen=chosen)


class LLM(nn.Module):
    """Embedded prefix [B, P, C] and slots [B, G, S, C] → their last states, normalised.

    States are in the prefix's type; linear layers multiply in the base's (`BaseLinear`). A base that is not
    float32 is frozen, with its norms, which are float32.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.llm_dim // config.llm_heads, config.rope_theta
        self.layers = nn.ModuleList(LLMLayer(config) for _ in range(config.llm_layers))
        self.norm = RMSNorm(config.llm_dim, config.rms_epsilon)
        # Layers that words alone go through behind those of the slots; at first they change nothing.
        self.word_layers = nn.ModuleList(LLMLayer(config) for _ in range(config.word_layers))
        if config.word_layers:
            self.word_norm = RMSNorm(config.llm_dim, config.rms_epsilon)
        for i, layer in enumerate(self.word_layers):
            assert isinstance(layer, LLMLayer)
            layer.start_silent()
            if i < MATCHING_LAYERS and config.base_dtype == "float32":
                layer.start_matching()
        if config.base_dtype != "float32":
            for module in self.modules():
                if isinstance(module, RMSNorm):
                    module.weight.requires_grad_(False)
        self._added: list[str] = []
        self._merged: str | None = None
        self._kept = True  # the weights before the merge

    def forward(
        self,
        prefix: Tensor,
        mask: Tensor,
        slots: Tensor,
        adapters: Sequence[str | None] | Tensor | None = None,
        words: bool = False,
        seen: Told | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass over prefix and slots.

        Args:
            mask: bool [B, P], True where the prefix has a token; its padding must stand last.
            adapters: the name of each sample's adapter, None for the base alone, or what `adapter_rows` makes
                of these; without it all have the network's own.
            words: also through the layers for words, if there are any.
            seen: what those are told; None: nothing.
        """
        b, p, c = prefix.shape
        groups, size = slots.shape[1:3]
        table = first_positions(p + size, self.head_dim, self.theta, prefix.device)
        if adapters is not None and not isinstance(adapters, Tensor):
            adapters = self.adapter_rows(adapters)
        if adapters is not None and adapters.shape != (b,):
            raise ValueError(f"LLM: adapters must be {b}, one a sample, got {list(adapters.shape)}")
        layout = Layout(mask, mask.sum(1), size, table, adapters)
        x = torch.cat([prefix, slots.reshape(b, -1, c)], 1)
        for layer in self.layers:
            x = layer(x, layout)
        if words and self.word_layers:
            x = x if seen is None else seen.show(x)
            for i, layer in enumerate(self.word_layers):
                x = layer(x, layout)
                x = seen.look_up(x) if seen is not None and i == 0 else x
            x = self.word_norm(x)
        else:
            x = self.norm(x)
        return x[:, :p], x[:, p:].reshape(b, groups, size, c)

    def read(
        self, x: Tensor, mask: Tensor, cache: KVCache, words: bool = False, seen: Told | None = None
    ) -> Tensor:
        """Reads on: x [B, T, C] behind what the cache holds, which then holds it too → states [B, T, C].

        Args:
            mask: bool [B, T], True where there is a token; padding must stand last.
            words, seen: as for `forward`; the same `words` for all that a cache holds.
        """
        t = x.shape[1]
        end = cache.used + t
        cache.mask[:, cache.used : end] = mask
        order = torch.arange(t, device=x.device)
        sees = cache.mask[:, None, None, :end].expand(-1, 1, t, -1).clone()
        # A padded query sees itself, lest its softmax be over nothing.
        sees[..., cache.used :] = (order[:, None] >= order) & (
            mask[:, None, None] | torch.eye(t, device=x.device).bool()
        )
        table = first_positions(cache.mask.shape[1], self.head_dim, self.theta, x.device)
        rows = (cache.lengths[:, None] + order).clamp(max=cache.mask.shape[1] - 1)
        rope = (table[0][rows], table[1][rows])
        for i, layer in enumerate(self.layers):
            x = layer.read(x, rope, sees, cache, i)  # type: ignore[operator]
        norm = self.norm
        if words and self.word_layers:
            x = x if seen is None else seen.show(x)
            for i, layer in enumerate(self.word_layers):
                x = layer.read(x, rope, sees, cache, len(self.layers) + i)  # type: ignore[operator]
                x = seen.look_up(x) if seen is not None and i == 0 else x
            norm = self.word_norm
        cache.used = end
        cache.lengths = cache.lengths + mask.sum(1)
        return norm(x)

    def answer(self, slots: Tensor, cache: KVCache) -> Tensor:
        """Slots [B, G, S, C] over a prefix that `read` has put into the cache → their states.

        The prefix's tokens must stand before its padding: a batch is read at once, or has no padding.
        """
        b, groups, size, c = slots.shape
        table = first_positions(cache.used + size, self.head_dim, self.theta, slots.device)
        layout = Layout(cache.mask[:, : cache.used], cache.lengths, size, table, cache.adapters)
        x = slots.reshape(b, -1, c)
        for i, layer in enumerate(self.layers):
            x = layer.answer(x, layout, cache, i)  # type: ignore[operator]
        return self.norm(x).reshape(b, groups, size, c)

    # ---- adapters ----------------------------------------------------------------------------------------

    def linears(self) -> dict[str, BaseLinear]:
        """By name, such as "layers.0.q"."""
        return {name: module for name, module in self.named_modules() if isinstance(module, BaseLinear)}

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Of the adapters that can be chosen beside the network's own (DEFAULT_ADAPTER)."""
        return tuple(self._added)

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Keeps an adapter, for samples to choose. It is not trained and belongs to no state dict.

        Raises:
            ValueError: the name is taken, or the adapter does not fit.
        """
        if not name or name == DEFAULT_ADAPTER or name in self._added:
            raise ValueError(f"add_adapter: expected a new name other than {DEFAULT_ADAPTER!r}, got {name!r}")
        self._check_unmerged("add_adapter")
        linears = self.linears()
        adapter.check(linears, f"add_adapter: {name}")
        for path, linear in linears.items():
            a, b = adapter.layers.get(path, (None, None))
            linear.add(len(self._added), a, b, adapter.scales[path] if a is not None else 1.0)
        self._added.append(name)

    def remove_adapter(self, name: str) -> None:
        """Raises ValueError for a name that `add_adapter` did not get."""
        self._check_unmerged("remove_adapter")
        place = self._number(name, "remove_adapter") - 1
        if place < 0:
            raise ValueError("remove_adapter: the network's own adapter stays: its targets are configured")
        for linear in self.linears().values():
            linear.remove(place)
        del self._added[place]

    def adapter_rows(self, names: Sequence[str | None]) -> Tensor:
        """Numbers of a batch's adapters, int64 [B]; None: the base alone.

        Raises:
            ValueError: there is no such adapter, or one is merged into the base.
        """
        self._check_unmerged("adapters")
        numbers = [NONE if name is None else self._number(name, "adapters") for name in names]
        return torch.tensor(numbers, device=self.norm.weight.device)

    def own_adapter(self) -> Adapter:
        """The network's own, its tensors shared."""
        own = {name: linear for name, linear in self.linears().items() if linear.lora_a is not None}
        layers = {name: (linear.lora_a.data, linear.lora_b.data) for name, linear in own.items()}  # type: ignore[union-attr]
        return Adapter(layers, {name: linear.scale for name, linear in own.items()})

    @torch.no_grad()
    def set_own_adapter(self, adapter: Adapter) -> None:
        """Copies an adapter into the network's own.

        Raises:
            ValueError: its layers, ranks or scales are not those that config gives the network's own.
        """
        where = "set_own_adapter"
        self._check_unmerged(where)
        linears = self.linears()
        adapter.check(linears, where)
        own = self.own_adapter()
        problems = [f"{name}: only in one" for name in own.layers.keys() ^ adapter.layers.keys()]
        for name in own.layers.keys() & adapter.layers.keys():
            rank, scale = len(own.layers[name][0]), own.scales[name]
            got = len(adapter.layers[name][0]), adapter.scales[name]
            if rank != got[0] or abs(scale - got[1]) > 1e-6 * abs(scale):
                problems.append(f"{name}: expected rank {rank} and scale {scale}, got {got[0]} and {got[1]}")
        if problems:
            shown = "\n  ".join(sorted(problems)[:20])
            raise ValueError(f"{where}: {len(problems)} differences from the configured adapter:\n  {shown}")
        for name, (a, b) in adapter.layers.items():
            own.layers[name][0].copy_(a)
            own.layers[name][1].copy_(b)

    def merge(self, name: str = DEFAULT_ADAPTER, keep: bool = True) -> None:
        """Adds an adapter to the base's weights, for all samples; passes then cost what the base does.

        The weights that were are kept beside the new ones, so that `unmerge` restores them bit for bit:
        subtracting the adapter again would leave rounding errors, in bf16 of the size of many adapters.
        A state dict of a merged LLM holds the sums, and an own adapter of zeros.

        Args:
            keep: False takes no memory, and `unmerge` is an error.

        Raises:
            ValueError: no such adapter, one is merged already, the base is int8, or the LLM is being trained.
        """
        self._check_unmerged("merge")
        number = self._number(name, "merge")
        if self.training:
            raise ValueError("merge: the LLM is in training; call eval() first")
        linears = self.linears().values()
        if any(linear.int8 for linear in linears):
            raise ValueError("merge: the base must be of floating point, got int8 rows")
        for linear in linears:
            linear.merge(number, keep)
        self._merged, self._kept = name, keep

    def unmerge(self) -> None:
        """Restores the base as it was before `merge`.

        Raises:
            ValueError: nothing is merged, or it was not kept.
        """
        if self._merged is None or not self._kept:
            what = "nothing is merged" if self._merged is None else "it was merged with keep=False"
            raise ValueError(f"unmerge: {what}")
        for linear in self.linears().values():
            linear.unmerge()
        self._merged = None

    def _number(self, name: str, where: str) -> int:
        if name == DEFAULT_ADAPTER:
            return OWN
        if name not in self._added:
            known = ", ".join([DEFAULT_ADAPTER, *self._added])
            raise ValueError(f"{where}: expected one of {known}, got {name!r}")
        return 1 + self._added.index(name)

    def _check_unmerged(self, where: str) -> None:
        if self._merged is not None:
            raise ValueError(f"{where}: adapter {self._merged!r} is merged into the base; unmerge it first")
