"""Boxes in parallel against the same LLM decoding them token by token.

    python bench/parallel_boxes.py [--objects 100] [--prefix 300] [--threads 1 2] [--types bfloat16 float32]

A LLaMA of SmolLM2-135M's shape with random weights (30 layers, width 576, 9 heads over 3 KV heads of 64
channels, FFN 1536, 49152 pieces, embedding and head tied), one picture's prefix, `objects` boxes:

    parallel             one pass: the prefix, and a group <cls> <x1> <y1> <x2> <y2> for each object;
                         every slot is compared with the rows that it may take (512 classes and no
                         object, 1025 locations)
    autoregressive       prefill, then the same 5 tokens of each object one after the other, greedy,
                         with a KV cache; each step is compared with those rows alone: the least that
                         decoding can cost
    autoregressive_text  the same with the separators of a written answer, "[(<c0>, <x1>, <y1>, <x2>,
                         <y2>), (": 10 tokens of each object (4 commas, and "), (" as one piece), each
                         compared with the whole vocabulary: what a chat model does

Times are of one whole answer, and in brackets without what all three do alike, the pass over the prefix
("parallel" is then its whole time less that of a pass over the prefix alone; "--" where the clock does not
tell the two apart). The autoregressive forms run once, the others `--repeats` times, the fastest counts.
Writes ``bench/results/parallel_boxes.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from harness import write_report
from torch import Tensor
from torch.nn import functional

from visionllm.model.config import LOCATION_BINS, ModelConfig
from visionllm.model.llm import LLM, LLMLayer, apply_rope, rope_table

SMOLLM2_135M = ModelConfig(
    vocab_size=49152,
    llm_dim=576,
    llm_layers=30,
    llm_heads=9,
    llm_kv_heads=3,
    llm_ffn_dim=1536,
    rope_theta=100000.0,
    lora_rank=0,
)
CLASSES = 513  # <c0> … <c511> and no object
BOX_TOKENS = 5
TEXT_TOKENS = 10


@dataclass(frozen=True)
class Row:
    implementation: str
    type: str
    threads: int
    objects: int
    prefix: int  # tokens
    decoded: int  # tokens
    seconds: float  # of the whole answer
    seconds_after_prefix: float | None
    speedup: float  # of `parallel` over this one, whole answers
    speedup_after_prefix: float | None


class Decoder:
    """The LLM's own layers, one token after the other; keys and values of all tokens so far are kept."""

    def __init__(self, llm: LLM, length: int, dtype: torch.dtype) -> None:
        layer: LLMLayer = llm.layers[0]
        self.llm = llm
        self.keys, self.values = torch.empty(
            2, len(llm.layers), 1, layer.kv_heads, length, layer.head_dim, dtype=dtype
        )
        self.table = rope_table(torch.arange(length), llm.head_dim, llm.theta)  # [length, 1, D / 2]
        self.filled = 0

    def __call__(self, x: Tensor) -> Tensor:
        """x: [1, T, C], the next tokens' embeddings → their last states, normalised."""
        tokens, start = x.shape[1], self.filled
        end = start + tokens
        rope = self.table[0][start:end], self.table[1][start:end]
        for i, layer in enumerate(self.llm.layers):
            normed = layer.attention_norm(x)
            q = apply_rope(layer.q(normed).view(1, tokens, layer.heads, -1), rope).transpose(1, 2)
            k = apply_rope(layer.k(normed).view(1, tokens, layer.kv_heads, -1), rope).transpose(1, 2)
            v = layer.v(normed).view(1, tokens, layer.kv_heads, -1).transpose(1, 2)
            self.keys[i][:, :, start:end], self.values[i][:, :, start:end] = k, v
            # One token's heads of a KV head are as good as that many queries, a sixth of enable_gqa's time.
            q = q.unflatten(1, (layer.kv_heads, -1)).flatten(2, 3) if tokens == 1 else q
            y = functional.scaled_dot_product_attention(
                q,
                self.keys[i][:, :, :end],
                self.values[i][:, :, :end],
                is_causal=tokens > 1,
                enable_gqa=tokens > 1,
            ).reshape(1, layer.heads, tokens, -1)
            x = x + layer.o(y.transpose(1, 2).reshape(1, tokens, -1))
            normed = layer.ffn_norm(x)
            x = x + layer.down(functional.silu(layer.gate(normed)) * layer.up(normed))
        self.filled = end
        return self.llm.norm(x)


class Bench:
    def __init__(self, objects: int, prefix: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = SMOLLM2_135M
        self.objects, self.dtype = objects, dtype
        self.llm = LLM(config).eval().to(dtype)
        width = config.llm_dim
        self.classes = torch.randn(CLASSES, width).to(dtype)
        self.locations = torch.randn(LOCATION_BINS, width).to(dtype)
        # The rows of all words; the location tokens and classes stand behind them.
        self.vocabulary = torch.cat(
            [torch.randn(config.vocab_size, width).to(dtype), self.locations, self.classes]
        )
        self.prefix = torch.randn(1, prefix, width).to(dtype)
        self.mask = torch.ones(1, prefix, dtype=torch.bool)
        self.slots = torch.randn(1, objects, BOX_TOKENS, width).to(dtype)

    def parallel(self, groups: int | None = None) -> Tensor:
        """The chosen row of every slot, [1, objects, 5]."""
        _, states = self.llm(self.prefix, self.mask, self.slots[:, :groups])
        classes = functional.linear(states[:, :, :1], self.classes).argmax(-1)
        return torch.cat([classes, functional.linear(states[:, :, 1:], self.locations).argmax(-1)], -1)

    def decode(self, tokens: int, whole_vocabulary: bool) -> tuple[float, list[int]]:
        """Seconds of the prefill, and what was chosen."""
        decoder = Decoder(self.llm, self.prefix.shape[1] + tokens, self.dtype)
        begin = time.perf_counter()
        state = decoder(self.prefix)[:, -1]
        prefill = time.perf_counter() - begin
        chosen: list[int] = []
        for i in range(tokens):
            if whole_vocabulary:
                rows = self.vocabulary
            else:
                rows = self.classes if i % BOX_TOKENS == 0 else self.locations
            token = int(functional.linear(state, rows).argmax())
            chosen.append(token)
            state = decoder(rows[token][None, None])[:, -1]
        return prefill, chosen

    def check_decoder(self) -> None:
        """The decoder says what the LLM's own causal pass over the same tokens says.

        Raises:
            SystemExit: it does not.
        """
        x = self.prefix[:, :40]
        expected, _ = self.llm(x, self.mask[:, :40], self.slots[:, :0])
        decoder = Decoder(self.llm, 40, self.dtype)
        got = torch.cat([decoder(x[:, :30]), *(decoder(x[:, i : i + 1]) for i in range(30, 40))], 1)
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error < (1e-4 if self.dtype == torch.float32 else 5e-2):
            raise SystemExit(f"the autoregressive decoder is off by {error} of the largest state")


def seconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def shown(value: float | None) -> str:
    return "--" if value is None else f"{value:.3f}"


@torch.inference_mode()
def run(bench: Bench, repeats: int) -> list[Row]:
    bench.check_decoder()
    whole = seconds(bench.parallel, repeats)
    difference = whole - seconds(lambda: bench.parallel(0), repeats)
    after = difference if difference > 0 else None
    prefix, objects = bench.prefix.shape[1], bench.objects
    common = dict(
        type=str(bench.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        objects=objects,
        prefix=prefix,
    )
    rows = [Row("parallel", **common, decoded=objects * BOX_TOKENS, seconds=whole, seconds_after_prefix=after,
                speedup=1.0, speedup_after_prefix=1.0)]  # fmt: skip
    for name, per_object, whole_vocabulary in (
        ("autoregressive", BOX_TOKENS, False),
        ("autoregressive_text", TEXT_TOKENS, True),
    ):
        bench.decode(3, whole_vocabulary)
        begin = time.perf_counter()
        prefill, _ = bench.decode(objects * per_object, whole_vocabulary)
        total = time.perf_counter() - begin
        rows.append(Row(
            name, **common, decoded=objects * per_object, seconds=total, seconds_after_prefix=total - prefill,
            speedup=total / whole, speedup_after_prefix=(total - prefill) / after if after else None,
        ))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, default=100)
    parser.add_argument("--prefix", type=int, default=300, help="tokens (default %(default)s)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--types", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--repeats", type=int, default=3, help="of the parallel form (default %(default)s)")
    parser.add_argument("--name", default="parallel_boxes", help="the file in bench/results")
    options = parser.parse_args()
    rows: list[Row] = []
    for name in options.types:
        bench = Bench(options.objects, options.prefix, getattr(torch, name))
        for threads in options.threads:
            torch.set_num_threads(threads)
            new = run(bench, options.repeats)
            for row in new:
                print(
                    f"{row.objects} objects {row.type} {row.threads} thr  {row.implementation:<20}"
                    f" {row.decoded:5d} tokens {row.seconds:8.3f} s ({shown(row.seconds_after_prefix)} s)"
                    f"  parallel is {row.speedup:.1f} x as fast ({shown(row.speedup_after_prefix)} x)",
                    flush=True,
                )
            rows += new
    print(f"written to {write_report(options.name, {'rows': [asdict(row) for row in rows]})}")


if __name__ == "__main__":
    main()
