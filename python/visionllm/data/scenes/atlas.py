"""Reading the glyph atlas that `visionllm.data.scenes.glyphs` writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

GLYPH_SIZE = 112  # px; half of the default picture side, the largest object a scene holds
HELD_OUT_STYLE = "twemoji"  # never trained on: it measures how well names carry over to unseen drawings


class GlyphAtlas:
    """Glyph pictures by class, glyph and style.

    Attributes:
        pictures: uint8 RGBA [glyphs, size, size, 4], straight alpha, memory-mapped.
        boxes: int [glyphs, 4], tight x1, y1, x2, y2 of every picture.
        names: the class names that at least one training style draws.
    """

    def __init__(self, folder: str | Path, held_out: str = HELD_OUT_STYLE):
        folder = Path(folder)
        if not (folder / "glyphs.json").exists():
            raise FileNotFoundError(
                f"glyphs: expected glyphs.json and glyphs.npy in {folder}, found none; "
                f"make them with: visionllm glyphs --output {folder}"
            )
        index = json.loads((folder / "glyphs.json").read_text())
        self.folder = folder
        self.held_out = held_out
        self.pictures = np.load(folder / "glyphs.npy", mmap_mode="r")
        self.boxes = np.zeros((len(self.pictures), 4), np.int64)
        rows: dict[str, dict[str, int]] = {}
        for entry in index["glyphs"]:
            self.boxes[entry["row"]] = entry["bbox"]
            rows.setdefault(entry["glyph"], {})[entry["style"]] = entry["row"]
        # class: its glyphs, each {style: row}; only glyphs that some training style draws
        self._glyphs = {
            name: [rows[glyph] for glyph in glyphs if set(rows.get(glyph, ())) - {held_out}]
            for name, glyphs in index["classes"].items()
        }
        self._glyphs = {name: glyphs for name, glyphs in self._glyphs.items() if glyphs}
        self.styles = tuple(index["sets"])
        self.names = tuple(self._glyphs)

    def draws(self, name: str, held_out: bool) -> bool:
        """Whether the held-out style (or, if not `held_out`, any other) draws a class."""
        return any(self.held_out in glyph for glyph in self._glyphs[name]) or not held_out

    def row(self, name: str, glyph: float, style: float, held_out: bool) -> int:
        """The picture of a class, chosen by two numbers in 0..1: one for the glyph, one for its style.

        The held-out style draws the same glyph where it has it, another one of the class where not.
        """
        glyphs = self._glyphs[name]
        first = int(glyph * len(glyphs))
        if held_out:
            order = glyphs[first:] + glyphs[:first]
            return next(rows[self.held_out] for rows in order if self.held_out in rows)
        rows = [row for drawn, row in glyphs[first].items() if drawn != self.held_out]
        return rows[int(style * len(rows))]

    def picture(self, row: int) -> np.ndarray:
        """RGBA uint8 [h, w, 4] of a row, cropped to its tight box."""
        x1, y1, x2, y2 = self.boxes[row]
        return np.array(self.pictures[row, y1:y2, x1:x2])
