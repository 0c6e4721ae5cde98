"""The real network and generated scenes through the training command, in small."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from visionllm.data.scenes import SceneDataset
from visionllm.model.network import Network
from visionllm.train import build, main
from visionllm.train.checkpoint import checkpoints, read_checkpoint
from visionllm.train.config import ConfigError, PhotosConfig

SMALL = [
    "processes=0",
    "batch_size=2",
    "image_size=64",
    "model.num_queries=8",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "model.llm_layers=1",
    "init_backbone=null",
    "warmup=2",
    "log_every=1",
    "tensorboard=off",
    "checkpoint.steps=2",
    "validation.scenes=3",
    "validation.every=3",
]
SKIP = {"on_error": "skip"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four steps."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    assert main(["steps=4", f"output={folder}", *SMALL]) == 0
    return folder


def test_losses_are_logged(folder):
    with open(folder / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    terms = [key for key in rows[0] if rows[0][key]]
    assert {"total", "class", "location", "lr", "samples_per_s", "seconds_forward"} <= set(terms)
    with open(folder / "validation.csv", newline="") as file:
        validations = list(csv.DictReader(file))
    assert [row["step"] for row in validations] == ["3", "4"]
    assert all(0 <= float(row["scenes/AP50"]) <= 100 for row in validations)


def test_resuming_is_exact_whatever_happens_to_the_preset(folder, tmp_path, monkeypatch):
    assert main(["steps=4", f"output={tmp_path}", *SMALL]) == 0
    checkpoints(tmp_path / "checkpoints")[-1].unlink()
    monkeypatch.setattr("visionllm.train.inputs.PRESETS", {})
    assert main(["--resume", str(tmp_path)]) == 0
    whole, _ = read_checkpoint(checkpoints(folder / "checkpoints")[-1])
    resumed, state = read_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
    assert state["step"] == 4
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_the_export_is_a_pretrained_folder(folder):
    network = Network.from_pretrained(folder / "model")
    averages, _ = read_checkpoint(checkpoints(folder / "checkpoints")[-1])
    for name, parameter in network.named_parameters():
        if f"average.{name}" in averages:
            assert torch.equal(parameter, averages[f"average.{name}"]), name
    assert network.config.image_size == 64
    sample = SceneDataset("val", size=64)[0]
    from visionllm.instruction import Instruction

    answers = network.find(torch.from_numpy(sample.image)[None], [Instruction(classes=("circle", "star"))])
    assert torch.isfinite(answers[0].scores).all()


def test_a_run_starts_from_exported_weights(folder, tmp_path):
    rest = [entry for entry in SMALL if not entry.startswith("model.")]
    assert (
        main(["steps=1", f"output={tmp_path}", f"init={folder / 'model'}", "lr=0", "backbone_lr=0", *rest])
        == 0
    )
    started, _ = read_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
    for name, parameter in Network.from_pretrained(folder / "model").named_parameters():
        assert torch.equal(started[f"model.{name}"], parameter), name


def test_words_alone_over_what_other_runs_know(folder, tmp_path):
    """Batches that come again, resumed bit for bit; known names stay where no task lists any."""
    rest = [entry for entry in SMALL if not entry.startswith(("model.", "validation."))]
    frozen = "frozen=[image_tokenizer.*,text_encoder.*,embedding.*,llm.layers.*]"
    own = ["model.word_layers=1", frozen, "repeat=2", "mixture.tasks={vqa: 1}", "validation.every=0"]
    sets = ["validation.scenes=0", "validation.heldout=0", "validation.tasks=0", "checkpoint.keep=3"]
    assert main(["steps=5", f"output={tmp_path}", f"init={folder / 'model'}", *rest, *own, *sets]) == 0
    known = Network.from_pretrained(folder / "model").known_names
    assert known and Network.from_pretrained(tmp_path / "model").known_names == known
    last = checkpoints(tmp_path / "checkpoints")[-1]
    whole, _ = read_checkpoint(last)
    last.unlink()
    assert main(["--resume", str(tmp_path)]) == 0
    resumed, state = read_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
    assert state["step"] == 5
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert Network.from_pretrained(tmp_path / "model").known_names == known


def broken_photos(folder):
    """A data set of three pictures, one of which is missing, and one annotation without its area."""
    folder.mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(3)]
    for i in range(2):
        Image.new("RGB", (40, 30), (i, 90, 7)).save(folder / f"{i}.png")
    entries = [{"id": i, "image_id": i % 2, "category_id": 1, "bbox": [2, 3, 9, 9]} for i in range(4)]
    for entry in entries[1:]:
        entry.update(area=81, iscrowd=0)
    content = {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "photos.json").write_text(json.dumps(content))
    return f"annotations: {folder / 'photos.json'}, images: {folder}"


def test_what_a_data_set_leaves_out_is_said(tmp_path, caplog):
    wrong = broken_photos(tmp_path / "photos")
    photos = PhotosConfig(str(tmp_path / "photos" / "photos.json"), str(tmp_path / "photos"), options=SKIP)
    assert len(build.photos(photos, first=False)) == 2
    assert caplog.text == ""
    assert len(build.photos(photos, first=True)) == 2
    for words in ("photos.json", "2 problems; usable: 2 of 3 images", "2.png", "annotations[0].area"):
        assert words in caplog.text, wrong
    assert "more" not in caplog.text


def test_of_many_problems_the_first_are_shown(tmp_path, caplog):
    broken_photos(tmp_path / "photos")
    file = tmp_path / "photos" / "photos.json"
    content = json.loads(file.read_text())
    content["annotations"] += [{"id": 10 + i, "image_id": 0, "category_id": 7} for i in range(30)]
    file.write_text(json.dumps(content))
    dataset = build.photos(PhotosConfig(str(file), str(file.parent), options=SKIP), first=True)
    assert f"... and {len(dataset.report.problems) - 5} more" in caplog.text
    assert len(caplog.text.splitlines()) == 1 + 5 + 1


def test_errors_that_only_the_processes_find_are_said_once(tmp_path):
    wrong = broken_photos(tmp_path / "photos")
    overrides = ["processes=2", "steps=1", f"output={tmp_path / 'run'}", f"photos=[{{{wrong}}}]"]
    done = subprocess.run(
        [sys.executable, "-m", "visionllm.train", *SMALL[1:], *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.count("visionllm train: 2 problems in the data set") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_unknown_keys_end_the_command(capsys):
    assert main(["steps=1", "leraning_rate=1"]) == 2
    assert "leraning_rate" in capsys.readouterr().err
    assert issubclass(ConfigError, ValueError)
