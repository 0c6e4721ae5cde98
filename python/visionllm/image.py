"""Pictures of any kind, read as uint8 RGB, and resized the one way that the network is trained with.

What is done to a picture: the first frame is taken; the EXIF orientation is applied; transparency is laid on
white; 16-bit greys are scaled to 8 bits; CMYK, LAB, palettes and the rest are converted to RGB by Pillow.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, Any, Union

import numpy as np
from PIL import Image, ImageOps

ImageSource = Union[str, "os.PathLike[str]", bytes, IO[bytes], Image.Image, np.ndarray]

# Files that a folder is searched for.
IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp")
)

# Pillow's own warning level: a quarter of a gigabyte of RGB.
MAX_PIXELS = 89_478_485

_pillow_limit = threading.Lock()


class ImageError(ValueError):
    """A picture that cannot be had: missing, broken, too large, or of a shape that is no picture."""


def open_image(source: ImageSource, max_pixels: int | None = MAX_PIXELS, upright: bool = True) -> np.ndarray:
    """Any picture as RGB.

    Args:
        source: a file's path, its bytes or an open binary file; a PIL image; or a NumPy array ``[H, W]``,
            ``[H, W, 1]``, ``[H, W, 3]`` (RGB) or ``[H, W, 4]`` (RGBA) of bool, integers 0..255, uint16
            (full scale 65535) or floats 0..1.
        max_pixels: larger pictures are refused before they are decoded (decompression bombs); None: no limit.
        upright: turn the picture as its EXIF orientation says.

    Returns:
        uint8 ``[H, W, 3]``, contiguous, a copy.

    Raises:
        ImageError: names the file and says what was expected.
        TypeError: ``source`` is nothing of the above.
    """
    if isinstance(source, np.ndarray):
        _check_size("array", source.shape[1::-1] if source.ndim >= 2 else (0, 0), max_pixels)
        return _array_to_rgb(source)
    if isinstance(source, Image.Image):
        return _decode(source, source_name(source), max_pixels, upright)
    name = source_name(source)
    if isinstance(source, (str, os.PathLike)):
        if os.path.isdir(source):
            raise ImageError(f"{name}: expected an image file, got a folder")
        try:
            with open(source, "rb") as file:
                return _open_stream(file, name, max_pixels, upright)
        except FileNotFoundError as error:
            raise ImageError(f"{name}: no such file") from error
        except OSError as error:
            raise ImageError(f"{name}: cannot be read: {error.strerror or error}") from error
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_stream(io.BytesIO(source), name, max_pixels, upright)
    if hasattr(source, "read"):
        return _open_stream(source, name, max_pixels, upright)
    raise TypeError(
        "an image must be a path, bytes, a binary file, a PIL image or a NumPy array [H, W, 3], "
        f"got {type(source).__name__}"
    )


def open_annotated(path: str | os.PathLike[str], size: tuple[int, int] | None) -> np.ndarray:
    """A data set's picture as its annotations see it.

    COCO's boxes are in stored pixels and ignore the EXIF orientation, other tools write them in upright ones.
    The recorded size tells which: the stored one first, the upright one where only that fits.

    Args:
        path: the picture's file.
        size: width and height as annotated; None where they are not: then the picture is turned upright.

    Returns:
        uint8 ``[H, W, 3]``.

    Raises:
        ImageError: the file is missing, broken or of another size.
    """
    image = open_image(path, upright=size is None)
    if size is not None and image.shape[1::-1] != size:
        image = open_image(path)
        if image.shape[1::-1] != size:
            raise ImageError(
                f"{os.fspath(path)}: expected {size[0]}x{size[1]} pixels as annotated, "
                f"got {image.shape[1]}x{image.shape[0]}"
            )
    return image


def source_name(source: Any) -> str:
    """What to call a picture in messages and results: its path, or the kind of object that it is."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return name if isinstance(name, str) and name else f"<{type(source).__name__}>"


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """The network's view of a picture: ``size`` × ``size``, the aspect ratio not kept, antialiased bilinear.

    Args:
        image: uint8 ``[H, W, 3]``.
        size: side in pixels.

    Returns:
        uint8 ``[size, size, 3]``.
    """
    if image.shape[:2] == (size, size):
        return image
    # Pillow's bilinear filter widens with the reduction, so it is antialiased.
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def cut_out(image: np.ndarray, boxes: np.ndarray, size: int, least: float = 0.0) -> np.ndarray:
    """Parts of a picture, each ``size`` × ``size``, the aspect ratio not kept, antialiased bilinear.

    Args:
        image: uint8 ``[H, W, 3]``.
        boxes: ``[n, 4]``, x1 y1 x2 y2 in shares of the picture; what lies outside is left out.
        size: side in pixels.
        least: a part's sides in shares of the picture's, where its box has less; one pixel at any rate.

    Returns:
        uint8 ``[n, size, size, 3]``.
    """
    height, width = image.shape[:2]
    picture, parts = Image.fromarray(image), np.empty((len(boxes), size, size, 3), np.uint8)
    corners = np.nan_to_num(np.asarray(boxes, np.float64)).clip(0, 1)  # NaN: the first row or column
    for part, (x1, y1, x2, y2) in zip(parts, corners.tolist(), strict=True):
        left, right = _at_least(x1 * width, x2 * width, max(least * width, 1), width)
        top, bottom = _at_least(y1 * height, y2 * height, max(least * height, 1), height)
        # The gap: a large part is first reduced by a whole factor, which is far faster and looks the same.
        box = (left, top, right, bottom)
        part[:] = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=2.0))
    return parts


def _at_least(low: float, high: float, least: float, most: int) -> tuple[float, float]:
    """The interval, widened about its middle to ``least`` and moved to lie within 0 … most."""
    if high - low >= least:
        return low, high
    low = min(max((low + high - least) / 2, 0.0), most - least)
    return low, low + least


def fitted_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """Height and width whose shorter side is ``shorter`` pixels, or less where the longer one would exceed
    ``longest``: Deformable DETR's, rounded as its published pictures are.
    """
    side = min(float(shorter), longest * min(height, width) / max(height, width))
    other = int(side * max(height, width) / min(height, width))
    side = max(1, round(side))
    other = min(max(other, side), longest)
    return (side, other) if height <= width else (other, side)


def resize_to_fit(image: np.ndarray, shorter: int, longest: int) -> np.ndarray:
    """A picture of `fitted_size`, antialiased bilinear: uint8 ``[H, W, 3]`` both."""
    height, width = fitted_size(image.shape[0], image.shape[1], shorter, longest)
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def network_batch(
    images: Sequence[np.ndarray], image_size: int, longest_side: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pictures as a network takes them.

    Args:
        images: uint8 ``[H, W, 3]`` each; at least one.
        image_size, longest_side: of `visionllm.model.config.ModelConfig`.

    Returns:
        uint8 ``[B, S, S, 3]`` and None; or, with a longest side, ``[B, H, W, 3]``, padded with zeros at the
        bottom and the right, and int64 ``[B, 2]``, the height and width of what is picture.
    """
    if longest_side == 0:
        return np.stack([resize_square(image, image_size) for image in images]), None
    return padded_pictures([resize_to_fit(image, image_size, longest_side) for image in images], longest_side)


def padded_pictures(
    views: Sequence[np.ndarray], longest_side: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """What `network_batch` returns, of pictures that have their sizes already."""
    if longest_side == 0:
        return np.stack(views), None
    sizes = np.array([view.shape[:2] for view in views], np.int64)
    batch = np.zeros((len(views), *sizes.max(0), 3), np.uint8)
    for padded, view in zip(batch, views, strict=True):
        padded[: view.shape[0], : view.shape[1]] = view
    return batch, sizes


def _open_stream(stream: IO[bytes], name: str, max_pixels: int | None, upright: bool) -> np.ndarray:
    with warnings.catch_warnings(), _pillow_size_limit(max_pixels):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(stream)
        except Image.UnidentifiedImageError as error:
            raise ImageError(f"{name}: expected an image (JPEG, PNG, ...), {_what_is_it(stream)}") from error
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name}: too large: {error}") from error
        except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
            raise ImageError(f"{name}: broken image: {error}") from error
        with image:
            return _decode(image, name, max_pixels, upright)


def _decode(image: Image.Image, name: str, max_pixels: int | None, upright: bool) -> np.ndarray:
    _check_size(name, image.size, max_pixels)
    if 0 in image.size:
        raise ImageError(f"{name}: expected at least one pixel, got {image.width}x{image.height}")
    kind = f"{image.format or 'picture'} of {image.width}x{image.height} pixels"
    try:
        image.load()
    except Exception as error:  # as above
        raise ImageError(f"{name}: expected a whole {kind}, but it is broken or cut off: {error}") from error
    # A malformed EXIF block costs the rotation, not the picture.
    with contextlib.suppress(Exception):
        if upright:
            image = ImageOps.exif_transpose(image)
    try:
        return np.ascontiguousarray(_to_rgb(image))
    except Exception as error:  # as above; LAB's colour management has an error class of its own
        raise ImageError(f"{name}: a {kind} in mode {image.mode} cannot be made RGB: {error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    mode = image.mode
    if mode.startswith("I;16"):
        return _grey_to_rgb(_scale_16_bit(np.asarray(image)))
    if mode in ("I", "F"):
        return _grey_to_rgb(_scale_wide_grey(np.asarray(image)))
    if mode == "LAB":
        return _lab_to_rgb(image)
    if mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        return _on_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _lab_to_rgb(image: Image.Image) -> np.ndarray:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None, "profileToProfile returns an image unless inPlace is set"
    return np.array(converted)


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ImageError(
            f"array: expected shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {list(array.shape)}"
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = _scale_16_bit(array)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise ImageError(f"array: expected floats in 0..1, got {low:g}..{high:g}")
        array = np.rint(array * 255).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.integer):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 255:
            raise ImageError(f"array: expected integers in 0..255 or uint16, got {array.dtype} {low}..{high}")
        array = array.astype(np.uint8)
    else:
        raise ImageError(f"array: expected bool, integers, uint16 or floats, got {array.dtype}")
    if channels == 4:
        return _on_white(array)
    if channels == 1:
        return _grey_to_rgb(array.reshape(array.shape[:2]))
    return np.array(array, order="C")


def _scale_16_bit(values: np.ndarray) -> np.ndarray:
    """uint16 to uint8, 65535 to 255, rounded."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _scale_wide_grey(values: np.ndarray) -> np.ndarray:
    """Greys of 32-bit integers or floats, whose white is written down nowhere.

    White is 1 for floats up to 1, 255 for floats up to 255, 65535 for integers up to it; else black and white
    are the lowest and the highest value.
    """
    is_float = np.issubdtype(values.dtype, np.floating)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= (255 if is_float else 65535):
        low, high = 0.0, 65535.0 if not is_float else 1.0 if high <= 1 else 255.0
    return np.rint((values - low) * 255 / max(high - low, 1e-12)).astype(np.uint8)


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 RGBA ``[H, W, 4]`` over white, rounded: ``c * a + 255 * (1 - a)``."""
    alpha = rgba[:, :, 3:].astype(np.uint32)
    blended = rgba[:, :, :3] * alpha + 255 * (255 - alpha)
    return ((blended + 127) // 255).astype(np.uint8)


def _check_size(name: str, size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} = {width * height} pixels, "
            f"more than the limit of {max_pixels} (max_pixels)"
        )


@contextlib.contextmanager
def _pillow_size_limit(max_pixels: int | None) -> Iterator[None]:
    """Pillow refuses files over twice its own limit: it is lifted where ours is higher."""
    if max_pixels is not None and max_pixels <= 2 * MAX_PIXELS:
        yield
        return
    with _pillow_limit:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _what_is_it(stream: IO[bytes]) -> str:
    try:
        stream.seek(0)
        head = stream.read(16)
    except (OSError, ValueError):
        return "got something else"
    return f"got a file that begins with {head!r}" if head else "got an empty file"
