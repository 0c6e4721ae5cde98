"""The Deformable-DETR family of ``transformers`` on the compiled operator.

Deformable DETR, RT-DETR, Grounding DINO and their relatives each carry a module class
``MultiScaleDeformableAttention`` without parameters, in plain PyTorch. ``accelerate_hugging_face`` exchanges
its instances in a model; weights, outputs and state-dict names stay as they are.
"""

from __future__ import annotations

import inspect
from typing import TypeVar

from torch import Tensor, nn

from visionllm.ops.ms_deform_attn import ms_deform_attn

__all__ = ["MultiScaleDeformableAttention", "accelerate_hugging_face"]

Model = TypeVar("Model", bound=nn.Module)


class MultiScaleDeformableAttention(nn.Module):
    """Drop-in for the class of the same name in ``transformers``; has no parameters."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """As ``visionllm.ops.ms_deform_attn``: value [B, S, H, D], ..., -> [B, Q, H * D].

        ``value_spatial_shapes_list`` repeats ``value_spatial_shapes``, and ``im2col_step`` tunes another
        kernel: neither is used.
        """
        return ms_deform_attn(
            value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights
        )


def accelerate_hugging_face(model: Model) -> Model:
    """Make a model of ``transformers`` use the compiled multi-scale deformable attention, in place.

    Args:
        model: any module with ``MultiScaleDeformableAttention`` modules of ``transformers`` in it.

    Returns:
        The same model. Calling it again changes nothing.

    Raises:
        ValueError: there is no such module in the model, or one of a variant that computes something else.
    """
    found = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MultiScaleDeformableAttention):
                found += 1
            elif type(child).__name__ == "MultiScaleDeformableAttention":
                _check_replaceable(child)
                setattr(parent, name, MultiScaleDeformableAttention().train(child.training))
                found += 1
    if found == 0:
        raise ValueError(
            f"{type(model).__name__} has no MultiScaleDeformableAttention module; expected a model of the "
            "Deformable-DETR family of transformers, such as DeformableDetrForObjectDetection"
        )
    return model


def _check_replaceable(module: nn.Module) -> None:
    """Refuses a module of that name whose arguments or state are not the ones this file replaces."""
    expected = list(inspect.signature(MultiScaleDeformableAttention.forward).parameters)
    got = list(inspect.signature(type(module).forward).parameters)
    if got != expected or any(True for _ in module.parameters()):
        raise ValueError(
            f"{type(module).__module__}.MultiScaleDeformableAttention takes ({', '.join(got[1:])}); "
            f"expected ({', '.join(expected[1:])}) and no parameters"
        )
