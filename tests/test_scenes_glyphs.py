"""The glyph atlas: names, icon sets, rasterising, the command."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from visionllm import cli
from visionllm.data.scenes import SceneDataset, glyphs
from visionllm.data.scenes.atlas import HELD_OUT_STYLE, GlyphAtlas
from visionllm.data.scenes.backgrounds import COCO_NAMES, PHOTO_THINGS
from visionllm.data.scenes.dataset import RELATED
from visionllm.data.scenes.glyphs import SETS, IconSet, class_glyphs, glyph_aliases, main, rasterise
from visionllm.data.scenes.shapes import SHAPE_NAMES

ICONS = {
    "width": 64,
    "height": 32,
    "icons": {
        "dog": {"body": '<rect x="8" y="8" width="16" height="8" fill="#ff0000"/>'},
        "bear-face": {"body": '<circle cx="32" cy="16" r="9" fill="#00ff00"/>', "width": 64},
        "apple": {"body": "<g/>"},
    },
    "aliases": {"bear": {"parent": "bear-face"}, "dog-face": {"parent": "dog", "hFlip": True}},
}


def archive(folder: Path, style: str, icons: dict) -> None:
    """An npm archive of a set, as `npm pack` names it."""
    source = SETS[style]
    data = json.dumps(icons).encode()
    with tarfile.open(folder / f"iconify-json-{style}-{source.version}.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def test_enough_nameable_classes() -> None:
    names = class_glyphs()
    assert 300 <= len(names) and len(names) + len(SHAPE_NAMES) <= 512
    assert not set(names) & set(SHAPE_NAMES)
    assert all(name == name.strip() and "_" not in name for name in names)


def test_no_glyph_shows_two_classes() -> None:
    glyphs = [glyph for glyphs in class_glyphs().values() for glyph in glyphs]
    assert len(glyphs) == len(set(glyphs))


def test_name_lists_refer_to_classes() -> None:
    names = set(class_glyphs())
    glyphs = {glyph for glyphs in class_glyphs().values() for glyph in glyphs}
    assert len(COCO_NAMES) == 80
    assert set(PHOTO_THINGS) <= names - set(COCO_NAMES)
    assert set(RELATED) <= names
    assert {name for related in RELATED.values() for name in related} <= names | set(COCO_NAMES)
    for style, aliases in glyph_aliases().items():
        assert style in SETS
        assert set(aliases) <= glyphs, f"{style}: {sorted(set(aliases) - glyphs)}"


def test_sets() -> None:
    assert HELD_OUT_STYLE in SETS and len(SETS) >= 4
    assert not any("openmoji" in source.package for source in SETS.values())


def test_find_knows_spellings() -> None:
    icons = {"icons": {"teddybear": {}, "pizza-1": {}, "cat": {}, "catside": {}, "aubergine": {}}}
    fxemoji = IconSet("fxemoji", icons)
    assert fxemoji.find("eggplant") == "aubergine"
    assert fxemoji.find("cat") == "catside" and fxemoji.find("cat-face") == "cat"
    assert fxemoji.find("teddy-bear") is None  # shows something else there
    assert fxemoji.find("zebra") is None
    noto = IconSet("noto", icons)
    assert (
        noto.find("teddy-bear") == "teddybear"
        and noto.find("pizza") == "pizza-1"
        and noto.find("cat") == "cat"
    )


def test_rasterise_fills_the_square() -> None:
    pytest.importorskip("resvg_py")
    icons = IconSet("noto", ICONS)
    drawn = rasterise(icons, "dog", 64)
    assert drawn is not None
    picture, box = drawn
    assert picture.shape == (64, 64, 4)
    np.testing.assert_allclose(box, (0, 16, 64, 48), atol=1)  # 2:1, the longer side fills it
    assert picture[32, 32].tolist() == [255, 0, 0, 255]
    assert rasterise(icons, "apple", 64) is None


def test_alias_flip() -> None:
    pytest.importorskip("resvg_py")
    body = '<rect width="8" height="16" fill="#ff0000"/><rect x="8" width="8" height="16" fill="#0000ff"/>'
    document = {"icons": {"a": {"body": body}}, "aliases": {"b": {"parent": "a", "hFlip": True}}}
    icons = IconSet("noto", document)
    for key, left in (("a", [255, 0, 0]), ("b", [0, 0, 255])):
        drawn = rasterise(icons, key, 32)
        assert drawn is not None and drawn[0][16, 4, :3].tolist() == left


def test_command_builds_an_atlas_that_scenes_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py")
    for style in ("noto", "twemoji"):
        archive(tmp_path, style, ICONS)
    output = tmp_path / "atlas"
    arguments = ["--output", str(output), "--packages", str(tmp_path), "--styles", "noto", "twemoji"]
    assert main(arguments) == 0
    assert "8 glyphs" in capsys.readouterr().out  # dog, dog-face, bear, bear-face in two styles
    atlas = GlyphAtlas(output)
    assert atlas.names == ("bear", "dog") and atlas.styles == ("noto", "twemoji")
    names = {name for index in range(60) for name in SceneDataset("train", glyphs=output)[index].names}
    assert {"bear", "dog"} & names


def npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An npm that does what the script says."""
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_failed_download_names_the_package_and_the_reason(tmp_path: Path, monkeypatch, capsys) -> None:
    npm(tmp_path, "echo 'npm error 404 Not Found' >&2; exit 7", monkeypatch)
    assert cli.main(["glyphs", "--output", str(tmp_path / "atlas"), "--styles", "noto"]) == 1
    assert capsys.readouterr().err == (
        "visionllm glyphs: iconify-json-noto-1.2.9.tgz: npm could not download @iconify-json/noto: "
        "npm error 404 Not Found\n"
    )


def test_a_download_that_hangs_ends(tmp_path: Path, monkeypatch) -> None:
    npm(tmp_path, "exec sleep 60", monkeypatch)
    monkeypatch.setattr(glyphs, "NPM_SECONDS", 0.2)
    with pytest.raises(OSError, match=r"npm did not download @iconify-json/noto within 0\.2 s"):
        main(["--output", str(tmp_path / "atlas"), "--styles", "noto"])


def test_a_missing_renderer_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    archive(tmp_path, "noto", ICONS)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    arguments = ["--output", str(tmp_path / "atlas"), "--packages", str(tmp_path), "--styles", "noto"]
    assert cli.main(["glyphs", *arguments]) == 1
    expected = "visionllm glyphs: the glyph atlas needs resvg-py: pip install resvg-py\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "content", [b"", b"no archive", gzip.compress(b"no tar"), gzip.compress(b"x" * 99)[:30]]
)
def test_a_broken_archive_is_named(tmp_path: Path, content: bytes) -> None:
    archive(tmp_path, "noto", ICONS)
    path = next(tmp_path.glob("*.tgz"))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}: expected an archive with package/icons\.json"):
        main(["--output", str(tmp_path / "atlas"), "--packages", str(tmp_path), "--styles", "noto"])


def test_no_npm_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"npm is needed .*iconify-json-noto-.*\.tgz in --packages"):
        main(["--output", str(tmp_path / "atlas"), "--packages", str(tmp_path), "--styles", "noto"])
