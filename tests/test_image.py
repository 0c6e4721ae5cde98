"""Pictures of every mode, orientation and state of repair."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from visionllm.image import ImageError, cut_out, fitted_size, network_batch, open_image, resize_square

RED, WHITE = [255, 0, 0], [255, 255, 255]


def random_rgb(height: int = 9, width: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_path_string_bytes_stream_pil_and_array_agree(tmp_path):
    rgb = random_rgb()
    path = tmp_path / "picture.png"
    Image.fromarray(rgb).save(path)
    data = path.read_bytes()
    for source in (path, str(path), data, io.BytesIO(data), Image.open(path), Image.fromarray(rgb), rgb):
        opened = open_image(source)
        assert opened.dtype == np.uint8 and opened.flags.c_contiguous
        np.testing.assert_array_equal(opened, rgb)


def test_result_is_a_copy():
    rgb = random_rgb()
    open_image(rgb)[:] = 0
    assert rgb.any()


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparent_pixels_are_white(mode):
    alpha = np.array([[255, 0], [128, 255]], dtype=np.uint8)
    rgba = np.dstack([np.zeros((2, 2, 3), np.uint8), alpha])
    image = Image.fromarray(rgba)
    if mode in ("LA", "La"):
        image = image.convert("LA")
    if mode == "PA":
        palette = Image.new("P", (2, 2))
        palette.putpalette([0, 0, 0])
        image = Image.merge("PA", [Image.fromarray(np.zeros((2, 2), np.uint8)), Image.fromarray(alpha)])
        image.putpalette([0, 0, 0, 255, 255, 255])
    elif mode in ("RGBa", "La"):
        image = image.convert(mode)
    assert image.mode == mode
    opened = open_image(image)
    assert opened[0, 0].tolist() == [0, 0, 0]
    assert opened[0, 1].tolist() == WHITE
    assert opened[1, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("mode", ["P", "RGB", "L", "1"])
def test_transparent_colour_of_a_png_is_white(mode):
    image = Image.new("L", (2, 1), 0)
    image.putpixel((1, 0), 255)
    image = image.convert(mode)
    # Black is declared transparent: everything is white then.
    transparent = (0, 0, 0) if mode == "RGB" else 0
    assert open_image(encoded(image, "PNG", transparency=transparent)).tolist() == [[WHITE, WHITE]]


def test_sixteen_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    expected = [[0, 1, 128, 255]]
    for source in (
        encoded(Image.fromarray(values), "PNG"),
        encoded(Image.fromarray(values), "TIFF"),
        Image.fromarray(values.astype(np.int32)),
        values,
    ):
        opened = open_image(source)
        assert opened.shape == (1, 4, 3)
        for channel in range(3):
            np.testing.assert_array_equal(opened[:, :, channel], expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 127.0, 255.0], [0, 127, 255]),
        ([-100.0, 0.0, 100.0], [0, 128, 255]),
        ([0.0, np.nan, 1.0], [0, 0, 255]),
    ],
)
def test_float_grey_files(values, expected):
    data = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert open_image(data)[0, :, 0].tolist() == expected


def test_cmyk_jpeg_lab_and_bilevel():
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    cmyk = open_image(encoded(red.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk[8, 8].astype(int) - RED).max() < 8
    lab = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (136, 208, 195)])
    assert np.abs(open_image(lab)[0, 0].astype(int) - [255, 0, 0]).max() < 16
    assert open_image(red.convert("YCbCr"))[0, 0][0] > 250
    assert open_image(red.convert("HSV"))[0, 0].tolist() == RED
    assert open_image(Image.new("1", (2, 2), 1)).tolist() == [[WHITE, WHITE]] * 2


def test_what_colour_management_refuses_is_an_image_error(monkeypatch):
    def refuse(*arguments, **options):
        raise ImageCms.PyCMSError("cannot build transform")

    monkeypatch.setattr(ImageCms, "profileToProfile", refuse)
    with pytest.raises(ImageError, match="in mode LAB cannot be made RGB: cannot build transform"):
        open_image(Image.new("LAB", (4, 4)))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(size):
    with pytest.raises(ImageError, match=f"expected at least one pixel, got {size[0]}x{size[1]}"):
        open_image(Image.new("RGB", size))


# EXIF orientation k: how stored pixels turn into the upright picture (EXIF 2.3, tag 0x0112).
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation):
    stored = random_rgb()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), "PNG", exif=exif)
    np.testing.assert_array_equal(open_image(data), UPRIGHT[orientation](stored))
    np.testing.assert_array_equal(open_image(data, upright=False), stored)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_malformed_exif_costs_nothing():
    stored = random_rgb()
    data = encoded(Image.fromarray(stored), "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    np.testing.assert_array_equal(open_image(data), stored)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data)[0, 0].tolist() == RED


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_a_file_cut_off_is_named(tmp_path, format):
    path = tmp_path / f"cut.{format.lower()}"
    data = encoded(Image.fromarray(random_rgb(64, 64)), format)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=rf"cut\.{format.lower()}"):
        open_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an image .*got an empty file"),
        (b"%PDF-1.7 hello", "expected an image .*begins with b'%PDF-1.7"),
        (b"\x89PNG\r\n\x1a\n", "broken.png"),
    ],
)
def test_no_image_is_named(tmp_path, content, message):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message):
        open_image(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match=r"nothing\.jpg: no such file"):
        open_image(tmp_path / "nothing.jpg")
    with pytest.raises(ImageError, match="expected an image file, got a folder"):
        open_image(tmp_path)


def test_flipped_bytes_give_a_picture_or_an_image_error():
    data = bytearray(encoded(Image.fromarray(random_rgb(32, 32)), "PNG"))
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(200):
        broken = bytearray(data)
        for position in rng.integers(0, len(data), 3):
            broken[position] ^= int(rng.integers(1, 256))
        try:
            assert open_image(bytes(broken)).dtype == np.uint8
        except ImageError:
            refused += 1
    assert refused > 100


def test_size_limit_comes_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (400, 300)).save(path)

    def no_decoding(*args, **kwargs):
        raise AssertionError("decoded a picture over the limit")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_decoding)
    with pytest.raises(
        ImageError, match=r"bomb\.png: 400x300 = 120000 pixels, more than the limit of 119999"
    ):
        open_image(path, max_pixels=119_999)
    with pytest.raises(ImageError, match="more than the limit"):
        open_image(np.zeros((10, 10, 3), np.uint8), max_pixels=99)


def test_size_limit_can_be_lifted_over_pillows_own(monkeypatch):
    data = encoded(Image.new("1", (400, 300)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too large"):
        open_image(data)
    assert open_image(data, max_pixels=None).shape == (300, 400, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_arrays_of_other_types():
    assert open_image(np.array([[True, False]])).tolist() == [[WHITE, [0, 0, 0]]]
    assert open_image(np.array([[[0.0], [1.0]]], dtype=np.float32)).tolist() == [[[0, 0, 0], WHITE]]
    assert open_image(np.array([[7]], dtype=np.int64)).tolist() == [[[7, 7, 7]]]
    assert open_image(np.array([[[1, 2, 3, 0]]], dtype=np.uint8)).tolist() == [[WHITE]]
    strided = random_rgb(8, 8)[::2, ::-1]
    np.testing.assert_array_equal(open_image(strided), strided)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"got \[3, 8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"got \[0, 8, 3\]"),
        (np.zeros(8, np.uint8), r"got \[8\]"),
        (np.full((2, 2, 3), 255.0), r"expected floats in 0..1, got 255..255"),
        (np.full((2, 2, 3), np.nan), "expected floats in 0..1"),
        (np.full((2, 2, 3), -1), "expected integers in 0..255"),
        (np.full((2, 2), "x"), "expected bool, integers, uint16 or floats"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(ImageError, match=message):
        open_image(array)


def test_other_objects_are_a_type_error():
    with pytest.raises(TypeError, match=r"a NumPy array \[H, W, 3\], got int"):
        open_image(3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (480, 640), (64, 64)])
def test_resize_square(shape):
    image = np.full((*shape, 3), 77, np.uint8)
    resized = resize_square(image, 64)
    assert resized.shape == (64, 64, 3) and resized.dtype == np.uint8
    assert (resized == 77).all()


def test_resize_is_antialiased_and_keeps_places():
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize_square(stripes, 64)[1:-1, 1:-1].astype(int) - 128).max() <= 2
    corner = np.zeros((100, 200, 3), np.uint8)
    corner[:50, :100] = 255
    resized = resize_square(corner, 64)
    assert resized[:31, :31].min() == 255 and resized[33:].max() == 0 and resized[:, 33:].max() == 0


def test_parts_are_cut_out():
    image = np.zeros((80, 120, 3), np.uint8)
    image[20:60, 30:90] = 200
    image[40:60, 60:90] = (10, 20, 30)
    whole, quarter = cut_out(image, np.array([[0.25, 0.25, 0.75, 0.75], [0.5, 0.5, 0.75, 0.75]]), 16)
    assert (quarter[1:-1, 1:-1] == (10, 20, 30)).all()  # the filter reaches beyond the box by a pixel
    assert (whole[9:-1, 9:-1] == (10, 20, 30)).all()
    assert (whole[1:7, 1:-1] == 200).all() and (whole[9:-1, 1:7] == 200).all()
    fine = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), np.uint8)
    (part,) = cut_out(fine, np.array([[0.1, 0.1, 0.9, 0.9]]), 16)
    assert np.abs(part.astype(float) - fine.mean()).max() < 6  # antialiased
    assert cut_out(image, np.zeros((0, 4)), 16).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    "box",
    [
        (np.nan, 0.2, np.nan, np.inf),
        (0.5, 0.5, 0.5, 0.5),
        (1, 1, 1, 1),
        (2, -3, 4, 5),
        (0.9999999, 0, 1, 1),
        (0.7, 0.7, 0.3, 0.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (80, 120)], ids=str)
@pytest.mark.parametrize("least", [0, 0.0125, 1])
def test_parts_of_any_box_are_of_the_picture(box, shape, least):
    image = np.full((*shape, 3), 77, np.uint8)
    assert (cut_out(image, np.array([box], np.float32), 5, least) == 77).all()


def test_a_part_has_the_least_extent():
    image = np.zeros((100, 100, 3), np.uint8)
    image[:, 50:] = 250
    (part,) = cut_out(image, np.array([[0.5, 0.5, 0.5, 0.5]]), 10, least=0.2)
    assert (part[:, :4] < 50).all() and (part[:, 6:] > 200).all()


def test_reading_does_not_keep_the_file_open(tmp_path):
    path = Path(tmp_path / "a.png")
    Image.fromarray(random_rgb()).save(path)
    with open(path, "rb") as stream:
        open_image(stream)
        assert not stream.closed, "the caller's stream stays the caller's"


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        # Height and width of pictures as Deformable DETR's published ones are resized, 800 and at most 1333.
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((333, 500), (800, 1201)),
        ((800, 1333), (800, 1333)),
        ((300, 1000), (400, 1333)),
        ((1000, 300), (1333, 400)),
        ((2, 4000), (1, 1333)),
        ((5, 5), (800, 800)),
    ],
)
def test_fitted_size(picture, expected):
    assert fitted_size(*picture, 800, 1333) == expected


def test_network_batch():
    """Squares; or pictures of their own shape, zeros below and to the right."""
    images = [np.full((h, w, 3), 200, np.uint8) for h, w in ((30, 40), (80, 20), (10, 10))]
    squares, none = network_batch(images, 16)
    assert squares.shape == (3, 16, 16, 3) and none is None
    batch, sizes = network_batch(images, 16, 32)
    assert sizes.tolist() == [[16, 21], [32, 8], [16, 16]] and sizes.dtype == np.int64
    assert batch.shape == (3, 32, 21, 3) and batch.dtype == np.uint8
    for padded, (height, width) in zip(batch, sizes, strict=True):
        assert (padded[:height, :width] == 200).all()
        assert padded.astype(int).sum() == 200 * 3 * height * width
