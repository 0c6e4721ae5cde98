"""How an object is drawn: the same glyph recoloured, outlined, flattened, shaded, softened.

A network that sees each class in a handful of drawing styles reads colours and line work that the next style
does not share. So in training every object's patch is restyled at random; `Appearance` holds how often.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

BORDER = 4  # transparent pixels around every patch: room for an outline

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_GREY_AXIS = np.full((3, 3), 1 / 3, np.float32)
_GREY_TURN = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], np.float32) / np.sqrt(np.float32(3))


@dataclass(frozen=True)
class Appearance:
    """Probabilities of the changes to one object's looks, and to the whole picture."""

    hue: float = 0.0  # turn all hues, mostly a little
    saturation: float = 0.0  # paler, greyer or stronger colours
    mixing: float = 0.0  # mix the colour channels
    duotone: float = 0.0  # two colours by brightness
    brightness: float = 0.0  # gain, offset and gamma
    flat: float = 0.0  # few flat colours instead of gradients
    ink: float = 0.0  # dark lines where colours meet
    outline: float = 0.0  # a line around the object, which belongs to it
    shade: float = 0.0  # light from one side
    stretch: float = 0.0  # wider or taller
    grain: float = 0.0  # noise
    blur: float = 0.0  # soft focus
    soft: float = 0.0  # a thinner or wider soft edge
    shadow: float = 0.0  # a cast shadow, which does not belong to it
    picture_light: float = 0.0  # light falling across the whole picture
    picture_noise: float = 0.0  # noise on the whole picture
    picture_blur: float = 0.0  # blur of the whole picture
    picture_jpeg: float = 0.0  # JPEG compression of the whole picture


TRAINING = Appearance(
    hue=0.35,
    saturation=0.45,
    mixing=0.2,
    duotone=0.05,
    brightness=0.5,
    flat=0.2,
    ink=0.2,
    outline=0.35,
    shade=0.35,
    stretch=0.4,
    grain=0.12,
    blur=0.12,
    soft=0.12,
    shadow=0.3,
    picture_light=0.3,
    picture_noise=0.2,
    picture_blur=0.1,
    picture_jpeg=0.15,
)
EVALUATION = Appearance(shade=0.3, shadow=0.3, picture_light=0.3, picture_noise=0.1)


def colour_change(
    rng: np.random.Generator, look: Appearance, keep_colour: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """A random affine change of colour: `rgb @ matrix + offset`, or None for no change.

    With `keep_colour` (the name says a colour) hues and saturations stay; brightness changes little.
    """
    chance = rng.random(8)
    matrix, offset, changed = np.eye(3, dtype=np.float32), np.zeros(3, np.float32), False
    if not keep_colour:
        if chance[0] < look.hue:
            angle = rng.normal(0, 0.5) if chance[5] < 0.6 else rng.uniform(-np.pi, np.pi)
            c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            matrix = c * np.eye(3, dtype=np.float32) + (1 - c) * _GREY_AXIS + s * _GREY_TURN
            changed = True
        if chance[1] < look.saturation:
            amount = np.float32(rng.uniform(0, 0.35) if chance[6] < 0.3 else rng.uniform(0.4, 1.7))
            matrix = matrix @ (amount * np.eye(3, dtype=np.float32) + (1 - amount) * _LUMA[:, None])
            changed = True
        if chance[2] < look.mixing:
            mix = np.eye(3, dtype=np.float32) + rng.normal(0, 0.3, (3, 3)).astype(np.float32)
            matrix = matrix @ (mix / np.maximum(mix.sum(0), 0.4))
            changed = True
        if chance[3] < look.duotone:
            dark, light = np.sort(rng.random((2, 3)).astype(np.float32), axis=0)
            matrix, offset = _LUMA[:, None] * (light - dark), 255 * dark
            changed = True
    if chance[4] < look.brightness:
        reach = 0.12 if keep_colour else 0.4
        gain = np.float32(1 + rng.uniform(-reach, reach))
        tint = 1 + rng.uniform(-0.3, 0.3, 3).astype(np.float32) * reach
        matrix, offset = matrix * gain * tint, offset + np.float32(rng.uniform(-60, 60) * reach)
        changed = True
    return (matrix, offset) if changed else None


def _grown(alpha: np.ndarray, steps: int) -> np.ndarray:
    """Grey-level dilation of [h, w] by `steps` pixels (diamond)."""
    for _ in range(steps):
        wide = alpha.copy()
        np.maximum(wide[1:], alpha[:-1], out=wide[1:])
        np.maximum(wide[:-1], alpha[1:], out=wide[:-1])
        np.maximum(wide[:, 1:], alpha[:, :-1], out=wide[:, 1:])
        np.maximum(wide[:, :-1], alpha[:, 1:], out=wide[:, :-1])
        alpha = wide
    return alpha


def _ink(rgb: np.ndarray, colour: float, strength: float) -> None:
    """Draw dark lines along the edges of brightness, in place."""
    luma = rgb @ _LUMA
    edge = np.zeros_like(luma)
    edge[:, 1:-1] = np.abs(luma[:, 2:] - luma[:, :-2])
    edge[1:-1] += np.abs(luma[2:] - luma[:-2])
    line = np.clip((edge - 35) * np.float32(strength / 70), 0, 1)[..., None]
    rgb += (np.float32(colour) - rgb) * line


def restyle(
    patch: np.ndarray, rng: np.random.Generator, look: Appearance, keep_colour: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Redraw one object's patch.

    Args:
        patch: uint8 RGBA [h, w, 4], straight alpha, with `BORDER` transparent pixels on every side.
        keep_colour: the object's name says its colour.

    Returns:
        rgb float32 [h, w, 3] in 0..255 (unclipped) and alpha float32 [h, w] in 0..1.
    """
    chance = rng.random(8)
    if chance[0] < look.blur:
        radius = min(max(patch.shape[0], patch.shape[1]) / 60, 1.5) * (0.3 + 0.7 * chance[7])
        image = Image.fromarray(patch).convert("RGBa").filter(ImageFilter.BoxBlur(float(radius)))
        patch = np.asarray(image.convert("RGBA"))
    rgb = patch[..., :3].astype(np.float32)
    alpha = patch[..., 3].astype(np.float32) * np.float32(1 / 255)
    change = colour_change(rng, look, keep_colour)
    if change is not None:
        flat = rgb.reshape(-1, 3) @ change[0]
        flat += change[1]
        rgb = np.clip(flat, 0, 255, out=flat).reshape(rgb.shape)
    if chance[1] < look.flat and not keep_colour:
        step = np.float32(rng.uniform(40, 90))
        shift = np.float32(rng.uniform(0, 1))
        rgb = np.floor(rgb * (1 / step) + shift)
        rgb += 0.5 - shift
        rgb *= step
    if chance[2] < look.ink and not keep_colour:
        _ink(rgb, rng.uniform(0, 60), rng.uniform(0.5, 1.6))
    if chance[3] < look.shade:
        h, w = alpha.shape
        reach = 0.12 if keep_colour else 0.3
        across, down = rng.uniform(-reach, reach, 2).astype(np.float32)
        light = np.linspace(-down, down, h, dtype=np.float32)[:, None] + np.linspace(
            -across, across, w, dtype=np.float32
        )
        rgb *= (1 + light)[..., None]
    if chance[4] < look.grain:
        rgb += ((rng.random(alpha.shape, np.float32) - np.float32(0.5)) * np.float32(rng.uniform(14, 60)))[
            ..., None
        ]
    if chance[5] < look.soft:
        alpha = np.clip((alpha - 0.5) * np.float32(rng.uniform(0.6, 3)) + 0.5, 0, 1) * (alpha > 0)
    if chance[6] < look.outline:
        width = 1 + int(rng.integers(0, 1 + min(2, alpha.shape[0] // 40)))
        around = _grown(alpha, width)
        tone = rng.uniform(0, 50) if rng.random() < 0.8 else rng.uniform(150, 255)
        line = np.float32(tone) + (rng.uniform(-30, 30, 3)).astype(np.float32)
        share = (alpha / np.maximum(around, np.float32(1e-3)))[..., None]
        rgb -= line
        rgb *= share
        rgb += line
        alpha = around
    return rgb, alpha


def cast_shadow(alpha: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """The shadow of an alpha mask float32 [h, w].

    Returns:
        its darkness, float32 [h, w] in 0..1, and its shift to the right and down in pixels.
    """
    h, w = alpha.shape
    reach = max(2, min(h, w) // 10)
    right, down = int(rng.integers(-reach, reach + 1)), int(rng.integers(0, reach + 1))
    mask = Image.fromarray((alpha * 255).astype(np.uint8)).filter(
        ImageFilter.BoxBlur(float(rng.uniform(0.5, 3)))
    )
    return np.asarray(mask, np.float32) * np.float32(rng.uniform(0.2, 0.6) / 255), right, down
