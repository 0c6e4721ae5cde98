"""The network, wired: instructions and pictures → image tokens → prefix → slots → logits → detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visionllm.instruction import Instruction
from visionllm.model import weights
from visionllm.model.config import ModelConfig
from visionllm.model.image_tokenizer import DenoisingQueries, ImageTokenizer, ImageTokens
from visionllm.model.known_names import probability_of_listed, rivals
from visionllm.model.llm import LLM
from visionllm.model.slots import (
    SlotHead,
    SlotLogits,
    SlotQueries,
    SlotReading,
    class_token_embedding,
    corners_of,
    expected_offsets,
)
from visionllm.model.text_encoder import TextEncoder, mean_pool
from visionllm.tokenizer import IMAGE, MAX_NAME_TOKENS, PADDING, Prompts, Tokenizer, pad

if TYPE_CHECKING:
    from visionllm.data.mixture import TrainBatch

KEPT_INSTRUCTIONS = 4  # batches of instructions whose text features are kept


@dataclass
class Detections:
    """One picture's boxes, best first. Coordinates are shares of the picture's width and height.

    Attributes:
        boxes: fp32 [n, 4], x1 y1 x2 y2, clipped to 0..1.
        scores: fp32 [n]; labels: int64 [n], index into the instruction's classes.
        centers: fp32 [n, 2], l_i; bins: int64 [n, 4], the offset tokens said, −512..512, in the boxes' order.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    centers: Tensor
    bins: Tensor


@dataclass
class Text:
    """Encoded prompts: tokens [B, T, C] with mask [B, T] for the fusion, names [B, K, C] for the slot head.

    distinct: [U, C], the features of the batch's distinct names.
    """

    tokens: Tensor
    mask: Tensor
    names: Tensor
    distinct: Tensor


class Network(nn.Module):
    """VisionLLM. Build it with `build_network`, or load it with `Network.from_pretrained`."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"Network: config.vocab_size must be at least {tokenizer.vocab_size}, the tokenizer's size, "
                f"got {config.vocab_size}"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.text_encoder = TextEncoder(
            config.vocab_size, config.text_dim, config.text_layers, config.text_heads
        )
        self.image_tokenizer = ImageTokenizer(config)
        self.embedding = nn.Embedding(config.vocab_size, config.llm_dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.class_tokens = class_token_embedding(config.llm_dim)
        self.llm = LLM(config)
        self.slot_queries = SlotQueries(config)
        self.slot_head = SlotHead(config)
        # The encoder's and the decoder's features against the names' text features: for training, and the
        # decoder's for the scores too (model/known_names.py).
        self.alignment = nn.ModuleDict(
            {part: nn.Linear(config.dim, config.text_dim) for part in ("encoder", "decoder")}
        )
        self.known_names: tuple[str, ...] = ()  # that training knew
        self._known_features: Tensor | None = None  # of those, kept while nothing trains
        self._asked: dict[Any, tuple[Prompts, Text]] = {}  # the last instructions, for `asked`

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def encode_text(self, prompts: Prompts) -> Text:
        distinct = self.encode_names(prompts.names)
        names = distinct[prompts.name_row]  # [B, K, C]
        description = self.text_encoder(prompts.description)  # [B, D, C]
        mask = torch.cat([prompts.description >= 0, prompts.class_mask], 1)
        return Text(torch.cat([description, names], 1), mask, names, distinct)

    def encode_names(self, ids: Tensor) -> Tensor:
        """Padded token ids of names [U, N] → [U, C]."""
        return mean_pool(self.text_encoder(ids), ids)

    def asked(self, instructions: Sequence[Instruction]) -> tuple[Prompts, Text]:
        """Tokens and text features of a batch's instructions, kept for the next call in prediction.

        Pictures are mostly asked the same, one after the other.
        """
        weights = [self.embedding.weight, *self.text_encoder.parameters()]
        reduced = torch.is_autocast_enabled(self.device.type)
        key = (tuple(instructions), reduced, *((w.data_ptr(), w._version) for w in weights))
        keep = not self.training and not torch.is_grad_enabled()
        if keep and (found := self._asked.get(key)) is not None:
            return found
        prompts = self.tokenizer.prompts(instructions, self.config.num_queries).to(self.device)
        answer = prompts, self.encode_text(prompts)
        if keep:
            if len(self._asked) >= KEPT_INSTRUCTIONS:
                self._asked.pop(next(iter(self._asked)), None)
            self._asked[key] = answer
        return answer

    def known_features(self) -> Tensor:
        """[V, C], the text features of `known_names`."""
        if self.training or self._known_features is None or self._known_features.device != self.device:
            ids = [self.tokenizer.encode_name(name)[:MAX_NAME_TOKENS] for name in self.known_names]
            features = self.encode_names(pad(ids, PADDING).to(self.device))
            if self.training:
                return features
            self._known_features = features
        return self._known_features

    def train(self, mode: bool = True) -> Network:
        self._known_features = None  # weights may change from here on
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._known_features = None
        return super().load_state_dict(*args, **kwargs)

    def image_tokens(
        self,
        images: Tensor,
        text: Text,
        denoising: DenoisingQueries | None = None,
        drawings: Tensor | None = None,
    ) -> ImageTokens:
        """images: uint8 [B, S, S, 3]; drawings: bool [B], where it is known which are no photos."""
        return self.image_tokenizer(images, text.tokens, text.mask, denoising, drawings)

    def decode_slots(
        self, prompts: Prompts, text: Text, tokens: ImageTokens, groups: Tensor | None = None, points: int = 2
    ) -> tuple[SlotLogits, Tensor]:
        """`read_slots`, as the logits and the groups' boxes [B, G, 4]."""
        reading = self.read_slots(prompts, text, tokens, groups, points)
        return reading.logits, reading.boxes

    def read_slots(
        self, prompts: Prompts, text: Text, tokens: ImageTokens, groups: Tensor | None = None, points: int = 2
    ) -> SlotReading:
        """One pass of the LLM over the prefix and the chosen groups.

        Args:
            groups: int64 [B, G], which image (or denoising) tokens get a group; None: all M.
        """
        m = self.config.num_queries
        boxes = tokens.boxes[-1].detach()
        image = self.slot_queries.image_tokens(tokens.features[:, :m], boxes[:, :m])
        is_image = prompts.ids == IMAGE
        is_class = prompts.ids >= self.tokenizer.vocab_size
        words = self.embedding(prompts.ids.masked_fill(is_class, 0).clamp(min=0))
        class_ids = (prompts.ids - self.tokenizer.vocab_size).clamp(min=0)
        prefix = torch.where(is_class[..., None], self.class_tokens(class_ids), words)
        # Every prompt holds all M image tokens in order, so the scatter is a plain masked copy.
        prefix = prefix.masked_scatter(is_image[..., None], image.to(prefix.dtype))

        if groups is None:
            features, boxes = tokens.features[:, :m], boxes[:, :m]
        else:
            features = tokens.features.gather(1, groups[..., None].expand(-1, -1, tokens.features.shape[-1]))
            boxes = boxes.gather(1, groups[..., None].expand(-1, -1, 4))
        slots = self.slot_queries(features, boxes, points)
        mask = prompts.ids != -1
        prefix_states, states = self.llm(prefix, mask, slots.to(prefix.dtype))
        name_states = pool_names(prefix_states, prompts.name_index, prompts.class_mask.shape[1])
        rows = self.slot_head.rows(name_states, text.names, self.class_tokens.weight)
        return SlotReading(self.slot_head, states, rows, prompts.class_mask, boxes)

    def boxes_from_slots(self, locations: Tensor, boxes: Tensor) -> Tensor:
        """Location logits [B, G, 4, 1025], boxes [B, G, 4] → corners [B, G, 4] in shares of the picture."""
        return corners_of(expected_offsets(locations, self.config.coordinate_window), boxes)

    @torch.inference_mode()
    def detect(self, images: Tensor, instructions: Sequence[Instruction], top: int = 100) -> list[Detections]:
        """Boxes of a batch.

        Args:
            images: uint8 [B, S, S, 3] with S = config.image_size.
            instructions: B detection instructions.
            top: at most this many boxes a picture.
        """
        size = self.config.image_size
        if images.dtype != torch.uint8 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"Network.detect: images must be uint8 [B, {size}, {size}, 3], got {images.dtype} "
                f"{list(images.shape)}"
            )
        if len(instructions) != len(images):
            raise ValueError(f"Network.detect: {len(images)} images but {len(instructions)} instructions")
        prompts, text = self.asked(instructions)
        tokens = self.image_tokens(images.to(self.device), text)
        reading = self.read_slots(prompts, text, tokens)
        answers, groups = reading.answers(self.config.coordinate_window), reading.boxes
        corners = corners_of(answers.offsets, groups)  # [B, M, 4]
        # Corners said in the wrong order change places, and their tokens with them.
        turned = (corners[..., :2] > corners[..., 2:]).repeat(1, 1, 2)
        corners = torch.where(turned, corners.roll(2, -1), corners).clamp(0, 1)
        bins = torch.where(turned, answers.bins.roll(2, -1), answers.bins)
        a = self.config.objectness_power
        objectness = tokens.objectness[-1].sigmoid()[..., None]  # [B, M, 1]
        scores = objectness**a * answers.probabilities[..., :-1] ** (1 - a)  # [B, M, K]
        if self.config.known_power > 0 and self.known_names:
            features = self.alignment["decoder"](tokens.features[:, : self.config.num_queries])
            others = rivals(self.known_names, [one.classes for one in instructions]).to(self.device)
            known = self.known_features()
            likely = probability_of_listed(features, text.names, prompts.class_mask, known, others)
            scores = scores * likely**self.config.known_power
        results = []
        for b, instruction in enumerate(instructions):
            flat = scores[b, :, : len(instruction.classes)].flatten()
            best, index = flat.topk(min(top, len(flat)))
            group, label = index // max(1, len(instruction.classes)), index % max(1, len(instruction.classes))
            results.append(Detections(corners[b, group], best, label, groups[b, group, :2], bins[b, group]))
        return results

    def loss(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Training losses of a `visionllm.data.mixture.TrainBatch`; see `visionllm.train.losses`."""
        from visionllm.train.losses import detection_loss

        return detection_loss(self, batch)

    def parameter_groups(self, lr: float, backbone_lr: float, weight_decay: float) -> list[dict]:
        """AdamW groups: the backbone at its own rate; vectors and the embeddings of text without decay."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = backbone_lr if ".backbone." in name else lr
            decay = (
                0.0 if parameter.ndim < 2 or "embedding" in name or "class_tokens" in name else weight_decay
            )
            groups.setdefault((rate, decay), []).append(parameter)
        return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json, model.safetensors, tokenizer.model and, if there are any, known_names.txt.

        dtype: of the weights, e.g. bf16.
        """
        weights.save_network(self, Path(directory), dtype)

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: torch.device | str = "cpu") -> Network:
        """Reads a folder written by `save_pretrained`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is broken, or its names, shapes or types are not this network's.
        """
        return weights.load_network(cls, Path(directory)).to(device)


def pool_names(states: Tensor, name_index: Tensor, classes: int) -> Tensor:
    """Mean state of each class's name and <ck> tokens: states [B, P, C], name_index [B, P] → [B, K, C]."""
    b, p, c = states.shape
    valid = name_index >= 0
    row = (name_index + torch.arange(b, device=states.device)[:, None] * classes)[valid]
    total = states.new_zeros(b * classes, c).index_add(0, row, states[valid])
    count = torch.bincount(row, minlength=b * classes).clamp(min=1)
    return (total / count[:, None].to(total.dtype)).view(b, classes, c)


def build_network(config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> Network:
    """A network with random weights; the same seed gives the same weights, bit for bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(config, tokenizer)
