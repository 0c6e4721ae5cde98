"""The command line: what it writes, says and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from colour_network import ColourNetwork, picture
from PIL import Image, ImageCms

import visionllm.pipeline
from visionllm.cli import COMMANDS, main
from visionllm.cli.predict import find_pictures, output_names


@pytest.fixture(autouse=True)
def network(monkeypatch) -> ColourNetwork:
    network = ColourNetwork()
    monkeypatch.setattr(
        visionllm.pipeline, "load", lambda model="tiny", device=None: visionllm.pipeline.VisionLLM(network)
    )
    return network


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(picture(red=(16, 8, 48, 40))).save(folder / "a.png")
    Image.fromarray(picture(blue=(80, 16, 112, 64))).save(folder / "b.jpg", quality=95)
    (folder / "notes.txt").write_text("no picture")
    return folder


def predictions(output: Path) -> dict:
    return json.loads((output / "predictions.json").read_text())


def test_predict_a_folder(folder, tmp_path, capsys):
    output = tmp_path / "out" / "deep"
    code = main(["predict", str(folder), "--classes", "blue, red", "--output", str(output)])
    assert code == 0
    written = predictions(output)
    assert written["failed"] == [] and written["classes"] == ["blue", "red"]
    assert [Path(entry["file"]).name for entry in written["pictures"]] == ["a.png", "b.jpg"]
    first = written["pictures"][0]
    assert [box["label"] for box in first["boxes"]] == ["red"]
    np.testing.assert_allclose(first["boxes"][0]["xyxy"], [16, 8, 48, 40], atol=2)
    assert first["answer"].startswith("The bounding boxes are [(<c1>, ")
    for entry in written["pictures"]:
        with Image.open(output / entry["annotated"]) as annotated:
            assert annotated.size == (entry["width"], entry["height"]) == (128, 64)
    assert sorted(path.name for path in output.iterdir()) == ["a.png", "b.jpg", "predictions.json"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"2 pictures done, 0 failed; written to {output}"
    assert any(line.endswith("a.png: 1 red") for line in lines)


def test_predict_with_an_instruction_and_globs(folder, tmp_path, network):
    text = 'Find {"red": <c0>} in <image>, absolute coordinates within the range 100, as (c, x1, y1, x2, y2).'
    patterns = [str(folder / "*.png"), str(folder / "**" / "*.jp*g"), str(folder / "a.png")]
    assert (
        main(["predict", *patterns, "--instruction", text, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    )
    written = predictions(tmp_path / "out")
    assert written["instruction"] == text
    answers = [entry["answer"] for entry in written["pictures"]]
    assert answers == [
        "The bounding boxes are [(<c0>, 12.5, 12.5, 37.5, 62.5)].",
        "The bounding boxes are [].",
    ], "each picture once"


def test_a_broken_file_is_reported_and_the_others_are_done(folder, tmp_path, capsys, network):
    (folder / "aa.png").write_bytes((folder / "a.png").read_bytes()[:60])
    arguments = [str(folder), str(folder / "gone.png"), str(folder / "x*.png"), "--classes", "red,blue"]
    code = main(["predict", *arguments, "--output", str(tmp_path / "out"), "--batch-size", "1"])
    assert code == 1
    written = predictions(tmp_path / "out")
    assert len(written["pictures"]) == 2
    assert [Path(entry["file"]).name for entry in written["failed"]] == ["x*.png", "aa.png", "gone.png"]
    errors = capsys.readouterr().err
    assert "aa.png: " in errors and "gone.png: no such file" in errors and "x*.png: matches nothing" in errors


def test_nothing_to_do(tmp_path, capsys):
    assert main(["predict", str(tmp_path), "--classes", "red", "--output", str(tmp_path / "out")]) == 1
    assert "no pictures in this folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: PATH"),
        (
            ["a.png", "--output", "out"],
            "one of the arguments --instruction --classes --ground --caption --question is",
        ),
        (["a.png", "--output", "out", "--classes", "dog,,cat"], "expected a name at position 1"),
        (["a.png", "--output", "out", "--instruction", "Find {}"], "instruction, position"),
        (["a.png", "--output", "out", "--classes", "dog", "--threshold", "2"], "expected a score in 0..1"),
        (["a.png", "--output", "out", "--classes", "dog", "--batch-size", "0"], "expected 1 or more"),
        (["a.png", "--output", ".", "--classes", "dog"], "expected another folder"),
    ],
)
def test_usage_errors_are_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["predict", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_keeps_what_is_done(folder, tmp_path, monkeypatch, network):
    find, calls = network.find, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return find(*arguments, **options)

    monkeypatch.setattr(network, "find", interrupted)
    output = tmp_path / "out"
    assert (
        main(["predict", str(folder), "--classes", "red", "--output", str(output), "--batch-size", "1"])
        == 130
    )
    assert len(predictions(output)["pictures"]) == 1


def test_find_pictures_in_order_without_repeats(folder):
    (folder / ".hidden.png").write_bytes(b"")
    found, failed = find_pictures([str(folder / "b.jpg"), str(folder)])
    assert [path.name for path in found] == ["b.jpg", "a.png"] and failed == []


def test_a_file_with_glob_characters_in_its_name(folder):
    strange = folder / "a[1].png"
    strange.write_bytes((folder / "a.png").read_bytes())
    assert find_pictures([str(strange)]) == ([strange], [])


def test_output_names_do_not_collide():
    paths = [Path("x/a.png"), Path("y/a.png"), Path("y/A.tif"), Path("a.jpg"), Path("z/a-2.png")]
    assert list(output_names(paths).values()) == ["a.png", "a-2.png", "A-3.png", "a.jpg", "a-2-2.png"]


def test_instruction_command(capsys):
    text = 'Detect {"dog": <c0>, "red car": <c1>} in <image> within the range 1024, absolute coordinates.'
    assert main(["instruction", text]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["classes"] == ["dog", "red car"] and shown["range"] == 1024
    assert shown["coordinates"] == "absolute" and shown["task"] == "detection"


def test_instruction_command_points_at_the_error(capsys):
    text = 'Detect {"dog": <c0>, "cat": <c0>} in <image>.'
    assert main(["instruction", text]) == 1
    message, excerpt, arrow = capsys.readouterr().err.rstrip("\n").split("\n")
    assert "position" in message
    position = int(message.split("position ")[1].split(":")[0])
    assert excerpt[arrow.index("^")] == text[position]


def test_commands_exist_and_show_help(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert main(["predct"]) == 2
    assert "unknown command 'predct'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"visionllm {name}" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
    arguments = ["evaluate", "--annotations", str(tmp_path / "no.json"), "--images", str(tmp_path)]
    arguments += ["--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert capsys.readouterr().err == (
        f"visionllm evaluate: {tmp_path / 'no.json'}: expected an annotation file, found nothing there\n"
    )
    monkeypatch.setenv("VISIONLLM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="expected an annotation file"):
        main(arguments)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ImportError("no module resvg"), "no module resvg"),
        (RuntimeError("VISIONLLM_ISA asks"), "VISIONLLM_ISA asks (VISIONLLM_TRACEBACK=1 shows where)"),
        (OSError(), "OSError"),
    ],
)
def test_what_this_machine_lacks_is_one_line(folder, tmp_path, capsys, monkeypatch, network, error, line):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(network, "find", fail)
    arguments = ["predict", str(folder), "--classes", "red", "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"visionllm predict: {line}\n"
    monkeypatch.setattr(network, "find", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug of ours is not one line
        main(arguments)


def test_one_picture_that_colour_management_refuses_does_not_stop_the_others(
    folder, tmp_path, capsys, monkeypatch
):
    def refuse(*arguments, **options):
        raise ImageCms.PyCMSError("cannot build transform")

    monkeypatch.setattr(ImageCms, "profileToProfile", refuse)
    Image.new("LAB", (8, 8)).save(folder / "aa.tif")
    output = tmp_path / "out"
    assert main(["predict", str(folder), "--classes", "red", "--output", str(output)]) == 1
    assert [Path(entry["file"]).name for entry in predictions(output)["pictures"]] == ["a.png", "b.jpg"]
    assert "aa.tif: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_an_output_that_is_a_file_is_refused(command, capsys):
    arguments = {
        "predict": ["a.png", "--classes", "dog"],
        "evaluate": ["--annotations", "a", "--images", "b"],
    }
    with pytest.raises(SystemExit) as stopped:
        main([command, *arguments[command], "--output", __file__])
    assert stopped.value.code == 2
    assert f"argument --output: {__file__} is a file, expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1"])
def test_scenes_are_at_least_one(count, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["scenes", "--count", count, "--output", str(tmp_path / "scenes")])
    assert stopped.value.code == 2 and "expected 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "scenes").exists()


def test_the_module_runs_as_a_program():
    run = subprocess.run([sys.executable, "-m", "visionllm", "--version"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("visionllm ")
