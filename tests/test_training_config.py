"""Configuration of training runs: layers, types, unknown keys."""

from __future__ import annotations

import pytest

from visionllm.instruction.instruction import TASKS
from visionllm.model.config import PRESETS
from visionllm.train.command import parser, settle
from visionllm.train.config import (
    LEAST,
    ConfigError,
    TrainConfig,
    config_to_dict,
    load_config,
    preset_names,
    read_config,
    write_config,
)


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 1e-3\nbatch_size: 3\nscenes: {weight: 2}\n")
    config = load_config("tiny", file, ["batch_size=5", "scenes.glyphs=art", "model.num_queries=64"])
    assert (config.lr, config.batch_size, config.scenes.weight) == (1e-3, 5, 2.0)
    assert config.scenes.glyphs == "art"
    assert config.model == {"keep_pretrained": True, "num_queries": 64}
    assert config.backbone_lr == load_config("tiny").backbone_lr


def test_the_least_values_are_accepted():
    keys = ("scenes.weight", "checkpoint.minutes", "checkpoint.steps", "validation.every", "lr")
    overrides = [f"{key}=0" for key in keys]
    config = load_config(overrides=[*overrides, "betas=[0,0]", "lr_floor=1", "validation.top=1"])
    assert (config.betas, config.lr_floor, config.validation.top) == ((0.0, 0.0), 1.0, 1)


def test_every_limit_is_of_a_key():
    config = load_config(
        overrides=[
            "photos=[{annotations: a, images: b}]",
            "scenes.cutouts={annotations: a, images: b}",
        ]
    )
    for key in LEAST:
        value = config
        for part in key.split("."):
            value = getattr(value[0] if isinstance(value, list) else value, part)
        assert isinstance(value, (int, float)), key


@pytest.mark.parametrize("preset", preset_names())
def test_presets_are_valid(preset):
    assert load_config(preset).preset in PRESETS


def test_the_second_stage_trains_all_tasks_but_not_the_backbone():
    first = load_config(overrides=["steps=5"], stage=1)
    assert first.mixture["tasks"] == {"detection": 1} and first.frozen == []
    assert first.mixture["prompts"] == load_config().mixture["prompts"]  # the preset's stay
    second = load_config(overrides=["steps=5", "init=stage1", "mixture.tasks.vqa=7"], stage=2)
    assert set(second.mixture["tasks"]) == set(TASKS)
    assert second.mixture["tasks"]["vqa"] == 7 and second.frozen == ["image_tokenizer.backbone.*"]
    with pytest.raises(ConfigError, match="stage 2 goes on from weights of stage 1: name them with init=DIR"):
        load_config(stage=2)
    with pytest.raises(ConfigError, match="unknown stage 3; there are 1, 2"):
        load_config(stage=3)


def test_the_stage_is_an_argument_of_a_new_run(tmp_path):
    arguments = ["--stage", "2", f"output={tmp_path}", "init=stage1", "steps=5"]
    config, _ = settle(parser().parse_intermixed_args(arguments))
    assert config.frozen == ["image_tokenizer.backbone.*"]
    write_config(config, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="brings its own configuration: .* instead of --stage"):
        settle(parser().parse_intermixed_args(["--resume", str(tmp_path), "--stage", "2"]))


def test_photos_are_typed():
    config = load_config(overrides=["photos=[{annotations: a.json, images: b, weight: '3'}]"])
    assert config.photos[0].weight == 3.0
    assert config.photos[0].images == "b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lrr=1", ["lrr", "'lr'"]),
        ("scenes.wieght=1", ["wieght", "'weight'"]),
        ("photos=[{annotation: x}]", ["annotation", "'annotations'"]),
        ("batch_size=many", ["batch_size=many", "many", "Integer"]),
        ("batch_size=0", ["batch_size", "at least 1", "got 0"]),
        ("autocast=maybe", ["autocast", "auto, on, off", "'maybe'"]),
        ("lr=-1", ["lr", "got -1"]),
        ("lr=nan", ["lr", "got nan"]),
        ("ema_decay=1", ["ema_decay"]),
        ("lr", ["key=value", "'lr'"]),
        ("max_minutes=0", ["steps", "max_minutes"]),
        ("photos=[{annotations: x}]", ["images"]),
        ("seed=-1", ["seed", "got -1"]),
        ("betas=[0.9,1]", ["betas[1]", "[0, 1)", "got 1"]),
        ("betas=[-0.1,0.9]", ["betas[0]", "got -0.1"]),
        ("lr_floor=1.5", ["lr_floor", "[0, 1]", "got 1.5"]),
        ("scenes.weight=-1", ["scenes.weight", "finite number >= 0", "got -1"]),
        ("scenes.weight=inf", ["scenes.weight", "finite number >= 0", "got inf"]),
        ("scenes.cutouts={annotations: a, images: b, per_class: 0}", ["scenes.cutouts.per_class", "got 0"]),
        (
            "photos=[{annotations: a, images: b},{annotations: a, images: b, weight: nan}]",
            ["photos[1].weight", "got nan"],
        ),
        ("validation.every=-1", ["validation.every", "got -1"]),
        ("validation.scenes=-1", ["validation.scenes", "got -1"]),
        ("validation.heldout=-1", ["validation.heldout", "got -1"]),
        ("validation.names=0", ["validation.names", "at least 1", "got 0"]),
        ("validation.photo_limit=-1", ["validation.photo_limit", "got -1"]),
        ("validation.top=0", ["validation.top", "at least 1", "got 0"]),
        ("validation.batch_size=0", ["validation.batch_size", "at least 1", "got 0"]),
        ("checkpoint.minutes=-1", ["checkpoint.minutes", "got -1"]),
        ("checkpoint.minutes=nan", ["checkpoint.minutes", "got nan"]),
        ("checkpoint.steps=-1", ["checkpoint.steps", "got -1"]),
        ("checkpoint.keep=0", ["checkpoint.keep", "at least 1", "got 0"]),
    ],
)
def test_errors_name_the_key(override, words):
    with pytest.raises(ConfigError) as raised:
        load_config(overrides=[override])
    for word in words:
        assert word in str(raised.value)


def test_errors_name_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("stepz: 3\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*stepz.*'steps'"):
        load_config(file=file)
    file.write_text("steps: [3\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml is not YAML"):
        load_config(file=file)
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(file=tmp_path / "other.yaml")


def test_steps_and_minutes_replace_each_other():
    assert load_config(overrides=["steps=7"]).max_minutes == 0
    assert load_config(overrides=["steps=7", "max_minutes=2"]).steps == 0
    with pytest.raises(ConfigError, match="unknown preset 'huge'"):
        load_config("huge")


def test_round_trip(tmp_path):
    config = load_config(overrides=["steps=7", "photos=[{annotations: a, images: b}]", "model.delay=0.5"])
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert config_to_dict(config)["photos"][0]["annotations"] == "a"
    assert isinstance(read_config(tmp_path / "config.yaml", ["lr=1"]), TrainConfig)


def test_an_earlier_run_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-00000003.safetensors").touch()
    arguments = [f"output={tmp_path}", "steps=5"]
    with pytest.raises(ConfigError, match="--resume"):
        settle(parser().parse_intermixed_args(arguments))
    _, checkpoint = settle(parser().parse_intermixed_args(["--resume", "auto", *arguments]))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-00000003.safetensors"


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        settle(parser().parse_intermixed_args(["--resume", str(tmp_path)]))
    write_config(load_config(overrides=["steps=5"]), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="no checkpoint"):
        settle(parser().parse_intermixed_args(["--resume", str(tmp_path)]))
