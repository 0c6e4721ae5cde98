"""EfficientNet-Lite0 trunk with its batch norms folded away, giving C3, C4 and C5 (strides 8, 16, 32).

Convolution, bias and ReLU6 only: a folded batch norm costs no memory pass, and with few pictures per step its
statistics would be noise anyway (detectors freeze them for that reason). Source of the architecture: Tan &
Le, EfficientNet (1905.11946), and the Lite variant without squeeze-and-excitation; "same" padding as in its
published weights, which puts the odd row and column at the bottom right.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from visionllm.model.convolution import Convolution, Edges

# (repeats, kernel, stride, expansion, output channels) of the seven stages.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
OUTPUT_STAGES = (2, 4, 6)  # C3, C4, C5
OUTPUT_CHANNELS = tuple(STAGES[i][4] for i in OUTPUT_STAGES)
# The statistics the published weights expect, on pixel values 0..255.
PIXEL_MEAN, PIXEL_STD = 127.0, 128.0  # of every channel


def normalised(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] → fp32 [B, 3, H, W], channels last in memory, as oneDNN likes it."""
    return ((images.float() - PIXEL_MEAN) / PIXEL_STD).permute(0, 3, 1, 2)


class SameConv(Convolution):
    """Convolution whose output is ceil(input / stride): any odd padding goes to the bottom and the right."""

    def edges(self, x: Tensor) -> Edges:
        (kernel,), (stride,) = set(self.kernel_size), set(self.stride)
        height, width = (max((-(-s // stride) - 1) * stride + kernel - s, 0) for s in x.shape[-2:])
        return width // 2, width - width // 2, height // 2, height - height // 2


class DepthwiseConv(SameConv):
    """Depthwise convolution; strided ones leave bf16 autocast while gradients are needed.

    Why: their bf16 input gradient on a CPU took 3 to 7 ms a picture, in fp32 0.3 ms (oneDNN, AVX-512).
    """

    def convolve(self, x: Tensor, edges: Edges) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if self.stride == (1, 1) or x.device.type != "cpu" or not needs_gradient:
            return super().convolve(x, edges)
        with torch.autocast(x.device.type, enabled=False):
            return super().convolve(x.float(), edges)


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise convolution, linear 1×1 projection, and the shortcut where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = SameConv(inputs, hidden, 1) if expansion != 1 else None
        self.depthwise = DepthwiseConv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = SameConv(hidden, outputs, 1)
        self.shortcut = stride == 1 and inputs == outputs

    def share_depthwise(self, other: InvertedResidual) -> None:
        """Uses the other block's depthwise convolution, which stays a part of that block alone."""
        del self.depthwise
        object.__setattr__(self, "depthwise", other.depthwise)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x, relu6=True)
        y = self.depthwise(y, relu6=True)
        return self.project(y, shortcut=x if self.shortcut else None)


def blocks_of(stages: Iterable[nn.Module]) -> list[InvertedResidual]:
    return [block for stage in stages for block in stage.children() if isinstance(block, InvertedResidual)]


def fold_batch_norm(
    conv: nn.Conv2d, state: Mapping[str, Tensor], weight: str, norm: str, epsilon: float
) -> None:
    """Fills a convolution with a published one (name `weight`) and the batch norm behind it."""
    scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + epsilon)
    with torch.no_grad():
        conv.weight.copy_(state[f"{weight}.weight"] * scale[:, None, None, None])
        assert conv.bias is not None
        conv.bias.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)


class EfficientNetLite(nn.Module):
    """Picture ``[B, 3, H, W]`` (normalised by PIXEL_MEAN, PIXEL_STD) to ``[C3, C4, C5]``.

    Training on one kind of pictures unlearns the others: after four hours of mostly drawings, a linear probe
    on the trained C3 to C5 named 26 % of the large objects of photos never seen (people left out), on the
    pretrained ones 47 %. With `keep_pretrained` the stages that training changes stand there twice, and their
    pretrained C4 and C5 follow: ``[C3, C4, C5, pretrained C4, pretrained C5]``. Frozen depthwise convolutions
    stand there once.

    Args:
        frozen_stages: the stem and this many stages get no gradient, so that training neither stores nor
            walks back through the largest feature maps.
        freeze_depthwise: the depthwise convolutions get no gradient. They hold 5 % of the values, and their
            weight gradient (which a bias's gradient brings with it) took more time on a CPU than all the rest
            of the trunk's backward pass.
        keep_pretrained: see above; needs frozen stages, which end with C3.

    Raises:
        ValueError: keep_pretrained with other frozen stages.
    """

    def __init__(
        self, frozen_stages: int = 0, freeze_depthwise: bool = False, keep_pretrained: bool = False
    ) -> None:
        super().__init__()
        self.frozen_stages = frozen_stages
        self.stem = SameConv(3, STEM_CHANNELS, 3, 2)
        stages, channels = [], STEM_CHANNELS
        for repeats, kernel, stride, expansion, outputs in STAGES:
            blocks = []
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                nn.init.zeros_(module.bias)
        self.pretrained = None
        if keep_pretrained:
            if frozen_stages != OUTPUT_STAGES[0] + 1:
                raise ValueError(
                    f"keep_pretrained: expected {OUTPUT_STAGES[0] + 1} frozen stages, got {frozen_stages}"
                )
            self.pretrained = copy.deepcopy(self.stages[frozen_stages:]).requires_grad_(False)
            if freeze_depthwise:
                for own, kept in zip(
                    blocks_of(self.stages[frozen_stages:]), blocks_of(self.pretrained), strict=True
                ):
                    kept.share_depthwise(own)
        for module in (self.stem, *self.stages[:frozen_stages]):
            module.requires_grad_(False)
        if freeze_depthwise:
            for module in self.modules():
                if isinstance(module, DepthwiseConv):
                    module.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        c3 = self.first_stages(x)
        pretrained = self.late_stages(c3, pretrained=True) if self.pretrained is not None else []
        return [c3, *self.late_stages(c3), *pretrained]

    def first_stages(self, x: Tensor) -> Tensor:
        """Picture → C3."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen_stages == 0):
            x = self.stem(x, relu6=True)
        for i, stage in enumerate(self.stages[: OUTPUT_STAGES[0] + 1]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= self.frozen_stages):
                x = stage(x)
        return x

    def late_stages(self, x: Tensor, pretrained: bool = False) -> list[Tensor]:
        """C3 → [C4, C5], by the trained stages or those of `keep_pretrained`."""
        first, features = OUTPUT_STAGES[0] + 1, []
        stages = self.stages[first:]
        if pretrained:
            assert self.pretrained is not None
            stages = self.pretrained
        for i, stage in enumerate(stages, first):
            trained = not pretrained and i >= self.frozen_stages
            with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
                x = stage(x)
            if i in OUTPUT_STAGES:
                features.append(x)
        return features

    def pretrained_c5(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → C5 by the stages of `keep_pretrained`, [B, C, H / 32, W / 32]."""
        return self.late_stages(self.first_stages(normalised(images)), pretrained=True)[1]

    def load_imagenet(
        self, state: dict[str, Tensor], epsilon: float = 1e-3, pretrained_only: bool = False
    ) -> None:
        """Folds the batch norms of a published EfficientNet-Lite0 state dict into this trunk.

        Args:
            state: names as in the `efficientnet-lite-pytorch` package (``_conv_stem.weight``,
                ``_bn0.weight``, ``_blocks.0._depthwise_conv.weight``, …).
            pretrained_only: fill only the stages that training does not follow (`keep_pretrained`).

        Raises:
            KeyError, RuntimeError: a name is missing or a shape differs.
        """

        def fold(conv: nn.Conv2d, weight: str, norm: str) -> None:
            fold_batch_norm(conv, state, weight, norm, epsilon)

        def fold_stages(stages: Iterable[nn.Module], first: int) -> None:
            for i, block in enumerate(blocks_of(stages), first):
                if block.expand is not None:
                    fold(block.expand, f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
                if "depthwise" in block._modules:  # not another block's
                    fold(block.depthwise, f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
                fold(block.project, f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")

        if not pretrained_only:
            fold(self.stem, "_conv_stem", "_bn0")
            fold_stages(self.stages, 0)
        if self.pretrained is not None:
            fold_stages(self.pretrained, sum(stage[0] for stage in STAGES[: self.frozen_stages]))
