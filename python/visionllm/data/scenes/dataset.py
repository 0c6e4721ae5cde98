"""Generated scenes as a data set: every picture is a function of (seed, split, index)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from visionllm.data.sample import Sample
from visionllm.data.scenes.appearance import EVALUATION, TRAINING, Appearance
from visionllm.data.scenes.atlas import GLYPH_SIZE, HELD_OUT_STYLE, GlyphAtlas
from visionllm.data.scenes.backgrounds import Photo, drawn, photo_crop, photos_of
from visionllm.data.scenes.compose import COUNT_CHANCE, DENSE_COUNT_CHANCE, Canvas, layout
from visionllm.data.scenes.keypoints import keypoints_of
from visionllm.data.scenes.language import language_of, view_of
from visionllm.data.scenes.shapes import SHAPE_NAMES, shape_picture

SCENE_SIZE = 224  # px, the side of a scene
SPLITS = ("train", "val", "test", "heldout_style")
LENGTHS = {"train": 1_000_000, "val": 1000, "test": 1000, "heldout_style": 1000}
PHOTO_SHARE = 0.4  # of the scenes, where photos are given
CUTOUT_SHARE = 0.25  # of the training objects, where cut-outs are given

# A scene with the first may be said to show the others too: none of those is then certain to be absent.
RELATED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("taxi", "police car", "racing car"), ("car",)),
    **dict.fromkeys(("ambulance", "fire engine"), ("truck", "car")),
    **dict.fromkeys(
        ("baseball", "basketball", "soccer ball", "volleyball", "american football", "billiard ball"),
        ("sports ball",),
    ),
    **dict.fromkeys(
        ("duck", "eagle", "chick", "rooster", "owl", "parrot", "peacock", "penguin", "swan", "flamingo"),
        ("bird",),
    ),
    **dict.fromkeys(("birthday cake", "cupcake"), ("cake",)),
    **dict.fromkeys(("santa claus", "baby"), ("person",)),
    **dict.fromkeys(("palm tree", "pine tree", "christmas tree"), ("tree",)),
    **dict.fromkeys(("rose", "tulip", "daisy", "sunflower", "seedling", "cactus"), ("potted plant", "vase")),
    "bus": ("car",),
    "tram": ("train", "bus"),
    "truck": ("car",),
    "ship": ("boat",),
    "panda": ("bear",),
    "wolf": ("dog",),
    "beer mug": ("cup",),
    "cup": ("bowl",),
    "dinner plate": ("fork", "knife"),
    "spaghetti": ("fork", "bowl"),
    "bowl": ("chopsticks", "spoon"),
    "fried egg": ("egg",),
    "fishing pole": ("fish",),
    "wristwatch": ("clock",),
    "briefcase": ("suitcase", "handbag"),
    "laptop": ("keyboard", "tv"),
    "desktop computer": ("keyboard", "tv", "mouse"),
    "face with sunglasses": ("sunglasses", "smiling face"),
    "cowboy face": ("smiling face",),
    "cloud with rain": ("cloud", "water drop"),
    "rainbow": ("cloud",),
    "volcano": ("mountain", "fire"),
    "snowman": ("snowflake",),
    "ring": ("gem",),
    "tennis racket": ("sports ball",),
    "table tennis paddle": ("sports ball",),
    "bowling": ("sports ball",),
    "picture frame": ("mountain",),
    "bouquet": ("rose", "tulip", "potted plant", "vase"),
}


class SceneDataset:
    """Generated scenes with exact boxes, areas and masks.

    Objects are the glyphs of an atlas and the shapes that the package draws itself (without an atlas:
    shapes only). "val", "test" and "heldout_style" scenes are never trained on: other random streams, other
    photos behind them. "heldout_style" has the compositions of "val" (names, places, backgrounds), drawn in
    the one style that no other split uses.

    Boxes bound an object's visible pixels, as COCO's do; an object keeps at least half of its pixels visible.

    Args:
        split: one of `SPLITS`.
        seed: another seed gives other scenes.
        size: side of the square pictures, pixels.
        length: number of scenes, 1 or more; `LENGTHS` by default.
        glyphs: folder of the atlas (`visionllm glyphs`), or None.
        backgrounds: folder of photos to crop backgrounds from, or None. Every eighth one is kept for the
            splits that are not trained on.
        background_annotations: COCO-format JSON of those photos: what they show is then known (see `Photo`).
        cutouts: (RGBA uint8 [h, w, 4], name) of real objects, mixed with the glyphs in "train".
        augment: changes of looks; default `TRAINING` for "train", else `EVALUATION`.
        masks: give `Sample.masks` as COCO RLE (needs pycocotools).
        outlines: give `Sample.outlines`.
        keypoints: give `Sample.keypoints` (`visionllm.data.scenes.keypoints`).
        language: give `Sample.expressions`, `captions` and `questions` (`visionllm.data.scenes.language`).

    Attributes:
        names: every class name of the split.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = SCENE_SIZE,
        length: int | None = None,
        glyphs: str | Path | None = None,
        backgrounds: str | Path | None = None,
        background_annotations: str | Path | None = None,
        cutouts: Sequence[tuple[np.ndarray, str]] | None = None,
        augment: Appearance | None = None,
        masks: bool = False,
        outlines: bool = False,
        keypoints: bool = False,
        language: bool = False,
        held_out: str = HELD_OUT_STYLE,
    ):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if size < 32:
            raise ValueError(f"size must be at least 32 pixels, got {size}")
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1 scene, got {length}")
        self.split, self.seed, self.size = split, seed, size
        self.length = LENGTHS[split] if length is None else length
        self.augment = augment or (TRAINING if split == "train" else EVALUATION)
        self.with_masks, self.with_outlines, self.with_keypoints = masks, outlines, keypoints
        self.with_language = language
        self.atlas = GlyphAtlas(glyphs, held_out) if glyphs is not None else None
        self._held_out = split == "heldout_style"
        # placed by index, so the list must be the same in every split
        self._placeable = (self.atlas.names if self.atlas else ()) + SHAPE_NAMES
        self._shapes = frozenset(SHAPE_NAMES)
        self._cutouts: dict[str, list[np.ndarray]] = {}
        for picture, name in cutouts or () if split == "train" else ():
            self._cutouts.setdefault(name, []).append(picture)
        self._cutout_names = tuple(sorted(self._cutouts))
        drawn_names = [name for name in self._placeable if self._can_draw(name)]
        self.names = tuple(dict.fromkeys([*drawn_names, *self._cutout_names]))
        self._photos: list[Photo] = []
        if backgrounds is not None:
            photos = photos_of(backgrounds, background_annotations)
            kept = photos[7::8] or photos[-1:]
            self._photos = [p for p in photos if p not in kept] if split == "train" else kept

    def __len__(self) -> int:
        return self.length

    def _can_draw(self, name: str) -> bool:
        return name in self._shapes or (self.atlas is not None and self.atlas.draws(name, self._held_out))

    def _random(self, index: int, stream: int) -> np.random.Generator:
        """Random numbers of one scene: stream 0 is the composition, 1 the looks, 2 the words."""
        family = {"train": 1, "val": 2, "test": 3, "heldout_style": 2}[self.split]
        return np.random.Generator(np.random.PCG64([self.seed, family, index, stream]))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"scene index must be in 0..{self.length - 1}, got {index}")
        composition, looks = self._random(index, 0), self._random(index, 1)
        places = layout(composition, DENSE_COUNT_CHANCE if self.split == "train" else COUNT_CHANCE)
        photo = None
        if self._photos and composition.random() < PHOTO_SHARE:
            photo = self._photos[int(composition.integers(len(self._photos)))]
        background = photo_crop(photo, self.size, composition) if photo else drawn(self.size, composition)
        shown = photo.shows if photo else frozenset()
        canvas, before = Canvas(background), None
        for place in places:
            if self._cutout_names and looks.random() < CUTOUT_SHARE:
                name = self._cutout_names[int(place.name * len(self._cutout_names))]
                pictures = self._cutouts[name]
                picture, look = pictures[int(place.glyph * len(pictures))], EVALUATION
            else:
                name = self._placeable[int(place.name * len(self._placeable))]
                if place.repeat and before is not None:
                    name = before
                if not self._can_draw(name):
                    continue
                picture, look = self._picture(name, place.glyph, looks), self.augment
                before = name
            if name not in shown:
                canvas.paint_posed(picture, place, name, looks, look, name in self._shapes)
        image = canvas.finish(looks, self.augment)
        boxes, area = canvas.boxes()
        names = [str(name) for name in canvas.kept]
        sample = Sample(
            image=image,
            boxes=boxes,
            names=names,
            area=area,
            iscrowd=np.zeros(len(names), bool),
            image_id=f"{self.split}-{self.seed}-{index}",
            vocabulary=self._vocabulary(names, photo),
            masks=self._masks(canvas) if self.with_masks else None,
            outlines=canvas.outlines() if self.with_outlines else None,
            keypoints=keypoints_of(canvas, boxes) if self.with_keypoints else None,
        )
        if self.with_language:
            self._describe(sample, canvas, photo, self._random(index, 2))
        return sample

    @staticmethod
    def _describe(sample: Sample, canvas: Canvas, photo: Photo | None, rng: np.random.Generator) -> None:
        doubtful = photo.may_show | photo.shows if photo is not None else None
        view = view_of(
            sample.image,
            canvas.owner,
            sample.names,
            sample.boxes,
            sample.area,
            sample.vocabulary,
            doubtful,
            RELATED,
        )
        sample.expressions, sample.captions, sample.questions = language_of(view, sample.names, rng)

    def _picture(self, name: str, glyph: float, looks: np.random.Generator) -> np.ndarray:
        style = looks.random()
        if name in self._shapes:
            return shape_picture(name, GLYPH_SIZE, looks)
        assert self.atlas is not None
        return self.atlas.picture(self.atlas.row(name, glyph, style, self._held_out))

    def _vocabulary(self, present: list[str], photo: Photo | None) -> tuple[str, ...]:
        """The names that are annotated exhaustively in a scene."""
        unsure: set[str] = set()
        if photo is not None:
            unsure |= (photo.may_show - set(present)) | photo.shows
        for name in present:
            unsure.update(RELATED.get(name, ()))
        return tuple(name for name in self.names if name not in unsure) if unsure else self.names

    @staticmethod
    def _masks(canvas: Canvas) -> list[dict]:
        from pycocotools import mask as coco_mask

        return [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in canvas.masks()]
