"""``visionllm predict``: pictures in, annotated pictures and one predictions.json out. Every task."""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionllm.atomic_file import write_json
from visionllm.cli.arguments import add_model_options, folder, load_model, positive, score
from visionllm.cli.questions import Question, add_questions, read_question
from visionllm.image import IMAGE_SUFFIXES, MAX_PIXELS, ImageError

if TYPE_CHECKING:
    from visionllm.result import Result


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 1 when a picture failed."""
    parser = build_parser()
    options = parser.parse_args(argv)
    output: Path = options.output
    paths, failed = find_pictures(options.paths)
    if any(path.resolve().parent == output.resolve() for path in paths):
        parser.error(f"--output: pictures come from {output}; expected another folder")

    # What is asked is checked before the model is loaded.
    try:
        question = read_question(options)
    except ValueError as error:
        parser.error(str(error))
    for entry in failed:
        report_failure(entry)
    if not paths:
        print("visionllm predict: no pictures", file=sys.stderr)
        return 1

    model = load_model(options)
    request = question.request(model)
    threshold = model.threshold if options.threshold is None else options.threshold
    pictures: list[dict[str, Any]] = []
    try:
        predict_files(model, request, question, paths, threshold, options, pictures, failed)
    finally:
        # An interrupted run leaves what it has done.
        write_json(
            output / "predictions.json",
            {
                "model": str(options.model),
                "task": request.task,
                "instruction": request.instructions[0].text or request.instructions[0].render(),
                "format_source": request.instructions[0].format_source,
                "classes": list(request.classes),
                "threshold": threshold,
                "pictures": pictures,
                "failed": failed,
            },
        )
    print(f"{len(pictures)} pictures done, {len(failed)} failed; written to {output}")
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visionllm predict",
        description="Does what an instruction asks for: boxes, polygons, keypoints, what expressions mean, "
        "captions, answers to questions. Writes annotated pictures and predictions.json.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a picture, a folder of pictures or a glob")
    add_questions(parser)
    parser.add_argument(
        "--output", type=folder, required=True, metavar="DIR", help="folder for what is written"
    )
    add_model_options(parser)
    parser.add_argument(
        "--threshold", type=score, metavar="SCORE", help="lowest score shown (default: the model's)"
    )
    parser.add_argument(
        "--spread", action="store_true", help="write each coordinate's standard deviation in pixels too"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="pictures in one pass (8)"
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        metavar="N",
        help=f"refuse larger pictures ({MAX_PIXELS})",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no line per picture")
    return parser


def find_pictures(patterns: Sequence[str]) -> tuple[list[Path], list[dict[str, str]]]:
    """Every picture once, in the order given (folders and globs sorted), and what could not be found.

    A folder stands for the pictures directly in it; a glob may use ``**``.
    """
    found: dict[Path, None] = {}
    failed = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            entries = sorted(entry for entry in path.iterdir() if is_picture(entry))
            if not entries:
                failed.append({"file": pattern, "error": f"{pattern}: no pictures in this folder"})
        elif path.exists() or not glob.has_magic(pattern):
            entries = [path]
        else:
            entries = sorted(
                Path(match) for match in glob.glob(pattern, recursive=True) if not Path(match).is_dir()
            )
            if not entries:
                failed.append({"file": pattern, "error": f"{pattern}: matches nothing"})
        found.update(dict.fromkeys(entries))
    return list(found), failed


def is_picture(path: Path) -> bool:
    """By the suffix; hidden files are none."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def predict_files(
    model: Any,
    request: Any,
    question: Question,
    paths: Sequence[Path],
    threshold: float,
    options: argparse.Namespace,
    pictures: list[dict[str, Any]],
    failed: list[dict[str, str]],
) -> None:
    """Appends to ``pictures`` and ``failed`` as it goes; writes the annotated pictures."""
    from tqdm import tqdm

    from visionllm.image import open_image

    names = output_names(paths)
    quiet = options.quiet or options.stream
    # Words of several pictures would be mixed on the terminal.
    batch_size = 1 if options.stream else options.batch_size
    on_text = print_piece if options.stream else None
    # disable=None: no bar where stderr is no terminal
    with tqdm(total=len(paths), unit="picture", disable=True if quiet else None) as progress:
        for start in range(0, len(paths), batch_size):
            images, opened = [], []
            for path in paths[start : start + batch_size]:
                try:
                    images.append(open_image(path, options.max_pixels))
                    opened.append(path)
                except ImageError as error:
                    failed.append({"file": str(path), "error": str(error)})
                    report_failure(failed[-1])
            if options.stream and opened:
                print(f"{opened[0]}: ", end="", flush=True)
            asked = [request] * len(images)
            results = model.run(images, asked, threshold, options.spread, question.options, on_text)
            if options.stream and opened:
                print()
            for path, result in zip(opened, results, strict=True):
                result.source = str(path)
                result.save(options.output / names[path])
                pictures.append(picture_entry(result, names[path], options.spread))
                if not quiet:
                    progress.write(f"{path}: {result.summary()}")
            progress.update(len(paths[start : start + batch_size]))


def picture_entry(result: Result, annotated: str, spread: bool = False) -> dict[str, Any]:
    """One picture's part of predictions.json: what `Result.to_dict` says that is not the same for all."""
    content = result.to_dict(spread)
    for shared in ("source", "task", "instruction", "format_source"):
        del content[shared]
    return {"file": result.source, "annotated": annotated, **content}


def print_piece(row: int, piece: str) -> None:
    """Words as they are written, of the one picture of a pass."""
    print(piece, end="", flush=True)


def output_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name of its own for each picture: JPEG stays JPEG, everything else becomes PNG."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        suffix = path.suffix.lower() if path.suffix.lower() in (".jpg", ".jpeg") else ".png"
        name, count = f"{path.stem}{suffix}", 1
        while name.lower() in taken:  # some file systems do not tell cases apart
            count += 1
            name = f"{path.stem}-{count}{suffix}"
        taken.add(name.lower())
        names[path] = name
    return names


def report_failure(entry: dict[str, str]) -> None:
    print(f"visionllm predict: {entry['error']}", file=sys.stderr)
