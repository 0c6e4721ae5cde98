"""Views of photos: the boxes must still fit the pixels, whatever was cut, mirrored, shrunk or joined."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from visionllm.data.mixture import Source, TrainingBatches
from visionllm.data.photo_augmentation import (
    AugmentedPhotos,
    PhotoAugmentation,
    crop,
    flip,
    jitter_colours,
    resize,
    shrink,
)
from visionllm.data.photo_objects import can_be_pasted, paste, recolour_parts
from visionllm.data.sample import Sample

PLAIN = PhotoAugmentation(brightness=0, contrast=0, saturation=0, hue=0, grey=0)
COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10]], np.uint8)
NAMES = ("red thing", "green thing", "blue thing", "yellow thing")


class PaintedPhotos:
    """Photos of flat rectangles, each in the colour that its name says, apart from one another, on black."""

    vocabulary = (*NAMES, "cat")

    def __init__(self, count: int = 12) -> None:
        self.count = count
        self.reads = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        rng = np.random.default_rng(index)
        height, width = int(rng.integers(200, 700)), int(rng.integers(200, 700))
        image = np.zeros((height, width, 3), np.uint8)
        boxes, names = [], []
        for k in rng.permutation(4)[: rng.integers(1, 5)]:  # each in a quarter of its own
            x1 = (k % 2) * width // 2 + rng.integers(2, width // 8)
            y1 = (k // 2) * height // 2 + rng.integers(2, height // 8)
            x2, y2 = x1 + rng.integers(width // 8, width // 3), y1 + rng.integers(height // 8, height // 3)
            image[y1:y2, x1:x2] = COLOURS[k]
            boxes.append([x1, y1, x2, y2])
            names.append(NAMES[k])
        boxes = np.array(boxes, np.float32)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return Sample(image, boxes, names, area, np.zeros(len(names), bool), index, self.vocabulary)


def painted(image: np.ndarray, name: str) -> np.ndarray:
    """Where the picture has the colour that the name says."""
    colour = COLOURS[NAMES.index(name)].astype(int)
    return (np.abs(image.astype(int) - colour) < 60).all(-1)


def assert_boxes_fit(sample: Sample, tolerance: float = 1.6) -> None:
    """Every box is the extent of its colour around the box; resampling blurs edges by about a pixel."""
    height, width = sample.image.shape[:2]
    for box, name in zip(sample.boxes, sample.names, strict=True):
        x1, y1, x2, y2 = (int(v) for v in np.round(box + np.array([-4, -4, 4, 4])))
        x1, y1 = max(x1, 0), max(y1, 0)
        rows, columns = np.nonzero(painted(sample.image, name)[y1 : min(y2, height), x1 : min(x2, width)])
        if len(rows) == 0:
            assert min(box[2:] - box[:2]) < 3, f"{name}: nothing painted in {box}"
            continue
        extent = np.array([x1 + columns.min(), y1 + rows.min(), x1 + columns.max() + 1, y1 + rows.max() + 1])
        assert np.abs(extent - box).max() <= tolerance, f"{name}: box {box}, painted {extent}"


@pytest.mark.parametrize(
    "change",
    [
        {"mosaic": 0, "whole": 1, "zoom_out": 0, "flip": 0},
        {"mosaic": 0, "whole": 0, "on_object": 0, "zoom_out": 0, "flip": 0},
        {"mosaic": 0, "whole": 0, "on_object": 1, "zoom_out": 0, "flip": 1},
        {"mosaic": 0, "zoom_out": 1},
    ],
    ids=["whole", "crop", "on object, mirrored", "zoomed out"],
)
def test_boxes_fit_the_pixels(change):
    photos = AugmentedPhotos(PaintedPhotos(), 160, replace(PLAIN, **change))
    seen = 0
    for seed in range(40):
        view = photos.draw(np.random.default_rng(seed))
        assert view.image.shape == (160, 160, 3)
        assert view.image.dtype == np.uint8
        assert_boxes_fit(view)
        seen += len(view.names)
    assert seen > 40


def test_nothing_visible_goes_without_an_entry():
    """What is painted anywhere in a crop has a box or a crowd entry."""
    photos = AugmentedPhotos(PaintedPhotos(), 160, replace(PLAIN, mosaic=0, whole=0, zoom_out=0))
    cut = 0
    for seed in range(60):
        view = photos.draw(np.random.default_rng(seed))
        for name in NAMES:
            assert painted(view.image, name).sum() < 200 or name in view.names, (seed, name)
        cut += int(view.iscrowd.sum())
    assert cut > 5


def test_a_box_is_a_target_while_its_centre_is_in_view():
    sample = Sample(
        image=np.zeros((100, 100, 3), np.uint8),
        boxes=np.array([[30, 10, 60, 20], [40, 10, 62, 20], [0, 80, 40, 90], [48, 10, 58, 10.5]], np.float32),
        names=["out", "in", "gone", "thin"],
        area=np.array([300, 220, 400, 5], np.float32),
        iscrowd=np.array([False, False, False, False]),
        image_id=0,
        vocabulary=(),
    )
    view = crop(sample, (50, 0, 100, 50), 100, 100, np.random.default_rng(0), replace(PLAIN, zoom_out=0))
    assert view.names == ["out", "in", "thin"]
    assert view.iscrowd.tolist() == [True, False, True]
    np.testing.assert_allclose(view.boxes, [[0, 20, 20, 40], [0, 20, 24, 40], [0, 20, 16, 21]])
    np.testing.assert_allclose(view.area, [400, 480, 16], rtol=1e-5)


def test_a_mosaic_joins_four_photos():
    photos = AugmentedPhotos(PaintedPhotos(), 224, replace(PLAIN, mosaic=1, whole=1, zoom_out=0))
    counts = []
    for seed in range(10):
        view = photos.draw(np.random.default_rng(seed))
        assert str(view.image_id).count("+") == 3
        assert_boxes_fit(view)
        counts.append(len(view.names))
    assert max(counts) > 4


def test_a_view_is_a_function_of_the_generator():
    photos = AugmentedPhotos(PaintedPhotos(), 96)
    first = [photos.draw(np.random.default_rng(seed)) for seed in range(12)]
    other = AugmentedPhotos(PaintedPhotos(), 96, cache_bytes=0)
    for seed in reversed(range(12)):  # neither order, history nor the cache matter
        again = other.draw(np.random.default_rng(seed))
        np.testing.assert_array_equal(again.image, first[seed].image)
        np.testing.assert_array_equal(again.boxes, first[seed].boxes)
        assert again.names == first[seed].names
    assert len({view.image.tobytes() for view in first}) == 12


def test_photos_are_read_once():
    source = PaintedPhotos(3)
    photos = AugmentedPhotos(source, 64, PhotoAugmentation(max_cached_side=100))
    for seed in range(30):
        photos.draw(np.random.default_rng(seed))
    assert source.reads == 3
    assert max(photos.photo(0).image.shape) == 100
    with pytest.raises(ValueError, match="photos: expected at least one"):
        AugmentedPhotos(PaintedPhotos(0), 64)


def test_flip_and_resize():
    sample = PaintedPhotos()[0]
    twice = flip(flip(sample))
    np.testing.assert_array_equal(twice.image, sample.image)
    np.testing.assert_allclose(twice.boxes, sample.boxes)
    assert_boxes_fit(flip(sample), tolerance=0)
    assert_boxes_fit(resize(sample, 150, 333))
    assert shrink(sample, 10_000) is sample
    small = shrink(sample, 100)
    np.testing.assert_allclose(
        small.area.sum() / sample.area.sum(),
        np.prod(small.image.shape) / np.prod(sample.image.shape),
        rtol=1e-3,
    )


def test_colours():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    same = jitter_colours(image, np.random.default_rng(1), PLAIN)
    assert np.abs(same.astype(int) - image).max() <= 1
    grey = jitter_colours(image, np.random.default_rng(1), replace(PLAIN, grey=1))
    assert np.ptp(grey, axis=2).max() <= 1
    np.testing.assert_allclose(grey[..., 0], image @ [0.299, 0.587, 0.114], atol=1.01)
    plain = np.full((8, 8, 3), 120, np.uint8)  # grey has no hue to turn
    turned = jitter_colours(plain, np.random.default_rng(1), replace(PLAIN, hue=0.5))
    assert np.abs(turned.astype(int) - 120).max() <= 1
    changed = jitter_colours(image, np.random.default_rng(1), PhotoAugmentation())
    assert np.abs(changed.astype(int) - image).mean() > 3


@pytest.mark.parametrize("whole", [False, True])
def test_batches_of_photos_that_keep_their_shape(whole):
    """Padded below and to the right; boxes are shares of the picture without its padding."""
    photos = PaintedPhotos()
    source = Source(photos, photo=True, name="painted", whole=whole)
    settings = {**asdict(PLAIN), "mosaic": 0.0, "flip": 0.0, "whole": 1.0}
    batches = TrainingBatches(
        [source], seed=0, batch_size=4, image_size=96, longest_side=160, augmentation=settings
    )
    for step in range(3):
        batch = batches[step]
        assert batch.sizes is not None and batch.images.shape[1:3] == tuple(batch.sizes.max(0))
        assert len({tuple(size) for size in batch.sizes.tolist()}) > 1
        assert (batch.sizes.min(1) <= 96).all() and (batch.sizes.max(1) <= 160).all()
        for b, (height, width) in enumerate(batch.sizes.tolist()):
            picture = batch.images[b]
            assert not picture[height:].any() and not picture[:, width:].any()
            for box, label in zip(batch.boxes[b], batch.labels[b], strict=True):
                name = batch.instructions[b].classes[label]
                x, y = round(float(box[0]) * width), round(float(box[1]) * height)
                assert painted(picture[y : y + 1, x : x + 1], name).all()


def one_object(box=(40, 30, 100, 110), size=(160, 140), crowd=False, outline=True) -> Sample:
    """A red thing in a corner of its box only: a triangle, of which the outline tells."""
    x1, y1, x2, y2 = box
    image = np.full((size[1], size[0], 3), 40, np.uint8)
    shape = np.array([[x1, y1], [x2, y1], [x1, y2]], np.float32)
    rows, columns = np.mgrid[: size[1], : size[0]] + 0.5
    inside = (columns > x1) & (rows > y1) & ((columns - x1) / (x2 - x1) + (rows - y1) / (y2 - y1) < 1)
    image[inside] = COLOURS[0]
    return Sample(
        image=image,
        boxes=np.array([box], np.float32),
        names=[NAMES[0]],
        area=np.array([inside.sum()], np.float32),
        iscrowd=np.array([crowd]),
        image_id=7,
        vocabulary=NAMES,
        outlines=[shape if outline else None],
    )


def test_a_part_of_an_object_takes_another_colour():
    sample = one_object()
    before, changed = sample.image.copy(), 0
    was = painted(sample.image, NAMES[0])
    for seed in range(20):
        found = recolour_parts(sample, np.random.default_rng(seed), 1.0)
        assert (sample.image == before).all()  # photos are shared between views
        different = (found.image != before).any(-1)
        assert (different & ~was).sum() < 200  # of its edge alone
        changed += different.sum() > 0.1 * was.sum()
        assert (found.boxes == sample.boxes).all() and found.outlines is sample.outlines
    assert changed >= 18


@pytest.mark.parametrize(
    "sample", [one_object(crowd=True), one_object(outline=False)], ids=["crowd", "no outline"]
)
def test_what_has_no_colour_of_its_own_keeps_it(sample):
    assert recolour_parts(sample, np.random.default_rng(0), 1.0) is sample
    assert not can_be_pasted(sample, 0)


def test_a_part_of_an_object_shows_another_picture():
    sample, texture = one_object(), np.full((50, 90, 3), (1, 2, 240), np.uint8)
    shown = 0
    for seed in range(20):
        found = recolour_parts(sample, np.random.default_rng(seed), 1.0, texture)
        shown += (found.image == texture[0, 0]).all(-1).sum() > 100
    assert 4 <= shown <= 16  # every second one has a colour


def test_objects_that_can_be_pasted():
    assert can_be_pasted(one_object(), 0)
    behind = one_object()
    behind.boxes = np.concatenate([behind.boxes, [[40, 30, 100, 70]]]).astype(np.float32)
    behind.outlines, behind.iscrowd = [behind.outlines[0], None], np.zeros(2, bool)
    assert not can_be_pasted(behind, 0)
    assert not can_be_pasted(one_object(box=(0, 30, 100, 110)), 0)  # cut off
    assert not can_be_pasted(one_object(box=(40, 30, 60, 45)), 0)  # small


def blank(names=(), boxes=(), outlines=None) -> Sample:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Sample(
        image=np.full((200, 200, 3), 90, np.uint8),
        boxes=boxes,
        names=list(names),
        area=np.full(len(boxes), 100, np.float32),
        iscrowd=np.zeros(len(boxes), bool),
        image_id=1,
        vocabulary=NAMES,
        outlines=outlines,
    )


def test_a_pasted_object_has_the_box_and_the_outline_of_its_pixels():
    seen = 0
    for seed in range(40):
        view = blank(outlines=[])
        found = paste(view, one_object(), 0, 0.4, np.random.default_rng(seed))
        assert (view.image == 90).all()
        if not found.names:
            assert (found.image == 90).all()
            continue
        seen += 1
        assert found.names == [NAMES[0]] and not found.iscrowd.any()
        rows, columns = np.nonzero(painted(found.image, NAMES[0]))
        extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(extent - found.boxes[0]).max() <= 5, (seed, extent, found.boxes)  # soft tips
        assert found.area[0] == pytest.approx(len(rows), rel=0.25, abs=60)
        outline = found.outlines[0]
        assert np.abs(np.concatenate([outline.min(0), outline.max(0)]) - found.boxes[0]).max() <= 2.5
        assert outline.min() >= -1e-6 and outline.max() <= 200 + 1e-6
    assert seen >= 35


def test_what_a_pasted_object_hides_is_not_asked_for():
    boxes = [[0, 0, 200, 200], [95, 95, 105, 105], [90, 80, 130, 120], [0, 0, 20, 20]]
    square = one_object()
    square.outlines = [np.array([[40, 30], [100, 30], [100, 110], [40, 110]], np.float32)]
    kinds = set()
    for seed in range(60):
        view = blank(NAMES, boxes, [np.array([[0, 0], [9, 0], [9, 9]], np.float32)] * 4)
        found = paste(view, square, 0, 0.5, np.random.default_rng(seed))
        own = found.boxes[-1]
        for box in boxes:
            width = max(0, min(own[2], box[2]) - max(own[0], box[0]))
            height = max(0, min(own[3], box[3]) - max(own[1], box[1]))
            share = width * height / ((box[2] - box[0]) * (box[3] - box[1]))
            there = [i for i, other in enumerate(found.boxes[:-1]) if (other == box).all()]
            if share > 0.97:
                assert not there
                kinds.add("gone")
            elif 0.55 < share < 0.85:
                assert found.iscrowd[there[0]] and found.outlines[there[0]] is None
                kinds.add("crowd")
            elif 0.15 < share < 0.45:
                assert not found.iscrowd[there[0]] and found.outlines[there[0]] is None
                kinds.add("part")
            elif share < 0.05:
                assert not found.iscrowd[there[0]] and found.outlines[there[0]] is not None
                kinds.add("free")
    assert kinds == {"gone", "crowd", "part", "free"}


class Shaped(PaintedPhotos):
    """The same photos with the rectangles' outlines."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        corners = [box[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2) for box in sample.boxes]
        return replace(sample, outlines=corners)


def test_views_with_pasted_and_recoloured_objects():
    change = {"mosaic": 0, "paste": 1.0, "recolour": 0.5}
    photos = AugmentedPhotos(Shaped(), 160, replace(PLAIN, **change))
    plain = AugmentedPhotos(Shaped(), 160, replace(PLAIN, mosaic=0))
    counts = np.zeros(2, int)
    for seed in range(40):
        view, again = photos.draw(np.random.default_rng(seed)), photos.draw(np.random.default_rng(seed))
        assert (view.image == again.image).all() and (view.boxes == again.boxes).all()
        assert len(view.boxes) == len(view.names) == len(view.area) == len(view.iscrowd) == len(view.outlines)
        assert (view.boxes >= 0).all() and (view.boxes <= 160).all() and view.image.shape == (160, 160, 3)
        counts += len(view.names), len(plain.draw(np.random.default_rng(seed)).names)
    assert counts[0] > counts[1] + 40
    without = AugmentedPhotos(PaintedPhotos(), 160, replace(PLAIN, **change))
    assert without.draw(np.random.default_rng(0)).outlines is None  # nothing to cut out
