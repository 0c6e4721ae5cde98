"""What all experiments are told: data, weights, budget, where to write."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DATA = ("scenes", "coco")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Settings:
    """The command line of ``visionllm reproduce``."""

    output: Path  # a folder per experiment goes there
    work: Path  # scenes, runs and what else is kept between calls
    data: str = "scenes"  # one of DATA
    glyphs: Path | None = None  # atlas for scenes; None: the 80 shapes that the package draws itself
    # Folder of photos with train/, val/ and annotations/instances_{train,val}.json: the data with "coco",
    # backgrounds with "scenes".
    photos: Path | None = None
    lvis: Path | None = None  # LVIS annotations: names for the large vocabulary
    model: str = "tiny"  # weights that evaluations run on
    count: int = 200  # pictures evaluated
    batch_size: int = 8  # of evaluation
    device: str | None = None
    preset: str = "ablation"  # training configuration that variants change
    minutes: float = 5.0  # training time of each variant
    seeds: Sequence[int] = (0,)  # of training, and of what is drawn at random in an evaluation
    processes: int | None = None  # of training; None: the preset's
    # Weights (folder or packaged) that variants start from as far as they fit; None: the preset's start.
    init: str | None = None
    overrides: Sequence[str] = ()  # key=value for every training variant

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise ValueError(f"--data: expected one of {', '.join(DATA)}, got {self.data!r}")
        if self.data == "coco" and self.photos is None:
            raise ValueError(
                "--data coco: expected --photos DIR with train/, val/ and "
                "annotations/instances_{train,val}.json"
            )
        if not self.seeds:
            raise ValueError("--seeds: expected at least one, got none")

    def annotations(self, part: str) -> Path:
        """The photos' COCO file; part: "train" or "val"."""
        assert self.photos is not None
        return self.photos / "annotations" / f"instances_{part}.json"

    def describe_data(self) -> str:
        """The data in words, without this machine's folders."""
        if self.data == "coco":
            return "photos"
        kind = "generated scenes of 80 shapes" if self.glyphs is None else "generated scenes"
        return f"{kind} on photos" if self.photos is not None else kind
