"""Outlines: from masks, RLE and polygons; resampling; masks of polygons."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from visionllm.data.polygons import mask_iou, mask_of, outline_of, polygon_rle, resample, rle_of, signed_area

coco_mask = pytest.importorskip("pycocotools.mask")


def disc(radius: float, size: int = 64, x: float = 32, y: float = 30) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def test_a_block_of_pixels() -> None:
    mask = np.zeros((20, 30), bool)
    mask[5:11, 8:18] = True
    outline, lost = outline_of(mask, 20, 30)
    assert outline is not None and outline.dtype == np.float32 and lost == 0
    assert outline.min(0).tolist() == [8, 5] and outline.max(0).tolist() == [18, 11]
    assert abs(signed_area(outline)) == 60 - 4 * 0.125  # the corners are cut


@pytest.mark.parametrize("kind", ["mask", "uint8", "RLE", "list RLE"])
def test_every_form_of_a_mask_gives_the_same_outline(kind: str) -> None:
    mask = disc(17)
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs = np.flatnonzero(np.diff(np.concatenate([[False], mask.T.reshape(-1)]).astype(int)))
    counts = np.diff(np.concatenate([[0], runs, [mask.size]])).tolist()
    form = {
        "mask": mask,
        "uint8": mask.astype(np.uint8),
        "RLE": rle,
        "list RLE": {"size": [64, 64], "counts": counts},
    }[kind]
    outline, lost = outline_of(form, 64, 64)
    assert outline is not None and lost == pytest.approx(0)
    assert np.hypot(*(outline - (32, 30)).T) == pytest.approx(17, abs=0.75)
    assert mask_iou([rle_of(form, 64, 64)], [rle])[0, 0] == 1
    assert np.array_equal(mask_of(form, 64, 64), mask)


def test_polygons_keep_their_points_and_the_largest_part() -> None:
    large, small = [10, 10, 40, 10, 40, 30, 10, 30], [50, 10, 60, 10, 60, 30, 50, 30]
    outline, lost = outline_of([small, large], 64, 64)
    assert outline is not None and outline.reshape(-1).tolist() == large
    assert lost == pytest.approx(0.25)
    assert mask_of([small, large], 64, 64).sum() == 800


def test_the_largest_part_of_a_mask_and_what_is_lost() -> None:
    mask = np.zeros((40, 40), bool)
    mask[2:12, 2:22] = True
    mask[20:40, 30:35] = True
    outline, lost = outline_of(mask, 40, 40)
    assert outline is not None and outline.max(0).tolist() == [22, 12]
    assert lost == pytest.approx(1 / 3, abs=0.01)


def test_a_hole_is_no_part() -> None:
    mask = disc(20) & ~disc(10)
    outline, lost = outline_of(mask, 64, 64)
    assert outline is not None and lost == 0
    assert np.hypot(*(outline - (32, 30)).T).min() > 19


@pytest.mark.parametrize("nothing", [np.zeros((9, 9), bool), [], [[1, 1, 5, 5]], [[1, 1, 5, 5, 3, 3]]])
def test_nothing_has_no_outline(nothing: object) -> None:
    assert outline_of(nothing, 9, 9) == (None, 1.0)


def test_a_square_resampled() -> None:
    square = np.array([[0, 8], [8, 8], [8, 0], [0, 0]], np.float32)  # anticlockwise on the screen
    expected = [[0, 0], [4, 0], [8, 0], [8, 4], [8, 8], [4, 8], [0, 8], [0, 4]]
    for start in range(4):
        for points in (np.roll(square, start, 0), np.roll(square, start, 0)[::-1]):
            assert resample(points, 8).tolist() == expected


coordinates = st.floats(-99, 999, width=32)
outlines = arrays(np.float32, st.tuples(st.integers(3, 40), st.just(2)), elements=coordinates)


@given(outlines, st.integers(1, 64))
def test_resampled_points_lie_on_the_outline_and_start_at_the_top(outline: np.ndarray, count: int) -> None:
    points = resample(outline, count)
    assert points.shape == (count, 2) and points.dtype == np.float32
    top = outline[np.lexsort((outline[:, 0], outline[:, 1]))[0]]
    assert points[0].tolist() == top.tolist()
    following = np.roll(outline, -1, 0).astype(np.float64) - outline
    squared = np.maximum((following**2).sum(1), 1e-12)
    for point in points.astype(np.float64):
        share = np.clip(((point - outline) * following).sum(1) / squared, 0, 1)
        assert np.hypot(*(outline + share[:, None] * following - point).T).min() < 0.05


@given(st.integers(4, 64), st.floats(0, 6.3), st.booleans())
def test_resampled_convex_outlines_run_clockwise_in_equal_steps(count: int, turn: float, back: bool) -> None:
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False) + turn
    outline = np.stack([50 + 30 * np.cos(angles), 60 + 20 * np.sin(angles)], 1)
    points = resample(outline[::-1] if back else outline, count)
    assert signed_area(points) > 0
    dense = resample(outline, 64 * count)[::64]  # equal arc length: every 64th of 64 times as many
    assert np.abs(points - dense).max() < 1e-3


def test_an_outline_fills_its_mask() -> None:
    mask = disc(21) | disc(9, x=50)
    outline, _ = outline_of(mask, 64, 64)
    assert outline is not None
    rle = rle_of(mask, 64, 64)
    overlaps = [mask_iou([polygon_rle(resample(outline, n), 64, 64)], [rle])[0, 0] for n in (4, 8, 16, 64)]
    assert overlaps == sorted(overlaps) and overlaps[2] > 0.93 and overlaps[3] > 0.97


def test_overlap_of_nothing_has_a_shape() -> None:
    assert mask_iou([], [rle_of(disc(4), 64, 64)]).shape == (0, 1)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"mask: expected shape \[9, 8\], got \[8, 9\]"):
        outline_of(np.zeros((8, 9), bool), 9, 8)
    with pytest.raises(ValueError, match=r"RLE: expected size \[9, 8\], got \[8, 9\]"):
        outline_of({"size": [8, 9], "counts": [72]}, 9, 8)
    with pytest.raises(ValueError, match="RLE: expected counts as a list or a string, got None"):
        outline_of({"size": [8, 9]}, 8, 9)
    with pytest.raises(ValueError, match="even number of finite coordinates"):
        outline_of([[1, 2, 3]], 9, 9)
    with pytest.raises(ValueError, match="segmentation: expected a mask"):
        outline_of("circle", 9, 9)
    with pytest.raises(ValueError, match=r"outline: expected finite points of shape \[P, 2\]"):
        resample(np.zeros((0, 2)), 4)
    with pytest.raises(ValueError, match="count: expected at least 1 point, got 0"):
        resample(np.zeros((3, 2)), 0)
    with pytest.raises(ValueError, match=r"polygon: expected shape \[N, 2\], N ≥ 3, got \[2, 2\]"):
        polygon_rle(np.zeros((2, 2)), 9, 9)
