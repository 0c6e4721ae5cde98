"""The network, wired: instructions and pictures → image tokens → prefix → slots → detections, or text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from visionllm.chat import TEMPLATES
from visionllm.instruction import Instruction
from visionllm.instruction.instruction import SET_TASKS
from visionllm.model import weights
from visionllm.model.boxes import cxcywh_to_xyxy, doubtful_lowered
from visionllm.model.config import ModelConfig
from visionllm.model.copying import CopyHead, CopySource, copyable
from visionllm.model.image_tokenizer import DenoisingQueries, ImageTokenizer, ImageTokens
from visionllm.model.kept import Kept
from visionllm.model.llm import LLM, KVCache, base_embedding
from visionllm.model.mentions import MentionFinder, NameLookup
from visionllm.model.outlines import settled
from visionllm.model.photo_classifier import call_boxes
from visionllm.model.scores import token_scores
from visionllm.model.slots import (
    SlotFormat,
    SlotHead,
    SlotQueries,
    SlotReading,
    class_token_embedding,
    extent_of,
    points_of,
)
from visionllm.model.text_decoding import TextHead, decode_text
from visionllm.model.text_encoder import TextEncoder, mean_pool
from visionllm.model.told import told_of
from visionllm.model.word_tokens import WordTokens, colours_at
from visionllm.text_options import TextOptions
from visionllm.tokenizer import IMAGE, PADDING, Prompts, Tokenizer, pad

if TYPE_CHECKING:
    from visionllm.data.train_batch import TrainBatch
    from visionllm.model.bert import Bert
    from visionllm.model.deformable_detr import DeformableDetr
    from visionllm.train.losses import UnmatchedWeights

# Deformable DETR's: where queries look is learned at a tenth of the rate.
PLACES, PLACES_RATE = re.compile(r"\.(sampling_offsets|reference)\."), 0.1
BERT_RATE = 0.1  # of a published text encoder's: it is fine-tuned, not learned


@dataclass
class Detections:
    """One picture's objects, best first. Coordinates are shares of the picture's width and height.

    Attributes:
        boxes: fp32 [n, 4], x1 y1 x2 y2, clipped to 0..1: the said corners, an outline's extent, or around
            keypoints the image token's own.
        scores: fp32 [n]; labels: int64 [n], index into the instruction's classes.
        centers: fp32 [n, 2], l_i; bins: int64 [n, 2N], the offset tokens said, −512..512.
        points: fp32 [n, N, 2]: corners, an outline's points, or keypoints in the instruction's order.
        visibility: fp32 [n, N, 3], of keypoints: probabilities of COCO's "not labelled", "hidden", "visible".
        spread: fp32 [n, 2N], standard deviation of every coordinate's location tokens; only where asked for.
        absent: fp32 [K], for grounding: the probability that nothing is what expression k describes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    centers: Tensor
    bins: Tensor
    points: Tensor
    visibility: Tensor | None = None
    spread: Tensor | None = None
    absent: Tensor | None = None


@dataclass
class Text:
    """Encoded prompts: tokens [B, T, C] with mask [B, T] for the fusion, names [B, K, C] for the slot head.

    distinct: [U, C], the features of the batch's distinct names.
    """

    tokens: Tensor
    mask: Tensor
    names: Tensor
    distinct: Tensor

    def of(self, rows: Tensor) -> Text:
        """Of the prompts [n] alone."""
        return Text(self.tokens[rows], self.mask[rows], self.names[rows], self.distinct)


class Network(nn.Module):
    """VisionLLM. Build it with `build_network`, or load it with `Network.from_pretrained`.

    Args:
        base_device: of the LLM with its embeddings and its head; "meta": without memory, to be filled later.

    Raises:
        ValueError: the configuration and the tokenizer do not fit.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, base_device: str | None = None) -> None:
        super().__init__()
        base: Any = nullcontext() if base_device is None else torch.device(base_device)
        for field, size in (
            ("vocab_size", tokenizer.vocab_size),
            ("text_vocab_size", tokenizer.text_vocab_size if config.text_vocab_size else 0),
        ):
            if size > getattr(config, field):
                raise ValueError(
                    f"Network: config.{field} must be at least {size}, the tokenizer's size, "
                    f"got {getattr(config, field)}"
                )
        if bool(config.text_vocab_size) != (tokenizer.text_words is not None):
            kinds = ("none of its own", "one of its own")
            raise ValueError(
                f"Network: config.text_vocab_size is {config.text_vocab_size}, but the text encoder has "
                f"{kinds[tokenizer.text_words is not None]} in the tokenizer"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder_of(config)
        self.image_tokenizer = image_tokenizer_of(config)
        with base:
            self.embedding = base_embedding(config)
        self.class_tokens = class_token_embedding(config.llm_dim)
        with base:
            self.llm = LLM(config)
        self.slot_queries = SlotQueries(config)
        self.slot_head = SlotHead(config)
        with base:
            self.text_head = TextHead(config)
        if config.llm_head != "query":
            # A published LLM is changed by its adapter alone; layers for words are new.
            for part in (self.embedding, self.llm, self.text_head):
                for name, parameter in part.named_parameters():
                    new = ".lora_" in name or name.startswith("word_")
                    parameter.requires_grad_(parameter.requires_grad and new)
        # The encoder's and the decoder's features against the names' text features: for training, and the
        # decoder's for the scores too (model/known_names.py). An encoder that proposes nothing is not asked.
        parts = ("encoder", "decoder") if config.detector == "two-stage" else ("decoder",)
        self.alignment = nn.ModuleDict({part: nn.Linear(config.dim, config.text_dim) for part in parts})
        if config.word_layers:
            self.word_tokens = WordTokens(config)
            self.name_lookup = NameLookup(config)
            self.copy_head = CopyHead(config)
        self.known_names: tuple[str, ...] = ()  # that training knew
        self.kept: Kept[tuple[Prompts, Text]] = Kept()

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def encode_text(self, prompts: Prompts) -> Text:
        distinct = self.encode_names(prompts.names)
        names = distinct[prompts.name_row]  # [B, K, C]
        description = self.text_encoder(prompts.description)  # [B, D, C]
        wanted, wanted_mask = names, prompts.class_mask
        if self.known_names and not prompts.class_mask.any():
            # Captions and answers list nothing. Guided by no names image tokens found 8 % of the objects of
            # generated scenes, by all known ones 98 %.
            wanted = self.known_features().expand(len(names), -1, -1)
            wanted_mask = wanted_mask.new_ones(wanted.shape[:2])
        mask = torch.cat([prompts.description >= 0, wanted_mask], 1)
        return Text(torch.cat([description, wanted.to(description.dtype)], 1), mask, names, distinct)

    def encode_names(self, ids: Tensor) -> Tensor:
        """Padded token ids of names [U, N] → [U, C]."""
        return mean_pool(self.text_encoder(ids), ids)

    def asked(self, instructions: Sequence[Instruction]) -> tuple[Prompts, Text]:
        """Tokens and text features of a batch's instructions, kept for the next call in prediction."""

        def make() -> tuple[Prompts, Text]:
            prompts = self.tokenizer.prompts(instructions, self.config.num_queries).to(self.device)
            return prompts, self.encode_text(prompts)

        if self.training or torch.is_grad_enabled():
            return make()
        # Instructions of another wording are equal: their texts count too.
        texts = tuple(one.text for one in instructions)
        return self.kept.asked((tuple(instructions), texts, self.known_names, self._encoding()), make)

    def _encoding(self) -> tuple[Any, ...]:
        """All that decides a text's features but the text."""
        weights = (self.embedding.weight, *self.text_encoder.parameters())
        reduced = torch.is_autocast_enabled(self.device.type)
        return (self.device, reduced, *((w.data_ptr(), w._version) for w in weights))

    def known_features(self) -> Tensor:
        """[V, C], the text features of `known_names`."""

        def make() -> Tensor:
            return self.encode_names(self.name_ids(self.known_names))

        if torch.is_grad_enabled() and any(p.requires_grad for p in self.text_encoder.parameters()):
            return make()
        return self.kept.features((self.known_names, self._encoding()), make)

    def known_ids(self) -> Tensor:
        """Their pieces for the LLM, padded [V, T]."""
        return self.kept.pieces(self.known_names, self.tokenizer).to(self.device)

    def mention_finder(self) -> MentionFinder:
        """Of `known_names`."""
        return self.kept.finder(self.known_names, self.tokenizer)

    def image_tokens(
        self,
        images: Tensor,
        text: Text,
        denoising: DenoisingQueries | None = None,
        drawings: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> ImageTokens:
        """What is seen, in shares of the pictures without their padding.

        Args:
            images: uint8 [B, H, W, 3]; sizes: int64 [B, 2], height and width of the part of each that is no
                padding; None: all of it.
            drawings: bool [B], where it is known which are no photos.
        """
        if sizes is None:
            return self.image_tokenizer(images, text.tokens, text.mask, denoising, drawings)
        return self.image_tokenizer(
            images, text.tokens, text.mask, denoising, drawings, sizes.to(self.device)
        )

    def call_photos(
        self, tokens: ImageTokens, listed: Sequence[Sequence[str]], originals: Sequence[np.ndarray] | None
    ) -> None:
        """Gives the image tokens what the photo classifier calls them, if there is one (`call_boxes`)."""
        tokenizer: Any = self.image_tokenizer  # or what torch.compile put around it
        classifier = getattr(tokenizer, "classifier", None)
        if classifier is not None:
            tokens.called = call_boxes(self.config, tokenizer.backbone, classifier, tokens, listed, originals)

    def slot_format(self, instructions: Sequence[Instruction]) -> SlotFormat:
        """What stands in the groups of instructions of one task and N."""
        task, points = instructions[0].task, instructions[0].points
        if task == "keypoints":
            distinct = dict.fromkeys(name for one in instructions for name in one.keypoints)
            row = {name: k for k, name in enumerate(distinct)}
            features = self.encode_names(self.name_ids(distinct))
            rows = [[row[name] for name in one.keypoints] for one in instructions]
            return SlotFormat("keypoints", points, features[torch.tensor(rows, device=self.device)])
        return SlotFormat("outlines" if task == "segmentation" else "boxes", points)

    def name_ids(self, names: Iterable[str]) -> Tensor:
        """Padded token ids of the text encoder's [U, N]."""
        return self.tokenizer.name_ids(names).to(self.device)

    def word_embeddings(self, ids: Tensor) -> Tensor:
        """Padded ids [B, T] → [B, T, C_llm], in fp32 whatever their rows are held in: so are states."""
        return self.embedding(ids.clamp(min=0)).float()

    def embed(self, prompts: Prompts, tokens: ImageTokens) -> Tensor:
        """The prefix [B, P, C_llm]: words, class tokens, and the image tokens in their places."""
        m = self.config.num_queries
        features = tokens.features[:, :m]
        image = self.slot_queries.image_tokens(
            features, tokens.boxes[-1][:, :m].detach(), tokens.objectness[-1][:, :m]
        )
        is_image = prompts.ids == IMAGE
        is_class = prompts.ids >= self.tokenizer.vocab_size
        words = self.embedding(prompts.ids.masked_fill(is_class, 0).clamp(min=0))
        class_ids = (prompts.ids - self.tokenizer.vocab_size).clamp(min=0)
        prefix = torch.where(is_class[..., None], self.class_tokens(class_ids), words)
        # Every prompt holds all M image tokens in order, so the scatter is a plain masked copy.
        return prefix.masked_scatter(is_image[..., None], image.to(prefix.dtype))

    def read_slots(
        self,
        prompts: Prompts,
        text: Text,
        tokens: ImageTokens,
        groups: Tensor | None = None,
        wanted: SlotFormat | None = None,
    ) -> SlotReading:
        """One pass of the LLM over the prefix and the chosen groups.

        Args:
            groups: int64 [B, G], which image (or denoising) tokens get a group; None: all M.
            wanted: what the groups hold; None: boxes.
        """
        m = self.config.num_queries
        boxes = tokens.boxes[-1].detach()
        prefix = self.embed(prompts, tokens)
        if groups is None:
            features, boxes = tokens.features[:, :m], boxes[:, :m]
        else:
            features = tokens.features.gather(1, groups[..., None].expand(-1, -1, tokens.features.shape[-1]))
            boxes = boxes.gather(1, groups[..., None].expand(-1, -1, 4))
        wanted = wanted or SlotFormat()
        slots = self.slot_queries(features, boxes, wanted)
        prefix_states, states = self.llm(prefix, prompts.ids != PADDING, slots.to(prefix.dtype))
        name_states = pool_names(prefix_states, prompts.name_index, prompts.class_mask.shape[1])
        rows = self.slot_head.rows(name_states, text.names, self.class_tokens.weight)
        return SlotReading(self.slot_head, states, rows, prompts.class_mask, boxes, wanted.kind)

    @torch.inference_mode()
    def find(
        self,
        images: Tensor,
        instructions: Sequence[Instruction],
        top: int = 100,
        spread: bool = False,
        sizes: Tensor | None = None,
        originals: Sequence[np.ndarray] | None = None,
    ) -> list[Detections]:
        """Objects of a batch; tasks, class sets and numbers of points may differ from picture to picture.

        Args:
            images: as for `check_images`.
            instructions: B of them, for tasks that are answered by a set of objects.
            top: at most this many objects a picture.
            spread: also give `Detections.spread`.
            sizes: int64 [B, 2], of the pictures without their padding; None: there is none.
            originals: the pictures before resizing, uint8 [H, W, 3], for the photo classifier's closer look;
                None: there is no such look, and names of photos' objects are told less well.

        Raises:
            ValueError: an argument does not fit, or a task is not one that the weights were trained for.
        """
        prompts, text, tokens = self.see("find", images, instructions, SET_TASKS, sizes, originals)
        results: list[Detections | None] = [None] * len(instructions)
        # The pictures are seen together; groups of one form are answered together.
        forms: dict[tuple[str, int], list[int]] = {}
        for b, instruction in enumerate(instructions):
            form = "boxes" if instruction.task in ("detection", "grounding") else instruction.task
            forms.setdefault((form, instruction.points), []).append(b)
        for members in forms.values():
            if len(members) == len(instructions):
                found = self._answer_slots(prompts, text, tokens, instructions, top, spread)
            else:
                rows = torch.tensor(members, device=self.device)
                asked = [instructions[b] for b in members]
                found = self._answer_slots(
                    prompts.of(rows), text.of(rows), tokens.of(rows), asked, top, spread
                )
            for b, one in zip(members, found, strict=True):
                results[b] = one
        return [one for one in results if one is not None]

    def check_images(
        self,
        caller: str,
        images: Tensor,
        sizes: Tensor | None = None,
        originals: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Pictures of `visionllm.image.network_batch`: uint8 [B, S, S, 3] with S = config.image_size, or with
        config.longest_side [B, H, W, 3] of sides up to that, and sizes of what is picture in them; and B
        pictures before resizing, if any.

        Raises:
            ValueError: they are not; in the caller's name.
        """
        if originals is not None and len(originals) != len(images):
            raise ValueError(f"{caller}: {len(images)} images but {len(originals)} originals")
        size, longest = self.config.image_size, self.config.longest_side
        if longest == 0:
            if images.dtype != torch.uint8 or images.shape[1:] != (size, size, 3):
                raise ValueError(
                    f"{caller}: images must be uint8 [B, {size}, {size}, 3], got {images.dtype} "
                    f"{list(images.shape)}"
                )
            if sizes is not None:
                raise ValueError(
                    f"{caller}: sizes must be None, as pictures are squares, got {sizes.tolist()}"
                )
            return
        if (
            images.dtype != torch.uint8
            or images.ndim != 4
            or images.shape[3] != 3
            or not 1 <= min(images.shape[1:3]) <= max(images.shape[1:3]) <= longest
        ):
            raise ValueError(
                f"{caller}: images must be uint8 [B, H, W, 3] with sides of at most {longest}, got "
                f"{images.dtype} {list(images.shape)}"
            )
        if sizes is not None and not (
            sizes.shape == (len(images), 2)
            and (sizes >= 1).all()
            and (sizes.cpu() <= torch.tensor(images.shape[1:3])).all()
        ):
            raise ValueError(
                f"{caller}: sizes must be [{len(images)}, 2] of 1 … {list(images.shape[1:3])}, got "
                f"{sizes.tolist()}"
            )

    def see(
        self,
        caller: str,
        images: Tensor,
        instructions: Sequence[Instruction],
        tasks: Sequence[str],
        sizes: Tensor | None = None,
        originals: Sequence[np.ndarray] | None = None,
    ) -> tuple[Prompts, Text, ImageTokens]:
        """The checked arguments of `find` and `write` as prompts, their text features and image tokens."""
        self.check_images(f"Network.{caller}", images, sizes, originals)
        if len(instructions) != len(images):
            raise ValueError(f"Network.{caller}: {len(images)} images but {len(instructions)} instructions")
        for instruction in instructions:
            self.check_task(instruction.task)
            if instruction.task not in tasks:
                raise ValueError(
                    f"Network.{caller}: the task must be one of {', '.join(tasks)}, got {instruction.task}"
                )
        prompts, text = self.asked(instructions)
        tokens = self.image_tokens(images.to(self.device), text, sizes=sizes)
        # An expression's noun, and what is written, may be any known name, where the weights ask for these.
        asks = {"grounding": self.config.noun_power > 0}
        asks["captioning"] = asks["vqa"] = self.config.word_layers > 0
        listed = [(*one.classes, *(self.known_names if asks.get(one.task) else ())) for one in instructions]
        self.call_photos(tokens, listed, originals)
        return prompts, text, tokens

    def check_task(self, task: str) -> None:
        """Raises ValueError for a task that the weights were not trained for."""
        # Grounding has the form of detection: weights trained for that read an expression as a name.
        trained = self.config.tasks
        if task not in trained and not (task == "grounding" and "detection" in trained):
            raise ValueError(f"these weights were trained for {', '.join(trained)}, not for {task}")

    def _answer_slots(
        self,
        prompts: Prompts,
        text: Text,
        tokens: ImageTokens,
        instructions: Sequence[Instruction],
        top: int,
        spread: bool,
    ) -> list[Detections]:
        """Detections of pictures with one slot format."""
        wanted = self.slot_format(instructions)
        reading = self.read_slots(prompts, text, tokens, wanted=wanted)
        answers, groups = reading.answers(self.config.coordinate_window), reading.boxes
        points = points_of(answers.offsets, groups)  # [B, M, N, 2]
        bins = answers.bins
        spreads = reading.spread() if spread else None
        if wanted.kind == "boxes":
            # Corners said in the wrong order change places, and their tokens with them.
            turned = (points[:, :, 0] > points[:, :, 1])[:, :, None].expand_as(points)
            points = torch.where(turned, points.flip(2), points)
            bins = torch.where(turned.flatten(2), bins.roll(2, -1), bins)
            if spreads is not None:
                spreads = torch.where(turned.flatten(2), spreads.roll(2, -1), spreads)
        elif wanted.kind == "outlines":
            points = settled(points, groups)
        boxes = cxcywh_to_xyxy(groups) if wanted.kind == "keypoints" else extent_of(points)
        points, boxes = points.clamp(0, 1), boxes.clamp(0, 1)
        visibility = reading.visibility_logits().softmax(-1) if wanted.kind == "keypoints" else None
        scores = token_scores(self, prompts, text, tokens, instructions, answers.probabilities)
        factors = self.config.repeat_factor, self.config.part_factor
        results = []
        for b, instruction in enumerate(instructions):
            count = len(instruction.classes)
            # Twice as many as wanted: repeats among the best give their places to others.
            best, index = scores[b, :, :count].flatten().topk(min(2 * top, scores.shape[1] * count))
            group, label = index // max(1, count), index % max(1, count)
            best, order = doubtful_lowered(boxes[b, group], best, label, *factors)
            best, group, label = best[:top], group[order[:top]], label[order[:top]]
            one = Detections(
                boxes[b, group], best, label, groups[b, group, :2], bins[b, group], points[b, group]
            )
            if spreads is not None:
                one.spread = spreads[b, group]
            if visibility is not None:
                one.visibility = visibility[b, group]
            if instruction.task == "grounding":
                one.absent = 1 - scores[b, :, :count].amax(0)
            results.append(one)
        return results

    @torch.inference_mode()
    def write(
        self,
        images: Tensor,
        instructions: Sequence[Instruction],
        options: TextOptions | None = None,
        on_text: Callable[[int, str], None] | None = None,
        sizes: Tensor | None = None,
        originals: Sequence[np.ndarray] | None = None,
    ) -> list[str]:
        """Captions and answers of a batch, word by word.

        Args:
            images, sizes, originals: as for `find`; instructions: B of them, for captioning or vqa.
            on_text: called with (picture, text that has come) as words come; only without beams.

        Raises:
            ValueError: as `find`.
        """
        options = options or TextOptions()
        prompts, _, tokens = self.see("write", images, instructions, ("captioning", "vqa"), sizes, originals)
        cache = KVCache(len(instructions), prompts.ids.shape[1] + 1 + options.max_tokens, self.device)
        colours = colours_at(images.to(self.device), tokens.boxes[-1], sizes)
        told = told_of(self, prompts, tokens, colours)
        prefix = self.embed(prompts, tokens)
        states = self.llm.read(prefix, prompts.ids != PADDING, cache, words=True, seen=told)
        if self.config.word_layers:
            copied = copyable(prompts.ids, self.tokenizer)
            cache.source = CopySource(prompts.ids, copied, self.copy_head.keys(states))
        return decode_text(self, cache, options, on_text)

    @torch.inference_mode()
    def complete(
        self,
        texts: Sequence[str],
        options: TextOptions | None = None,
        on_text: Callable[[int, str], None] | None = None,
        chat: bool = True,
    ) -> list[str]:
        """What the LLM alone writes behind texts; no picture, no text encoder.

        Args:
            on_text: as for `write`.
            chat: put each text as a question, in the form that the LLM was published with (config.chat);
                otherwise it goes on from the text as it is.

        Raises:
            ValueError: an empty text without a form around it.
        """
        options = options or TextOptions()
        rows = [self._written_before(text, chat) for text in texts]
        if not rows:
            return []
        if not all(rows):
            raise ValueError("complete: expected texts of at least one token, got an empty one")
        # The last token is what decoding reads first, in <bos>'s place.
        ids = pad([row[:-1] for row in rows], PADDING).to(self.device)
        last = torch.tensor([row[-1] for row in rows], device=self.device)
        cache = KVCache(len(rows), ids.shape[1] + 1 + options.max_tokens, self.device)
        self.llm.read(self.word_embeddings(ids), ids != PADDING, cache, words=True)
        return decode_text(self, cache, options, on_text, first=last)

    def _written_before(self, text: str, chat: bool) -> tuple[int, ...]:
        if chat and self.config.chat != "none":
            words = self.tokenizer.words
            return words.encode_marked(TEMPLATES[self.config.chat].format(text))
        return self.tokenizer.words.before + self.tokenizer.encode_first(text)

    @torch.inference_mode()
    def write_format(self, texts: Sequence[str]) -> list[str]:
        """The output format that each instruction's words ask for, such as "(c, x1, y1, x2, y2)".

        It is decoded under the grammar of formats: what comes back always is one.

        Args:
            texts: instructions; the picture plays no part.
        """
        from visionllm.instruction.format_grammar import FormatGrammar

        ids = self.tokenizer.text_ids(texts).to(self.device)
        options = TextOptions(max_tokens=FormatGrammar.MOST_CHARACTERS)
        cache = KVCache(len(texts), ids.shape[1] + 1 + options.max_tokens, self.device)
        self.llm.read(self.word_embeddings(ids), ids != PADDING, cache, words=True)
        return decode_text(self, cache, options, grammar=FormatGrammar())

    def loss(self, batch: TrainBatch, unmatched: UnmatchedWeights | None = None) -> dict[str, Tensor]:
        """Training losses of a `visionllm.data.train_batch.TrainBatch`; see `visionllm.train.losses`."""
        from visionllm.train.losses import set_loss
        from visionllm.train.text_loss import text_loss

        return set_loss(self, batch, unmatched) if batch.task in SET_TASKS else text_loss(self, batch)

    def parameter_groups(self, lr: float, backbone_lr: float, weight_decay: float) -> list[dict]:
        """AdamW groups: the backbone at its own rate, published parts that look or read at a tenth of the
        others'; vectors and the embeddings of text without decay.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = backbone_lr if ".backbone." in name else lr
            if self.config.detector == "deformable-detr" and PLACES.search(name):
                rate *= PLACES_RATE
            if self.config.text_encoder == "bert" and name.startswith("text_encoder."):
                rate *= BERT_RATE
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
    def from_pretrained(
        cls,
        directory: str | Path,
        device: torch.device | str = "cpu",
        adapter: str | Path | None = None,
    ) -> Network:
        """Reads a folder written by `save_pretrained`.

        Args:
            adapter: folder of `visionllm.model.adapter_folder`, whose tensors stand over the directory's.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is broken, or its names, shapes or types are not this network's.
        """
        if adapter is None:
            return weights.load_network(cls, Path(directory)).to(device)
        from visionllm.model.adapter_folder import load_adapted

        return load_adapted(cls, Path(directory), Path(adapter)).to(device)


def pool_names(states: Tensor, name_index: Tensor, classes: int) -> Tensor:
    """Mean state of each class's name and <ck> tokens: states [B, P, C], name_index [B, P] → [B, K, C]."""
    b, p, c = states.shape
    valid = name_index >= 0
    row = (name_index + torch.arange(b, device=states.device)[:, None] * classes)[valid]
    total = states.new_zeros(b * classes, c).index_add(0, row, states[valid])
    count = torch.bincount(row, minlength=b * classes).clamp(min=1)
    return (total / count[:, None].to(total.dtype)).view(b, classes, c)


def text_encoder_of(config: ModelConfig) -> TextEncoder | Bert:
    """Token ids [N, T] → [N, T, C_text]."""
    vocab_size = config.text_vocab_size or config.vocab_size
    sizes = (vocab_size, config.text_dim, config.text_layers, config.text_heads)
    if config.text_encoder == "own":
        return TextEncoder(*sizes)
    from visionllm.model.bert import Bert

    return Bert(*sizes, config.text_ffn_dim or 4 * config.text_dim)


def image_tokenizer_of(config: ModelConfig) -> ImageTokenizer | DeformableDetr:
    """Pictures and text features → ImageTokens."""
    if config.detector == "two-stage":
        return ImageTokenizer(config)
    from visionllm.model.deformable_detr import DeformableDetr

    return DeformableDetr(config)


def build_network(config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> Network:
    """A network with random weights; the same seed gives the same weights, bit for bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(config, tokenizer)
