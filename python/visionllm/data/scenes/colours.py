"""What colour an object is, where that is clear, and what colours somebody could call it."""

from __future__ import annotations

import numpy as np

from visionllm.data.scenes.shapes import COLOURS

COLOUR_NAMES = (*COLOURS, "pink", "brown", "grey")
CLEAR_SHARE = 0.7  # of an object's pixels that have its colour
SOME_SHARE = 0.05  # of its pixels from which a colour cannot be denied
SAMPLED = 400  # pixels of an object that are looked at

# Neighbours that people do not tell apart with certainty; both ways.
_CLOSE = (
    ("red", "orange"), ("red", "pink"), ("red", "brown"), ("orange", "yellow"), ("orange", "brown"),
    ("yellow", "green"), ("yellow", "brown"), ("green", "blue"), ("blue", "purple"), ("purple", "pink"),
    ("grey", "white"), ("grey", "black"), ("grey", "brown"), ("grey", "blue"), ("black", "brown"),
    ("pink", "orange"),
)  # fmt: skip
_CLOSE_TO = {
    name: frozenset(a if b == name else b for a, b in _CLOSE if name in (a, b)) for name in COLOUR_NAMES
}
# Upper ends of the hues' ranges in degrees; the last one begins again with the first.
_HUE_ENDS = np.array([14, 42, 68, 165, 255, 292, 340, 360])
_HUE_NAMES = np.array(
    [COLOUR_NAMES.index(n) for n in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "red")]
)
_NUMBER = {name: i for i, name in enumerate(COLOUR_NAMES)}


def colours_of_pixels(pixels: np.ndarray) -> np.ndarray:
    """Positions in `COLOUR_NAMES` of uint8 RGB pixels [n, 3]: int64 [n]."""
    rgb = pixels.astype(np.float32) * np.float32(1 / 255)
    high, low = rgb.max(1), rgb.min(1)
    spread = np.maximum(high - low, np.float32(1e-6))
    r, g, b = rgb.T
    hue = np.where(
        high == r, (g - b) / spread % 6, np.where(high == g, (b - r) / spread + 2, (r - g) / spread + 4)
    )
    names = _HUE_NAMES[np.searchsorted(_HUE_ENDS, hue * 60).clip(0, 7)]
    saturation = spread / np.maximum(high, np.float32(1e-6))
    warm = (names == _NUMBER["red"]) | (names == _NUMBER["orange"]) | (names == _NUMBER["yellow"])
    names = np.where((names == _NUMBER["red"]) & (saturation < 0.45) & (high > 0.7), _NUMBER["pink"], names)
    names = np.where(warm & (names != _NUMBER["red"]) & (high < 0.66), _NUMBER["brown"], names)
    names = np.where((names == _NUMBER["red"]) & (high < 0.4), _NUMBER["brown"], names)
    grey = np.where(high > 0.82, _NUMBER["white"], _NUMBER["grey"])
    names = np.where(saturation < 0.14, grey, names)
    return np.where(high < 0.2, _NUMBER["black"], names)


def clear_colour(pixels: np.ndarray) -> tuple[str | None, frozenset[str]]:
    """The colour of an object, None where not clear, and all that it may be said to have.

    Args:
        pixels: its visible pixels, uint8 RGB [n, 3].
    """
    pixels = pixels[:: 1 + len(pixels) // SAMPLED]
    shares = np.bincount(colours_of_pixels(pixels), minlength=len(COLOUR_NAMES)) / len(pixels)
    most = int(shares.argmax())
    possible = {COLOUR_NAMES[i] for i in np.flatnonzero(shares > SOME_SHARE)}
    for name in tuple(possible):
        if shares[_NUMBER[name]] > 0.25:
            possible |= _CLOSE_TO[name]
    return (COLOUR_NAMES[most] if shares[most] >= CLEAR_SHARE else None), frozenset(possible)
