import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image, ImageOps

from vision_ssl import decode as decoding
from vision_ssl.decode import decode, decode_file, fit, fit_planes, read_jpeg
from vision_ssl.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_gives_the_upright_image(orientation: int, tmp_path: Path) -> None:
    # how a camera stores an upright picture under each orientation: (quarter turns, then mirrored)
    turns, mirrored = [(0, 0), (0, 1), (2, 0), (2, 1), (3, 1), (1, 0), (1, 1), (3, 0)][orientation - 1]
    stored = np.rot90(NOISE, turns)
    stored = stored[:, ::-1] if mirrored else stored
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as photo:
        np.testing.assert_array_equal(ImageOps.exif_transpose(photo), NOISE)  # the table above is right
    np.testing.assert_array_equal(decode_file(tmp_path / "photo.png", 16), decode(Image.fromarray(NOISE), 16))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif",
    [
        b"garbage",
        b"II*\0\xff\xff\xff\xff",  # the entries lie beyond the end
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abcd\0\0\0\0",  # an orientation called abcd
    ],
)
def test_exif_that_is_damaged_is_ignored(exif: bytes, tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "photo.jpg", exif=b"Exif\0\0" + exif)
    assert decode_file(tmp_path / "photo.jpg", 16).shape == (3, 16, 16)


def solid(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (9, 7), colour)  # type: ignore[arg-type]  # object is wider than what fits


def palette(transparency: bytes | None) -> Image.Image:
    image = solid("P", 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def sixteen_bit(value: int, mode: str) -> Image.Image:
    dtype = {"I": "int32", "F": "float32", "I;16": "<u2", "I;16B": ">u2"}[mode]
    return Image.frombytes(mode, (9, 7), np.full((7, 9), value, dtype).tobytes())


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (solid("RGB", (10, 200, 30)), (10, 200, 30)),
        (solid("L", 77), (77, 77, 77)),
        (solid("1", 1), (255, 255, 255)),
        (solid("LA", (77, 0)), (77, 77, 77)),
        (solid("RGBA", (10, 200, 30, 0)), (10, 200, 30)),
        (solid("CMYK", (255, 0, 0, 0)), (0, 255, 255)),
        (solid("YCbCr", (255, 128, 128)), (255, 255, 255)),
        (palette(None), (10, 200, 30)),
        (palette(b"\xff\x00"), (10, 200, 30)),
        (sixteen_bit(0, "I;16"), (0, 0, 0)),
        (sixteen_bit(65535, "I;16"), (255, 255, 255)),
        (sixteen_bit(257 * 100, "I;16"), (100, 100, 100)),
        (sixteen_bit(257 * 100 + 128, "I;16B"), (100, 100, 100)),
        (sixteen_bit(257 * 100 + 129, "I"), (101, 101, 101)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    pixels = decode(image, 5)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.array(expected)[:, None, None], (3, 5, 5)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (sixteen_bit(1, "F"), "floating-point pixels have no agreed range"),
        (sixteen_bit(65536, "I"), "integer pixels from 65536 to 65536, expected 0..65535"),
        (sixteen_bit(-1, "I"), "integer pixels from -1 to -1, expected 0..65535"),
    ],
)
def test_pixels_without_an_agreed_range_are_refused(image: Image.Image, message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}$"):
        decode(image, 5)


def test_grayscale_on_request() -> None:
    gray = Image.fromarray(NOISE[:, :, 0])
    np.testing.assert_array_equal(decode(gray, 16, "L"), decode(gray, 16)[:1])
    assert decode(Image.fromarray(NOISE), 16, "L").shape == (1, 16, 16)


@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1), (12_000, 2)])
def test_thin_images(shape: tuple[int, int]) -> None:
    middle = np.zeros((*shape, 3), np.uint8)
    middle[...] = (1, 2, 3)
    np.testing.assert_array_equal(decode(Image.fromarray(middle), 4)[:, 0, 0], [1, 2, 3])


def test_crop_is_central_and_exact_where_nothing_is_resized() -> None:
    np.testing.assert_array_equal(decode(Image.fromarray(NOISE), 40), NOISE[:, 10:50].transpose(2, 0, 1))


def test_resizing_is_antialiased() -> None:
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    shrunk = np.asarray(fit(Image.fromarray(checkerboard), 8))
    assert shrunk.min() >= 120
    assert shrunk.max() <= 135


def test_the_image_stays_as_it_was() -> None:
    image = palette(b"\xff\x00")
    before = (image.mode, image.size, image.tobytes(), dict(image.info))
    decode(image, 3)
    assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before


@given(
    arrays.arrays(np.uint8, st.tuples(st.just(3), st.integers(1, 20), st.integers(1, 20))),
    st.integers(1, 24),
)
def test_planes_are_resized_as_the_channels_of_a_picture(pixels: np.ndarray, size: int) -> None:
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    np.testing.assert_array_equal(fit_planes(pixels, size), decode(picture, size))


def jpeg(image: np.ndarray = NOISE, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


@pytest.fixture
def _two_decoders() -> None:
    pytest.importorskip("simplejpeg")
    if not decoding._SAME_LIBRARY:
        pytest.skip("this Pillow is not built with libjpeg-turbo")


def pillows(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.usefixtures("_two_decoders")
@pytest.mark.parametrize("quality", [1, 30, 75, 95, 100])
@pytest.mark.parametrize("shape", [(64, 64), (375, 500), (61, 47), (17, 8), (1, 1)])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": "4:2:0"}),
        ("RGB", {"subsampling": "4:2:2"}),
        ("RGB", {"subsampling": "4:4:4"}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"exif": exif(1), "comment": b"a comment", "icc_profile": b"as long as it is there"}),
        ("RGB", {"restart_marker_rows": 1, "optimize": True}),
        ("L", {}),
    ],
    ids=str,
)
def test_ordinary_jpegs_are_as_pillow_reads_them(
    mode: str, options: dict[str, object], shape: tuple[int, int], quality: int, tmp_path: Path
) -> None:
    picture = np.random.default_rng(0).normal(128, 60, (*shape, 3))
    picture[: shape[0] // 2] = np.linspace(0, 255, shape[1])[:, None]  # smooth above, noise below
    content = jpeg(picture.clip(0, 255).astype(np.uint8), mode, quality=quality, **options)
    (tmp_path / "photo.jpg").write_bytes(content)
    pixels = read_jpeg(tmp_path / "photo.jpg")
    assert pixels is not None
    np.testing.assert_array_equal(pixels, pillows(tmp_path / "photo.jpg"))


@pytest.mark.usefixtures("_two_decoders")
@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_subsampling_that_pillow_cannot_write(subsampling: str, tmp_path: Path) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    (tmp_path / "photo.jpg").write_bytes(simplejpeg.encode_jpeg(NOISE, colorsubsampling=subsampling))
    pixels = read_jpeg(tmp_path / "photo.jpg")
    assert pixels is not None
    np.testing.assert_array_equal(pixels, pillows(tmp_path / "photo.jpg"))


@pytest.mark.usefixtures("_two_decoders")
@pytest.mark.parametrize("size", [40, 16, 50])
@pytest.mark.parametrize("shape", [(40, 40), (40, 60)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_the_same_square_with_and_without_the_extra(
    mode: str, shape: tuple[int, int], size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpeg(NOISE[: shape[0], : shape[1]], mode))
    assert read_jpeg(photo) is not None
    with_extra = decode_file(photo, size)
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert read_jpeg(photo) is None
    np.testing.assert_array_equal(with_extra, decode_file(photo, size))
    assert with_extra.shape == (3, size, size)
    assert with_extra.dtype == np.uint8
    assert with_extra.flags.c_contiguous
    assert with_extra.flags.writeable


SPOILT = jpeg()[:900] + b"\x55" * 20 + jpeg()[920:]


@pytest.mark.usefixtures("_two_decoders")
@pytest.mark.parametrize(
    "content",
    [
        jpeg(exif=exif(6)),
        jpeg(exif=exif(3), comment=b"a comment"),
        jpeg(mode="CMYK"),
        jpeg(progressive=True),
        jpeg(exif=exif(1), progressive=True),
        jpeg()[:700],
        jpeg()[:-2],
        SPOILT,
        jpeg()[:30],
        jpeg().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),  # 12 bits
        b"",
        b"GIF89a",
    ],
    ids=lambda content: f"{len(content)} bytes",
)
def test_other_files_are_left_to_pillow(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(content)
    results = []
    for _ in range(2):
        try:
            results.append(decode_file(photo, 16).tobytes())
        except DataError as error:
            results.append(str(error).encode())
        assert read_jpeg(photo) is None
        monkeypatch.setattr(decoding, "simplejpeg", None)
    assert results[0] == results[1]


@pytest.mark.usefixtures("_two_decoders")
def test_large_jpegs_are_left_to_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 40 * 60)
    assert read_jpeg(tmp_path / "photo.jpg") is not None
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 40 * 60 - 1)
    assert read_jpeg(tmp_path / "photo.jpg") is None


@pytest.mark.usefixtures("_two_decoders")
def test_a_jpeg_longer_than_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = jpeg(quality=100)
    assert len(content) > 40 * 60 + 1
    (tmp_path / "photo.jpg").write_bytes(content)
    for first in (len(content), len(content) - 1, 3):
        monkeypatch.setattr(decoding, "_FIRST_READ", first)
        pixels = read_jpeg(tmp_path / "photo.jpg")
        assert pixels is not None
        np.testing.assert_array_equal(pixels, pillows(tmp_path / "photo.jpg"))
    monkeypatch.setattr(decoding, "LARGE_PIXELS", len(content) - 1)
    assert read_jpeg(tmp_path / "photo.jpg") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image that Pillow can read"),
        (b"hello", "not an image that Pillow can read"),
        (jpeg()[:700], "image file is truncated"),
        (None, "No such file or directory"),
    ],
)
def test_a_bad_file_says_why(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(DataError, match=f"^{message}") as raised:
        decode_file(tmp_path / "photo.jpg", 16)
    assert str(tmp_path) not in str(raised.value)


def test_a_picture_beyond_the_bound_is_refused_by_its_size(tmp_path: Path) -> None:
    header = b"P4 14000 14000\n"  # one bit a pixel, and no pixel is needed for the refusal
    (tmp_path / "huge.ppm").write_bytes(header)
    with pytest.raises(DataError, match="196000000 pixels"):
        decode_file(tmp_path / "huge.ppm", 16)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_a_12000_pixel_jpeg_needs_little_memory(tmp_path: Path) -> None:
    photo = tmp_path / "large.jpg"
    Image.linear_gradient("L").resize((12_000, 12_000)).save(photo)
    code = f"""
import warnings; warnings.simplefilter("ignore")
from pathlib import Path
from vision_ssl.decode import decode_file
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
before = peak()
pixels = decode_file(Path({str(photo)!r}), 64)
print(peak() - before, pixels[0, 0, 0], pixels[0, -1, 0])
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    megabytes, top, bottom = map(int, output.split())
    assert megabytes < 70  # 144 MB as it is
    assert top < 8
    assert bottom > 247
