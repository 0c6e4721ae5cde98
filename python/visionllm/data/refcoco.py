"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions for the objects of COCO pictures.

A data set's folder, as published (https://github.com/lichengunc/refer), has ``instances.json`` in COCO's
format and one file of references per way of splitting: ``refs(unc).p``, ``refs(google).p``, ``refs(umd).p``.
Each is a pickled list, read here without unpickling (`visionllm.data.plain_pickle`); JSON will do as well::

    ref_id, image_id, ann_id, split, sentences: [{"sent": "lady in the blue shirt", ...}, ...]

Yu et al. 2016 (arXiv:1608.00272) for RefCOCO and RefCOCO+, Mao et al. 2016 (arXiv:1511.02283) for RefCOCOg.
In Google's split of the latter a picture can be in several parts, with another object in each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visionllm.data.coco import CocoDataset
from visionllm.data.coco_pictures import find_pictures
from visionllm.data.plain_pickle import PickleError, plain_pickle
from visionllm.data.report import (
    EntryProblems,
    Report,
    check_section,
    described,
    id_problem,
    is_id,
    read_file,
    read_json,
    text_problem,
    wrong_file,
)
from visionllm.data.sample import Expression, Sample
from visionllm.data.validate import read_coco_json, validate_content

INSTANCES = "instances.json"


class RefCocoDataset(CocoDataset):
    """Pictures with their objects and what is said about some of these.

    Samples have every object of the picture, and in ``expressions`` each sentence of the chosen part of the
    references, with the one object that it is for.

    Args:
        refs: the file of references, pickle or JSON.
        images: folder of COCO's pictures, of either release (see `visionllm.data.coco_pictures`).
        instances: the objects; ``instances.json`` beside the references if None.
        split: part to use: "train", "val", "test", "testA", "testB", as far as the file has it; None: all.
            Only pictures with expressions of that part are in the data set.
        on_error, check_images, shown, outlines: as for `CocoDataset`. A wrong reference is left out whole.

    Raises:
        DatasetError: something is wrong and ``on_error`` is "fail", or a file cannot be used at all.
        ValueError: there is no such part, or an argument is none of the allowed ones.
    """

    def __init__(
        self,
        refs: str | Path,
        images: str | Path,
        instances: str | Path | None = None,
        split: str | None = None,
        on_error: str = "fail",
        check_images: str = "decode",
        shown: int = 20,
        outlines: bool = False,
    ) -> None:
        self.refs = Path(refs)
        self._entries = read_refs(refs)
        parts = splits_of(self._entries)
        if split is not None and split not in parts:
            raise ValueError(f"split: expected one of {', '.join(parts)} as in {refs}, got {split!r}")
        self._chosen = {
            index
            for index, ref in enumerate(self._entries)
            if isinstance(ref, dict) and (split is None or ref.get("split") == split)
        }
        super().__init__(
            instances_beside(refs, instances), images, on_error, check_images, shown, outlines=outlines
        )
        self._sentences: dict[Any, list[tuple[Any, str]]] = {}  # by image id: annotation id and text
        for index in self.report.usable["refs"]:
            if index in self._chosen:
                ref = self._entries[index]
                said = [(ref["ann_id"], " ".join(one["sent"].split())) for one in ref["sentences"]]
                self._sentences.setdefault(ref["image_id"], []).extend(said)
        del self._entries, self._chosen
        kept = [i for i, image in enumerate(self.images) if image["id"] in self._sentences]
        self.images = [self.images[i] for i in kept]
        self.objects = [self.objects[i] for i in kept]
        self._unknown = {new: self._unknown[old] for new, old in enumerate(kept) if old in self._unknown}

    def __getitem__(self, index: int) -> Sample:
        """As `CocoDataset`, with the expressions in the file's order."""
        sample = super().__getitem__(index)
        position = {entry["id"]: number for number, entry in enumerate(self.objects[index])}
        said = self._sentences[self.images[index]["id"]]
        return replace(sample, expressions=[Expression(text, (position[number],)) for number, text in said])

    def _read(self) -> dict[str, Any]:
        return find_pictures(super()._read(), self.folder)

    def _check_more(self, content: dict[str, Any]) -> None:
        check_refs(self._entries, self.refs, content, self.report)

    def _wanted_images(self) -> Collection[Any]:
        refs = [self._entries[index] for index in self._chosen]
        return {ref["image_id"] for ref in refs if is_id(ref.get("image_id"), (int, str))}


def validate_refcoco(
    refs: str | Path,
    images: str | Path | None,
    instances: str | Path | None = None,
    check_images: str = "decode",
) -> Report:
    """Check references and their objects and name everything wrong with them.

    Args:
        images: None checks the files of annotations only.
        instances, check_images: as for `RefCocoDataset`.

    Raises:
        DatasetError: a file is missing or of another kind: nothing could be checked.
    """
    entries = read_refs(refs)
    instances = instances_beside(refs, instances)
    content = read_coco_json(instances)
    if images is not None:
        content = find_pictures(content, images)
    report = validate_content(content, instances, images, check_images)
    check_refs(entries, refs, content, report)
    return report


def read_refs(file: str | Path) -> list[Any]:
    """The list of references in a pickle or JSON file. Raises `DatasetError` if it is neither."""
    content = read_file(file)
    if content.lstrip()[:1] in (b"[", b"{"):  # a pickle begins otherwise
        refs = read_json(file, "a JSON file of references")
    else:
        try:
            refs = plain_pickle(content)
        except PickleError as error:
            raise wrong_file(file, str(error)) from error
    if not isinstance(refs, list):
        raise wrong_file(file, f"expected a list of references, got {described(refs)}")
    return refs


def instances_beside(refs: str | Path, instances: str | Path | None) -> Path:
    """The file of the objects: the one given, or the one in the references' folder."""
    return Path(refs).with_name(INSTANCES) if instances is None else Path(instances)


def splits_of(refs: Sequence[Any]) -> list[str]:
    """The parts that references are divided into, in the file's order."""
    found = (ref.get("split") for ref in refs if isinstance(ref, dict))
    return list(dict.fromkeys(part for part in found if isinstance(part, str)))


def check_refs(refs: Sequence[Any], file: str | Path, content: dict[str, Any], report: Report) -> None:
    """Adds the list "refs" to the report of the objects that they are for, ``content``."""
    images = {
        content["annotations"][i]["id"]: content["annotations"][i]["image_id"] for i in report.annotations
    }
    seen: set[Any] = set()

    def problems(ref: dict) -> EntryProblems:
        yield from id_problem(ref, seen, (int, str), "ref_id")
        message = text_problem(ref, "split", "the name of a part")
        if message:
            yield "split", message
        for key in ("image_id", "ann_id"):
            if key not in ref:
                yield key, "missing"
            elif not is_id(ref[key], (int, str)):
                yield key, f"expected an id, got {described(ref[key])}"
        number, image = ref.get("ann_id"), ref.get("image_id")
        if is_id(number, (int, str)) and is_id(image, (int, str)):
            if number not in images:
                yield "ann_id", f"expected the id of a right annotation, got {described(number)}"
            elif images[number] != image:
                yield (
                    "image_id",
                    f"expected {images[number]!r} as annotation {number!r} has, got {described(image)}",
                )
        sentences = ref.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            yield "sentences", f"expected a list of sentences, got {described(sentences)}"
        elif not all(isinstance(one, dict) and not text_problem(one, "sent") for one in sentences):
            yield "sentences", f'expected "sent" with text in each, got {described(sentences)}'

    check_section(refs, "refs", file, problems, report)
