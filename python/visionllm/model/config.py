"""Everything that fixes a network's shapes: one frozen dataclass, and the presets by name."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

from visionllm.chat import TEMPLATES
from visionllm.instruction.instruction import TASKS

# Usually <p-512> … <p512>, an offset in units of 1/512 of the picture's height or width.
LOCATION_BINS = 1025
STRIDES = (8, 16, 32, 64)  # of the four scales, in pixels
GROUPS = 16  # of the group norms behind the scales' convolutions
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
MAY_BE_ZERO = (
    *("frozen_stages", "text_layers", "encoder_layers", "lora_rank", "coordinate_window"),
    *("longest_side", "text_vocab_size", "text_ffn_dim", "word_layers", "classifier_boxes"),
)
BASE_DTYPES = ("float32", "bfloat16", "float16", "int8")
# What fields that name a variant may say.
VARIANTS = {
    "backbone": ("efficientnet-lite0", "resnet50"),
    "text_encoder": ("own", "bert"),
    "detector": ("two-stage", "deformable-detr"),
    "image_tokens": ("queries", "pooling"),
    "llm_head": ("query", "tied", "linear"),
    "chat": tuple(TEMPLATES),
    "base_dtype": BASE_DTYPES,
    "class_rows": ("names", "static"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a VisionLLM network."""

    image_size: int = 224  # pictures are resized to this square, or with longest_side to this shorter side
    longest_side: int = 0  # the longer side's most pixels where pictures keep their shape; 0: squares
    # Backbone
    backbone: str = "efficientnet-lite0"  # or "resnet50"
    frozen_stages: int = 3  # EfficientNet-Lite0 stages (after the stem) that are never trained
    freeze_depthwise: bool = True  # depthwise kernels keep their pretrained values
    # The stages that training changes stand there twice: the pretrained ones' C4 and C5 are added to theirs.
    keep_pretrained: bool = False
    # With keep_pretrained: what the backbone's own classifier can call a photo's objects
    # (model/photo_classifier.py); none: there is no such part
    classifier_names: tuple[str, ...] = ()
    classifier_boxes: int = 16  # that it looks at more closely, of a photo; 0: it reads the photo alone
    # Text
    vocab_size: int = 2048  # the LLM's pieces; the added tokens follow
    text_encoder: str = "own"  # or "bert", with a tokenizer of its own
    text_vocab_size: int = 0  # pieces of the text encoder's own tokenizer; 0: it reads the LLM's pieces
    text_dim: int = 160  # text encoder width
    text_layers: int = 2
    text_heads: int = 4
    text_ffn_dim: int = 0  # 0: twice the width
    # False: no text reaches the image tokenizer (nor the rows of the slot head but through the LLM).
    text_guidance: bool = True
    # Image tokenizer: "two-stage" (pre-norm; queries look first where the encoder saw something) or
    # "deformable-detr" (the published one's layers, so that its weights fit)
    detector: str = "two-stage"
    box_refine: bool = False  # "deformable-detr": boxes refined from layer to layer
    dim: int = 128  # pyramid, fusion, encoder and decoder width
    heads: int = 8
    points: int = 4  # sampling points per head and level
    encoder_layers: int = 2
    decoder_layers: int = 3
    ffn_dim: int = 384
    num_queries: int = 64  # M, image tokens per picture
    image_tokens: str = "queries"  # or "pooling": averages of the encoder's features over a grid of M cells
    fusion_heads: int = 4
    fusion_gate: float = 0.1  # initial value of the gate γ; 0 leaves pretrained detector weights undisturbed
    # LLM
    llm_dim: int = 192
    llm_layers: int = 3
    llm_heads: int = 6
    llm_kv_heads: int = 3
    llm_ffn_dim: int = 448
    rope_theta: float = 10000.0
    rms_epsilon: float = 1e-5
    # Logits of words: "query" (a learned projection against the embeddings), "tied" (the embeddings as they
    # are) or "linear" (rows of their own), the last two as published LLaMAs have them
    llm_head: str = "query"
    chat: str = "none"  # how a question is put to the LLM alone: one of visionllm.chat.TEMPLATES
    base_dtype: str = "float32"  # how frozen weights of the LLM are held: one of BASE_DTYPES
    lora_rank: int = 8  # 0 removes the LoRA modules
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0  # of what an adapter reads, in training
    lora_targets: tuple[str, ...] = ("q", "v")  # of LORA_TARGETS
    # Further layers for words alone, which are told more of every image token (model/word_tokens.py); slots
    # are read behind the first llm_layers.
    word_layers: int = 0
    # Slot head
    class_rows: str = "names"  # "names": the prompt's own states at each name; "static": rows of <c0>…<c511>
    box_prior: bool = False  # corners start from the image token's own box (model/box_prior.py)
    location_bins: int = LOCATION_BINS  # location tokens, odd; the last is an offset of one picture size
    coordinate_window: int = 6  # decode by expectation within ± this many bins of the argmax; 0: argmax alone
    # score = objectness^a · class probability^(1 − a) · (probability among all known names)^c
    objectness_power: float = 0.35  # a
    known_power: float = 0.0  # c; 0: known names play no part
    # On a photo the class probability is that of the slots to the power of 1 − this, times that of the photo
    # classifier to the power of this (model/scores.py); 0: it plays no part
    classifier_power: float = 0.7
    # For an expression times (how well its noun fits)^noun_power (model/mentions.py); 0: nouns play no part
    noun_power: float = 0.0
    # What is left of the score of a box that repeats a better one of its class, or lies within a larger one
    # that is as sure (model/boxes.py); 1: all of it
    repeat_factor: float = 1.0
    part_factor: float = 1.0
    score_threshold: float = 0.3  # shown and answered boxes; evaluation uses all
    tasks: tuple[str, ...] = ("detection",)  # that the weights were trained for

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_field(field.name, getattr(self, field.name), field.default)
        for name, variants in VARIANTS.items():
            if getattr(self, name) not in variants:
                known = " or ".join(map(repr, variants))
                raise ValueError(f"ModelConfig: {name} must be {known}, got {getattr(self, name)!r}")
        if 0 < self.longest_side < self.image_size:
            raise ValueError(
                f"ModelConfig: longest_side must be 0 or at least image_size, got {self.longest_side} and "
                f"{self.image_size}"
            )
        if self.longest_side and self.detector == "two-stage":
            # Its encoder knows no padding.
            raise ValueError(
                f"ModelConfig: longest_side must be 0 with detector 'two-stage', got {self.longest_side}"
            )
        if self.detector == "deformable-detr":
            for name, needed in (("image_tokens", "queries"), ("keep_pretrained", False)):
                if getattr(self, name) != needed:
                    raise ValueError(
                        f"ModelConfig: {name} must be {needed!r} with detector 'deformable-detr', "
                        f"got {getattr(self, name)!r}"
                    )
        elif self.backbone != "efficientnet-lite0":
            raise ValueError(
                "ModelConfig: backbone must be 'efficientnet-lite0' with detector 'two-stage', "
                f"got {self.backbone!r}"
            )
        if self.detector == "deformable-detr" and self.backbone != "resnet50":
            raise ValueError(
                "ModelConfig: backbone must be 'resnet50' with detector 'deformable-detr', "
                f"got {self.backbone!r}"
            )
        if self.text_encoder == "bert" and not self.text_vocab_size:
            raise ValueError(
                "ModelConfig: text_vocab_size must be at least 1 with text_encoder 'bert', got 0"
            )
        for name in ("repeat_factor", "part_factor", "classifier_power"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ModelConfig: {name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"ModelConfig: lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.image_tokens == "pooling" and math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ValueError(
                f"ModelConfig: num_queries must be a square with pooling, got {self.num_queries}"
            )
        if self.location_bins < 3 or self.location_bins % 2 == 0:
            raise ValueError(
                f"ModelConfig: location_bins must be odd and at least 3, got {self.location_bins}"
            )
        for width, heads in (
            ("dim", "heads"),
            ("dim", "fusion_heads"),
            ("text_dim", "text_heads"),
            ("llm_dim", "llm_heads"),
            ("llm_heads", "llm_kv_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"ModelConfig: {width} must be a multiple of {heads}, got {getattr(self, width)} and "
                    f"{getattr(self, heads)}"
                )
        folded = [name.casefold() for name in self.classifier_names]
        if self.classifier_names and not self.keep_pretrained:
            raise ValueError("ModelConfig: classifier_names must be () without keep_pretrained")
        if len(set(folded)) < len(folded) or "" in map(str.strip, folded):
            raise ValueError("ModelConfig: classifier_names must be different names, whatever their case")
        if self.keep_pretrained and self.frozen_stages != 3:
            raise ValueError(
                "ModelConfig: frozen_stages must be 3 with keep_pretrained: both trunks share C3, "
                f"got {self.frozen_stages}"
            )
        if self.dim % GROUPS:
            raise ValueError(f"ModelConfig: dim must be a multiple of {GROUPS}, got {self.dim}")
        if self.llm_dim // self.llm_heads % 2:
            raise ValueError(
                f"ModelConfig: llm_dim / llm_heads must be even, got {self.llm_dim} / {self.llm_heads}"
            )
        positions = sum((-(-self.image_size // stride)) ** 2 for stride in STRIDES)
        if self.num_queries > positions:
            raise ValueError(
                f"ModelConfig: num_queries must be at most {positions}, the positions of a picture of "
                f"{self.image_size} pixels, got {self.num_queries}"
            )

    @property
    def denoises(self) -> bool:
        """Whether queries can be placed near known boxes."""
        return self.detector == "two-stage" and self.image_tokens == "queries"

    @staticmethod
    def _check_field(name: str, value: object, default: object) -> None:
        if isinstance(default, float):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"ModelConfig: {name} must be a finite float, got {value!r}")
        elif type(value) is not type(default):
            raise ValueError(f"ModelConfig: {name} must be {type(default).__name__}, got {value!r}")
        elif type(value) is int and value < (0 if name in MAY_BE_ZERO else 1):
            raise ValueError(
                f"ModelConfig: {name} must be at least {0 if name in MAY_BE_ZERO else 1}, got {value}"
            )
        elif isinstance(value, tuple):
            if name == "classifier_names":
                if not all(isinstance(one, str) for one in value):
                    raise ValueError(f"ModelConfig: {name} must be names, got {value!r}")
                return
            allowed = TASKS if name == "tasks" else LORA_TARGETS
            if not all(one in allowed for one in value):
                raise ValueError(f"ModelConfig: {name} must be of {', '.join(allowed)}, got {value!r}")

    def to_json(self) -> str:
        return json.dumps({"model_type": "visionllm", **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "config.json") -> ModelConfig:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: not JSON, another model type, fields this version does not know, or a value that
                a field cannot have.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where}: expected JSON: {error}") from error
        if not isinstance(values, dict) or values.pop("model_type", None) != "visionllm":
            raise ValueError(f'{where}: expected an object with "model_type": "visionllm"')
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{where}: unknown fields {', '.join(unknown)}")
        for name, value in values.items():
            if isinstance(known[name].default, tuple) and isinstance(value, list):
                values[name] = tuple(value)
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('ModelConfig: ')}") from error


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(),
    # tiny's detector between real pretrained parts: EfficientNet-Lite0, MiniLM and SmolLM2-135M-Instruct. Its
    # detector has tiny's shapes, so that it can start from what tiny has learned.
    "small": ModelConfig(
        keep_pretrained=True,
        vocab_size=49152,
        text_encoder="bert",
        text_vocab_size=30522,
        text_dim=384,
        text_layers=6,
        text_heads=12,
        text_ffn_dim=1536,
        llm_dim=576,
        llm_layers=30,
        llm_heads=9,
        llm_kv_heads=3,
        llm_ffn_dim=1536,
        rope_theta=100000.0,
        llm_head="tied",
        chat="smollm2",
        lora_rank=8,
        lora_alpha=16.0,
        lora_targets=("q", "k", "v", "o"),
        box_prior=True,
        score_threshold=0.08,  # 80 % of the listed objects of generated scenes are above it
        known_power=0.5,  # names go over from tiny before the slots have learned any
    ),
    # The paper's: ResNet-50, BERT-Base, Deformable DETR, LLaMA-7B. Class slots are read from the rows of
    # <c0> … <c511> as in the paper; "names" (tiny's) would add one 4096 × 4096 projection, trained in full.
    "r50-7b": ModelConfig(
        image_size=800,
        longest_side=1333,
        backbone="resnet50",
        frozen_stages=1,
        freeze_depthwise=False,
        vocab_size=32000,
        text_encoder="bert",
        text_vocab_size=30522,
        text_dim=768,
        text_layers=12,
        text_heads=12,
        text_ffn_dim=3072,
        detector="deformable-detr",
        dim=256,
        heads=8,
        points=4,
        encoder_layers=6,
        decoder_layers=6,
        ffn_dim=1024,
        num_queries=100,
        fusion_heads=8,
        fusion_gate=0.0,
        llm_dim=4096,
        llm_layers=32,
        llm_heads=32,
        llm_kv_heads=32,
        llm_ffn_dim=11008,
        rms_epsilon=1e-6,
        llm_head="linear",
        chat="alpaca",
        base_dtype="bfloat16",
        lora_rank=16,
        lora_alpha=32.0,
        lora_targets=("q", "k", "v", "o"),
        class_rows="static",
    ),
}
