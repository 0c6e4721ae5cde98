"""ResNet-50 as torchvision and timm publish it (their names are the same), or transformers.

conv1.weight, bn1.weight, layer1.0.conv1.weight, …, fc.weight                       torchvision, timm
[resnet.]embedder.embedder.convolution.weight, encoder.stages.0.layers.0.layer.0.…  transformers
"""

from __future__ import annotations

from collections.abc import Mapping

from visionllm.convert.keys import Rule, Shape, Step, plan
from visionllm.convert.source import Source
from visionllm.model.resnet import BLOCKS

# Of a batch norm here and there.
NORM = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}
INSIDE = ("reduce", "spatial", "expand")  # a block's convolutions, first to last
HEAD = "the classifier: the trunk ends with C5"
COUNTER = "counts the batches of a training; the norms are frozen"


def resnet_rules(source: str = "", target: str = "") -> list[Rule]:
    """Rules of both layouts.

    Args:
        source: regular expression of what stands before every source name.
        target: what stands before every name here.
    """
    rules = [
        Rule(source + r"fc\.(weight|bias)", None, why=HEAD),
        Rule(source + r"classifier\.1\.(weight|bias)", None, why=HEAD),
        Rule(source + r".*\.num_batches_tracked", None, why=COUNTER),
    ]

    def convolution(name: str, weight: str, norm: str) -> None:
        rules.append(Rule(source + weight + r"\.weight", f"{target}{name}.weight"))
        for here, there in NORM.items():
            rules.append(Rule(source + norm + rf"\.{there}", f"{target}{name}.{here}"))

    def hugging_face(name: str, place: str) -> None:
        place = r"(?:resnet\.)?" + place
        convolution(name, place + r"\.convolution", place + r"\.normalization")

    convolution("stem", "conv1", "bn1")
    hugging_face("stem", r"embedder\.embedder")
    for stage in range(len(BLOCKS)):
        block, here = rf"layer{stage + 1}\.(\d+)", rf"stages.{stage}.\1"
        block_of_hugging_face = rf"encoder\.stages\.{stage}\.layers\.(\d+)"
        for i, name in enumerate(INSIDE):
            convolution(f"{here}.{name}", rf"{block}\.conv{i + 1}", rf"{block}\.bn{i + 1}")
            hugging_face(f"{here}.{name}", rf"{block_of_hugging_face}\.layer\.{i}")
        convolution(f"{here}.shortcut", rf"{block}\.downsample\.0", rf"{block}\.downsample\.1")
        hugging_face(f"{here}.shortcut", rf"{block_of_hugging_face}\.shortcut")
    return rules


def resnet_steps(source: Source, target: Mapping[str, Shape], where: str) -> list[Step]:
    """Of `model.resnet.ResNet50`, whose names and shapes are the target.

    Raises:
        ConvertError: as `plan`.
    """
    return plan(source.shapes, target, resnet_rules(), where)
