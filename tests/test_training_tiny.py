"""The real network and generated scenes through the training command, in small."""

from __future__ import annotations

import csv

import pytest
import torch

from visionllm.data.scenes import SceneDataset
from visionllm.model.network import Network
from visionllm.train import main
from visionllm.train.checkpoint import checkpoints, read_checkpoint
from visionllm.train.config import ConfigError

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
    monkeypatch.setattr("visionllm.train.build.PRESETS", {})
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

    answers = network.detect(torch.from_numpy(sample.image)[None], [Instruction(classes=("circle", "star"))])
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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_querys=8", "model.num_querys: no such key; did you mean 'num_queries'?"),
        ("model.image_size=64", "set image_size instead"),
        ("model.heads=7", "dim must be a multiple of heads"),
        ("scenes.weight=0", "no training data"),
        ("init_backbone=missing.pth", "init_backbone: no such file: missing.pth"),
    ],
)
def test_unusable_configurations_say_why(tmp_path, capsys, override, words):
    assert main(["steps=1", f"output={tmp_path}", *SMALL, override]) == 1
    assert words in capsys.readouterr().err


def test_unknown_keys_end_the_command(capsys):
    assert main(["steps=1", "leraning_rate=1"]) == 2
    assert "leraning_rate" in capsys.readouterr().err
    assert issubclass(ConfigError, ValueError)
