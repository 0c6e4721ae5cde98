"""Generated scenes: determinism, exact boxes, splits, the held-out style, photos, cut-outs."""

from __future__ import annotations

import colorsys
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionllm.data.scenes import SPLITS, SceneDataset
from visionllm.data.scenes.appearance import TRAINING, Appearance, restyle
from visionllm.data.scenes.atlas import HELD_OUT_STYLE, GlyphAtlas
from visionllm.data.scenes.backgrounds import COCO_NAMES, PHOTO_THINGS
from visionllm.data.scenes.compose import BORDER, LEAST_VISIBLE, Canvas, layout, pose
from visionllm.data.scenes.shapes import COLOURS, SHAPE_NAMES, SHAPES, shape_mask, shape_picture

PLAIN = Appearance()  # changes nothing
STYLE_COLOUR = {"noto": (10, 200, 10), "fxemoji": (10, 10, 200), HELD_OUT_STYLE: (255, 0, 255)}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small atlas: full squares of one colour for each style; "axe" is missing from the held-out style."""
    folder = tmp_path_factory.mktemp("atlas")
    classes = {"dog": ["dog", "dog-face"], "cat": ["cat"], "taxi": ["taxi"], "axe": ["axe"], "tree": ["tree"]}
    glyphs, pictures = [], []
    for style, colour in STYLE_COLOUR.items():
        for glyph in ("dog", "dog-face", "cat", "taxi", "axe", "tree"):
            if (style, glyph) == (HELD_OUT_STYLE, "axe"):
                continue
            glyphs.append({"row": len(pictures), "glyph": glyph, "style": style, "bbox": [0, 0, 112, 112]})
            pictures.append(np.full((112, 112, 4), (*colour, 255), np.uint8))
    np.save(folder / "glyphs.npy", np.stack(pictures))
    index = {"size": 112, "sets": dict.fromkeys(STYLE_COLOUR, {}), "classes": classes, "glyphs": glyphs}
    (folder / "glyphs.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen plain photos; the n-th is grey n·10."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(16):
        Image.new("RGB", (90, 70), (n * 10, n * 10, n * 10)).save(folder / f"{n:02d}.png")
    return folder


def test_same_index_same_scene() -> None:
    first, second = SceneDataset("train", seed=3), SceneDataset("train", seed=3)
    for index in (0, 1, 999_999):
        a, b = first[index], second[index]
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.boxes, b.boxes) and a.names == b.names


def test_other_index_seed_or_split_other_scene() -> None:
    scene = SceneDataset("train", seed=3)[5].image
    for other in (
        SceneDataset("train", seed=3)[6],
        SceneDataset("train", seed=4)[5],
        SceneDataset("val", seed=3)[5],
    ):
        assert not np.array_equal(scene, other.image)


@pytest.mark.parametrize("size", [64, 224, 321])
def test_boxes_inside_and_named(size: int) -> None:
    dataset = SceneDataset("train", size=size)
    counts = []
    for index in range(60):
        sample = dataset[index]
        assert sample.image.shape == (size, size, 3) and sample.image.dtype == np.uint8
        assert sample.boxes.dtype == np.float32 and sample.boxes.shape == (len(sample.names), 4)
        assert (sample.boxes[:, :2] >= 0).all() and (sample.boxes[:, 2:] <= size).all()
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
        assert set(sample.names) <= set(dataset.names)
        assert set(sample.vocabulary) <= set(dataset.names)
        assert not sample.iscrowd.any()
        counts.append(len(sample.names))
    assert max(counts) >= 6 and np.mean(counts) > 2.5


def test_boxes_and_areas_are_the_masks() -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    dataset = SceneDataset("train", masks=True)
    for index in range(40):
        sample = dataset[index]
        assert sample.masks is not None and len(sample.masks) == len(sample.names)
        covered = np.zeros(sample.image.shape[:2], int)
        for box, area, rle in zip(sample.boxes, sample.area, sample.masks, strict=True):
            mask = coco_mask.decode(rle)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert area == mask.sum()
            covered += mask
        assert covered.max(initial=0) <= 1


def test_a_box_shows_where_the_object_is_drawn() -> None:
    canvas = Canvas(np.zeros((100, 100, 3), np.float32))
    rgb, alpha = np.full((20, 30, 3), 200, np.float32), np.ones((20, 30), np.float32)
    assert canvas.paint(rgb, alpha, 50, 40, "a")
    boxes, area = canvas.boxes()
    picture = canvas.finish(np.random.default_rng(0), PLAIN)
    rows, columns = np.nonzero(picture[..., 0])
    assert (
        boxes.tolist()
        == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        == [[35, 30, 65, 50]]
    )
    assert area.tolist() == [600]


def test_objects_stay_half_visible() -> None:
    canvas = Canvas(np.zeros((100, 100, 3), np.float32))
    grey, white = np.full((20, 20, 3), 90, np.float32), np.full((20, 20, 3), 250, np.float32)
    alpha = np.ones((20, 20), np.float32)
    assert canvas.paint(grey, alpha, 50, 50, "behind")
    assert not canvas.paint(white, alpha, 52, 52, "hides 81 %")
    assert canvas.paint(white, alpha, 61, 50, "hides 45 %")
    assert not canvas.paint(white, alpha, -2, 50, "60 % outside")
    assert not canvas.paint(white, alpha, 63, 52, "hides the second one")
    assert not canvas.paint(np.zeros((20, 20, 3), np.float32) + 3, alpha, 20, 85, "as dark as the background")
    assert canvas.kept[0] == "behind" and "hides 45 %" in canvas.kept
    _, area = canvas.boxes()
    assert area[0] == 20 * 11 >= LEAST_VISIBLE * 400


def test_layout_sizes_and_counts() -> None:
    rng = np.random.default_rng(0)
    layouts = [layout(rng) for _ in range(500)]
    assert {len(places) for places in layouts} == set(range(1, 9))
    sides = np.array([place.side for places in layouts for place in places])
    assert 0.12 <= sides.min() < 0.14 and 0.45 < sides.max() <= 0.55


def test_pose_turns_clockwise_and_mirrors() -> None:
    picture = np.zeros((40, 80, 4), np.uint8)
    picture[..., 3] = 255
    picture[:, :40, 0] = 255  # red on the left
    for mirror, side in ((False, "left"), (True, "right")):
        patch = pose(picture, 40, 0.0, mirror)
        assert patch.shape == (20 + 2 * BORDER, 40 + 2 * BORDER, 4)
        red = np.argwhere((patch[..., 0] > 200) & (patch[..., 3] > 200))[:, 1].mean()
        assert (red < patch.shape[1] / 2) == (side == "left")
    turned = pose(picture, 40, np.pi / 2, False)
    assert np.abs(np.array(turned.shape[:2]) - (40 + 2 * BORDER, 20 + 2 * BORDER)).max() <= 1
    red = np.argwhere((turned[..., 0] > 200) & (turned[..., 3] > 200))[:, 0].mean()
    assert red < turned.shape[0] / 2  # left goes up


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_masks_fill_their_extent(shape: str) -> None:
    mask = shape_mask(shape, 100)
    assert abs(max(mask.shape) - 100) <= 2
    solid = mask >= 96
    assert solid[0].any() and solid[-1].any() and solid[:, 0].any() and solid[:, -1].any()
    assert 0.15 < solid.mean() <= 1


@pytest.mark.parametrize("colour", [name for name in COLOURS if name not in ("black", "white")])
def test_coloured_shapes_keep_their_colour_in_training(colour: str) -> None:
    low, high = COLOURS[colour][0]
    rng = np.random.default_rng(0)
    for _ in range(40):
        picture = np.pad(
            shape_picture(f"{colour} circle", 60, rng), ((BORDER, BORDER), (BORDER, BORDER), (0, 0))
        )
        inside = np.s_[20:48, 20:48]
        rgb, alpha = restyle(picture, rng, TRAINING, keep_colour=True)
        assert (alpha[inside] > 0.99).all()
        hue, _, _ = colorsys.rgb_to_hsv(*(np.clip(rgb[inside], 0, 255).mean((0, 1)) / 255))
        middle = (low + high) / 2
        assert abs((hue - middle + 0.5) % 1.0 - 0.5) < (high - low) / 2 + 0.035


def test_restyle_without_changes_is_the_identity() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (30, 40, 4), np.uint8)
    rgb, alpha = restyle(picture, rng, PLAIN)
    assert np.array_equal(rgb, picture[..., :3])
    np.testing.assert_allclose(alpha, picture[..., 3] / 255, rtol=1e-6)


@pytest.mark.parametrize("length", [0, -5])
def test_a_data_set_has_scenes(length: int) -> None:
    with pytest.raises(ValueError, match=f"length must be at least 1 scene, got {length}"):
        SceneDataset("val", length=length)


def test_shapes_need_no_download() -> None:
    assert SceneDataset("test").names == SHAPE_NAMES and len(set(SHAPE_NAMES)) == 80


def test_held_out_style_is_never_trained_on(atlas: Path) -> None:
    """Every style has its own flat colour here, so a pixel tells the style."""
    seen: dict[str, set[tuple[int, ...]]] = {}
    for split in SPLITS:
        dataset = SceneDataset(split, glyphs=atlas, augment=PLAIN, masks=True)
        colours: set[tuple[int, ...]] = set()
        for index in range(80):
            sample = dataset[index]
            for name, box in zip(sample.names, sample.boxes, strict=True):
                if name in dataset.names and name not in SHAPE_NAMES:
                    x, y = int(box[[0, 2]].mean()), int(box[[1, 3]].mean())
                    colours.add(tuple(int(v) for v in sample.image[y, x]))
        seen[split] = colours & set(STYLE_COLOUR.values())
    assert seen["heldout_style"] == {STYLE_COLOUR[HELD_OUT_STYLE]}
    for split in ("train", "val", "test"):
        assert seen[split] == {STYLE_COLOUR["noto"], STYLE_COLOUR["fxemoji"]}


def test_held_out_style_has_the_compositions_of_val(atlas: Path) -> None:
    val = SceneDataset("val", glyphs=atlas, augment=PLAIN)
    other = SceneDataset("heldout_style", glyphs=atlas, augment=PLAIN)
    assert "axe" in val.names and "axe" not in other.names
    compared = 0
    for index in range(60):
        a, b = val[index], other[index]
        assert "axe" not in b.names
        if "axe" not in a.names:
            assert a.names == b.names and np.array_equal(a.boxes, b.boxes)
            compared += 1
    assert compared > 20


def test_atlas_chooses_among_training_styles(atlas: Path) -> None:
    glyphs = GlyphAtlas(atlas)
    colours = {
        tuple(glyphs.picture(glyphs.row("cat", 0.5, u, False))[0, 0, :3]) for u in (0.0, 0.4, 0.6, 0.99)
    }
    assert colours == {STYLE_COLOUR["noto"], STYLE_COLOUR["fxemoji"]}
    assert tuple(glyphs.picture(glyphs.row("cat", 0.5, 0.1, True))[0, 0, :3]) == STYLE_COLOUR[HELD_OUT_STYLE]


def test_missing_atlas_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="visionllm glyphs --output"):
        SceneDataset("train", glyphs=tmp_path)


def test_train_photos_are_not_behind_other_splits(photos: Path) -> None:
    paths = {
        s: {p.path for p in SceneDataset(s, backgrounds=photos)._photos} for s in ("train", "val", "test")
    }
    assert len(paths["train"]) == 14 and len(paths["val"]) == 2
    assert not paths["train"] & paths["val"] and paths["val"] == paths["test"]


def test_names_that_a_photo_may_show_are_not_called_absent(atlas: Path, photos: Path) -> None:
    dataset = SceneDataset("train", glyphs=atlas, backgrounds=photos, augment=PLAIN)
    doubtful = {name for name in dataset.names if name in COCO_NAMES + PHOTO_THINGS}
    assert doubtful == {"dog", "cat", "taxi", "tree"}
    kinds = set()
    for index in range(80):
        sample = dataset[index]
        absent = set(sample.vocabulary) - set(sample.names)
        kinds.add(bool(absent & doubtful))
        if not absent & doubtful:
            assert set(SHAPE_NAMES) <= set(sample.vocabulary)
    assert kinds == {True, False}


def test_annotated_photos_exclude_what_they_show(atlas: Path, photos: Path, tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n:02d}.png", "width": 90, "height": 70} for n in range(16)]
    document = {
        "images": images,
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"image_id": n, "category_id": 1} for n in range(16)],
    }
    (tmp_path / "photos.json").write_text(json.dumps(document))
    dataset = SceneDataset(
        "train",
        glyphs=atlas,
        backgrounds=photos,
        background_annotations=tmp_path / "photos.json",
        augment=PLAIN,
    )
    on_photo = 0
    for index in range(80):
        sample = dataset[index]
        if "dog" not in sample.vocabulary:
            on_photo += 1
            assert "dog" not in sample.names
            assert "cat" in sample.vocabulary
    assert 15 < on_photo < 60


def test_a_taxi_may_be_called_a_car(atlas: Path) -> None:
    picture = np.full((40, 40, 4), 255, np.uint8)
    dataset = SceneDataset("train", glyphs=atlas, cutouts=[(picture, "car")])
    assert "car" in dataset.names
    scenes = [dataset[index] for index in range(120)]
    with_taxi = [s for s in scenes if "taxi" in s.names]
    assert with_taxi and all("car" not in s.vocabulary for s in with_taxi)
    assert any("car" in s.vocabulary for s in scenes)
    assert any("car" in s.names for s in scenes)


def test_cutouts_are_for_training_only() -> None:
    picture = np.full((40, 40, 4), 255, np.uint8)
    assert "sofa" in SceneDataset("train", cutouts=[(picture, "sofa")]).names
    assert "sofa" not in SceneDataset("val", cutouts=[(picture, "sofa")]).names


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="split must be one of train, val, test, heldout_style, got 'dev'"):
        SceneDataset("dev")
    with pytest.raises(ValueError, match="size must be at least 32 pixels, got 8"):
        SceneDataset("train", size=8)
    with pytest.raises(IndexError, match=r"0\.\.9, got 10"):
        SceneDataset("train", length=10)[10]
