"""Experiments that train: variants of a configuration in small, kept and shared runs, and their tables."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import visionllm
from visionllm.cli import main
from visionllm.model.network import Network
from visionllm.reproduce.ablations import ABLATIONS, measure_boxes, measure_decoded
from visionllm.reproduce.experiments import TRAININGS, run
from visionllm.reproduce.settings import Settings
from visionllm.reproduce.training import (
    Ablation,
    Variant,
    check_variant,
    run_ablation,
    train_variant,
    what_decides,
)
from visionllm.train.config import ConfigError, load_config

SMALL = (
    "steps=2",
    "batch_size=2",
    "image_size=64",
    "model.num_queries=8",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "model.llm_layers=1",
    "init_backbone=null",
    "warmup=1",
    "log_every=1",
    "tensorboard=off",
    "validation.scenes=0",
)
COUNTS = Ablation(
    "T4c",
    "number of image tokens",
    (Variant("9", ("model.num_queries=9",), {"AP": 44.5}), Variant("8", (), {"AP": 45.2})),
    measure_boxes,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(
        output=tmp_path / "out",
        work=tmp_path / "work",
        count=2,
        processes=0,
        overrides=SMALL,
    )


def test_variants_are_trained_measured_and_kept(settings, monkeypatch):
    tables = []
    table = run_ablation(
        COUNTS, settings, lambda table, curves: tables.append((table.to_dict(), dict(curves)))
    )
    assert [row.name for row in table.rows] == ["9", "8"]
    assert all(0 <= (row.ours["AP"] or 0) <= 100 and row.note == "2 steps" for row in table.rows)
    assert len(tables) == 2, "the table is written after each run"
    first = tables[0][0]["rows"]
    assert first[0]["note"] == "2 steps" and first[1]["note"] == "", "what has not run yet has no numbers"
    minutes, losses = tables[1][1]["9"]
    assert len(minutes) == len(losses) == 2

    runs = sorted((settings.work / "runs").iterdir())
    assert len(runs) == 2 and not any((folder / "checkpoints").exists() for folder in runs)
    queries = {Network.from_pretrained(folder / "model").config.num_queries for folder in runs}
    assert queries == {8, 9}

    def untrained(argv):
        raise AssertionError("the runs are there")

    monkeypatch.setattr("visionllm.train.command.main", untrained)
    assert run_ablation(COUNTS, settings).to_dict() == table.to_dict()
    other = dataclasses.replace(COUNTS, experiment="T3b", variants=(Variant("same", ()),))
    assert run_ablation(other, settings).rows[0].ours["AP"] == table.rows[1].ours["AP"], (
        "shared between experiments"
    )
    with pytest.raises(AssertionError, match="the runs are there"):
        run_ablation(COUNTS, dataclasses.replace(settings, seeds=(7,)))


def test_an_interrupted_run_goes_on(settings, monkeypatch):
    from visionllm.train import command

    whole, calls = command.main, []

    def interrupted(argv):
        calls.append(argv)
        return 130

    monkeypatch.setattr(command, "main", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_variant(COUNTS, COUNTS.variants[1], settings, 0)
    assert "--resume" in calls[0] and calls[0][calls[0].index("--resume") + 1] == "auto"
    monkeypatch.setattr(command, "main", whole)
    assert train_variant(COUNTS, COUNTS.variants[1], settings, 0).steps == 2


def test_a_failed_run_says_its_command(settings, monkeypatch):
    from visionllm.train import command

    monkeypatch.setattr(command, "main", lambda argv: 1)
    with pytest.raises(RuntimeError, match=r"T4c, 9: training ended with 1: visionllm train .*num_queries=9"):
        run_ablation(COUNTS, settings)


def test_a_key_that_the_model_lacks_is_said_before_anything_trains(settings, monkeypatch):
    from visionllm.train import command

    monkeypatch.setattr(command, "main", lambda argv: pytest.fail("trained"))
    late = dataclasses.replace(COUNTS, variants=(*COUNTS.variants, Variant("x", ("model.image_token=9",))))
    with pytest.raises(ConfigError, match=r"model\.image_token: no such key"):
        run_ablation(late, settings)


def test_a_start_from_other_weights_takes_what_fits(settings, tmp_path):
    first = train_variant(COUNTS, COUNTS.variants[1], settings, 0)
    weights = first.folder / "model"
    begun = dataclasses.replace(settings, init=str(weights), overrides=(*SMALL, "lr=0", "backbone_lr=0"))
    ablation = dataclasses.replace(COUNTS, variants=COUNTS.variants[:1], fresh=("llm.*.k.weight",))
    table = run_ablation(ablation, begun)
    assert table.settings["anew in all variants"] == ["llm.*.k.weight"]
    [folder] = [path for path in (settings.work / "runs").iterdir() if path != first.folder]
    old, new = Network.from_pretrained(weights), Network.from_pretrained(folder / "model")
    assert new.config.num_queries == 9 and old.config.num_queries == 8
    assert torch.equal(old.llm.layers[0].q.weight, new.llm.layers[0].q.weight)
    assert new.image_tokenizer.queries.shape[0] == 9
    assert not torch.equal(old.llm.layers[0].k.weight, new.llm.layers[0].k.weight)


def test_what_decides_a_run_is_its_whole_configuration_and_its_start(settings, tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    (start / "config.json").write_text("{}")
    (start / "model.safetensors").write_bytes(b"a")
    begun = dataclasses.replace(settings, init=str(start))

    def decided(of=begun, seed=0):
        return what_decides(COUNTS, COUNTS.variants[0], of, seed)

    first = decided()
    assert decided() == first and json.dumps(first)
    assert decided(seed=1) != first and decided(settings) != first
    assert decided(dataclasses.replace(begun, overrides=(*SMALL, "lr=1e-5"))) != first
    (start / "model.safetensors").write_bytes(b"b")
    assert decided() != first


def test_location_tokens_are_decoded_both_ways(settings):
    trained = train_variant(COUNTS, COUNTS.variants[1], settings, 0)
    model = visionllm.load(trained.folder / "model")
    config = check_variant(COUNTS, COUNTS.variants[1], settings)
    numbers = measure_decoded(model, settings, config)
    assert set(numbers) == {"AP", "AP50", "AP75", "AP by expectation"}
    assert model.network.config.coordinate_window == 6, "as before"


def test_the_preset_can_be_loaded():
    config = load_config("ablation")
    assert config.preset == "tiny" and config.max_minutes > 0 and config.validation.every == 0


def test_the_command_writes_table_and_plot(settings, monkeypatch, capsys):
    monkeypatch.setitem(ABLATIONS, "T4c", COUNTS)
    folders = ["--output", str(settings.output), "--work", str(settings.work)]
    assert main(["reproduce", "T4c", "--count", "2", "--processes", "0", *folders, *SMALL]) == 0
    content = json.loads((settings.output / "T4c" / "table.json").read_text())
    assert content["settings"]["minutes of training a variant"] == "5"
    assert content["commands"][0].startswith("visionllm reproduce T4c --count 2 --processes 0 steps=2")
    assert (settings.output / "T4c" / "plot.png").stat().st_size > 5000
    assert run("T4c", settings) == settings.output / "T4c"


@pytest.mark.parametrize("experiment", TRAININGS)
def test_every_variant_is_a_configuration(experiment, settings):
    """Of the real ablations: every key exists and every value fits."""
    ablation = ABLATIONS[experiment]
    assert ablation.experiment == experiment
    plain = dataclasses.replace(settings, overrides=("init_backbone=null",))
    for variant in ablation.variants:
        check_variant(ablation, variant, plain)


@pytest.mark.parametrize("experiment", TRAININGS)
def test_every_variant_trains(experiment, settings):
    """Two steps of every variant that is not the configuration itself."""
    ablation = ABLATIONS[experiment]
    overrides = [word for word in SMALL if not word.startswith("model.num_queries")]
    small = dataclasses.replace(settings, overrides=(*overrides, "mixture.prompts.usual_count=[4, 6, 8]"))
    if experiment == "T4c":
        # 64 pixels have 85 positions.
        names = {"50": "5", "100": "10", "200": "20", "300": "30"}
        variants = tuple(
            dataclasses.replace(v, changes=(f"model.num_queries={names[v.name]}",)) for v in ablation.variants
        )
        ablation = dataclasses.replace(ablation, variants=variants[:1])
    for variant in ablation.variants:
        if variant.changes:
            assert train_variant(ablation, variant, small, 0).steps == 2
