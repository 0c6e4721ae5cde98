"""Outlines as they are answered: beside plain sums in float64, and what must stay as it is."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from visionllm.model.boxes import cxcywh_to_xyxy
from visionllm.model.outlines import BOX_SHARE, TURNS, settled


def plain(points, box):
    """One outline, N pairs, and its box x1 y1 x2 y2."""
    n = len(points)
    z = [complex(x, y) for x, y in points]
    turns = [k if k < (n + 1) // 2 else k - n for k in range(n)]  # −N/2 … N/2
    spectrum = [sum(z[j] * cmath.exp(-2j * math.pi * j * k / n) for j in range(n)) for k in range(n)]
    spectrum = [s * math.exp(-((abs(t) / TURNS) ** 4) / 2) for s, t in zip(spectrum, turns, strict=True)]
    z = [sum(spectrum[k] * cmath.exp(2j * math.pi * j * k / n) for k in range(n)) / n for j in range(n)]
    out = []
    for values, low_side, high_side in (
        ([c.real for c in z], box[0], box[2]),
        ([c.imag for c in z], box[1], box[3]),
    ):
        low, high = min(values), max(values)
        to_low, to_high = low + BOX_SHARE * (low_side - low), high + BOX_SHARE * (high_side - high)
        out.append([(v - low) / (high - low) * (to_high - to_low) + to_low for v in values])
    return list(zip(*out, strict=True))


@pytest.mark.parametrize("count", [4, 5, 16, 23, 64])
def test_they_are_what_their_description_says(count):
    generator = torch.Generator().manual_seed(count)
    points = torch.rand(2, 3, count, 2, generator=generator)
    boxes = torch.rand(2, 3, 4, generator=generator) * 0.4 + 0.2
    found = settled(points, boxes)
    assert found.shape == points.shape
    for b in range(2):
        for g in range(3):
            corners = cxcywh_to_xyxy(boxes[b, g].double()).tolist()
            wanted = torch.tensor(plain(points[b, g].double().tolist(), corners), dtype=torch.float64)
            torch.testing.assert_close(found[b, g].double(), wanted, rtol=1e-4, atol=1e-5)


def test_an_ellipse_in_its_box_stays():
    """Its only turn is the first, which fades by 3 %, and the box gives half of it back."""
    angle = torch.arange(24) / 24 * 2 * math.pi
    ellipse = torch.stack([0.5 + 0.2 * angle.sin(), 0.4 - 0.3 * angle.cos()], -1)[None, None]
    box = torch.tensor([[[0.5, 0.4, 0.4, 0.6]]])
    torch.testing.assert_close(settled(ellipse, box), ellipse, rtol=0, atol=6e-3)


def test_noise_of_single_points_goes():
    angle = torch.arange(32) / 32 * 2 * math.pi
    circle = torch.stack([0.5 + 0.3 * angle.sin(), 0.5 - 0.3 * angle.cos()], -1)[None, None]
    noise = 0.02 * torch.randn(circle.shape, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[[0.5, 0.5, 0.6, 0.6]]])
    assert (settled(circle + noise, box) - circle).norm() < 0.6 * noise.norm()


def test_points_in_one_place_and_empty_batches_are_no_problem():
    found = settled(torch.full((1, 2, 8, 2), 0.5), torch.tensor([[[0.5, 0.5, 0.2, 0.1]] * 2]))
    assert found.isfinite().all()
    assert settled(torch.zeros(1, 0, 8, 2), torch.zeros(1, 0, 4)).shape == (1, 0, 8, 2)
