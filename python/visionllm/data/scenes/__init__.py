"""Generated scenes: nameable objects on drawn or photo backgrounds, with exact boxes, areas and masks."""

from __future__ import annotations

from visionllm.data.scenes.dataset import SPLITS, SceneDataset

__all__ = ["SPLITS", "SceneDataset"]
