"""Every kind of picture becomes the right 8-bit RGB; what is broken, hostile or too large is one clear error."""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from ray_det.config import DatasetConfig
from ray_det.data.collate import LoadSpec, Shard, load
from ray_det.data.decode import MAX_SCANS, decode, read_image
from ray_det.data.headers import read_headers
from ray_det.data.plan import plan_evaluation
from ray_det.data.prepare import prepare
from ray_det.predict.predictor import to_pixels
from ray_det.types import ImageLimits, UserError
from tests.data.test_preflight import document, image

HEIGHT, WIDTH = 40, 60
RAMP = np.linspace(0, 255, WIDTH).round().astype(np.uint8)[None].repeat(HEIGHT, axis=0)  # differs along x
DOWN = np.linspace(0, 200, HEIGHT).round().astype(np.uint8)[:, None].repeat(WIDTH, axis=1)  # and along y
PICTURE = np.stack([RAMP, DOWN, 255 - RAMP], axis=2)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def gray3(gray_HW: np.ndarray) -> np.ndarray:
    return gray_HW[:, :, None].repeat(3, axis=2)


def with_alpha(alpha: np.ndarray) -> np.ndarray:
    return np.dstack([PICTURE, alpha])


RGB = Image.fromarray(PICTURE)
PALETTE = RGB.quantize(64)
COLOURS = np.asarray(PALETTE.convert("RGB"))
BITS = np.where(RAMP > 127, 255, 0).astype(np.uint8)
DEEP = (RAMP.astype(np.uint16) * 257) ^ 0x0055  # the lower 8 bits hold something
SIGNED = RAMP.astype(np.int32) * 1000 - 70000
FLOAT = RAMP.astype(np.float32) / 1000 - 3
HOLE = np.where(DOWN > 100, 0, 255).astype(np.uint8)
CASES: dict[str, tuple[bytes, np.ndarray]] = {
    "png": (encoded(RGB, "PNG"), PICTURE),
    "bmp": (encoded(RGB, "BMP"), PICTURE),
    "ppm": (encoded(RGB, "PPM"), PICTURE),
    "webp": (encoded(RGB, "WEBP", lossless=True), PICTURE),
    "jpeg 2000": (encoded(RGB, "JPEG2000", irreversible=False), PICTURE),
    "tiff": (encoded(RGB, "TIFF", compression="tiff_lzw"), PICTURE),
    "gray": (encoded(Image.fromarray(RAMP), "PNG"), gray3(RAMP)),
    "gray + alpha": (encoded(Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(HOLE)]), "PNG"), gray3(RAMP)),
    "palette": (encoded(PALETTE, "PNG"), COLOURS),
    "palette, one transparent": (encoded(PALETTE, "PNG", transparency=5), COLOURS),
    "palette, alphas": (encoded(PALETTE, "PNG", transparency=bytes(range(64))), COLOURS),
    "rgb, one transparent": (encoded(RGB, "PNG", transparency=tuple(PICTURE[0, 0].tolist())), PICTURE),
    "rgba": (encoded(Image.fromarray(with_alpha(HOLE)), "PNG"), PICTURE),
    "rgba webp": (encoded(Image.fromarray(with_alpha(HOLE)), "WEBP", lossless=True, exact=True), PICTURE),
    "1 bit": (encoded(Image.fromarray(BITS).convert("1"), "PNG"), gray3(BITS)),
    "1 bit tiff": (encoded(Image.fromarray(BITS).convert("1"), "TIFF", compression="group4"), gray3(BITS)),
    "16 bit": (encoded(Image.fromarray(DEEP), "PNG"), gray3(RAMP)),
    "16 bit tiff": (encoded(Image.fromarray(DEEP), "TIFF"), gray3(RAMP)),
    "16 bit pgm": (b"P5 60 40 65535\n" + DEEP.astype(">u2").tobytes(), gray3(RAMP)),
    "32 bit": (encoded(Image.fromarray(SIGNED), "TIFF"), gray3(RAMP)),
    "float": (encoded(Image.fromarray(FLOAT), "TIFF"), gray3(RAMP)),
    "gif": (encoded(PALETTE, "GIF"), COLOURS),
    "animated gif": (encoded(PALETTE, "GIF", save_all=True, append_images=[Image.new("P", RGB.size)]), COLOURS),
    "animated png": (encoded(RGB, "PNG", save_all=True, append_images=[Image.new("RGB", RGB.size)]), PICTURE),
    "animated webp": (
        encoded(RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", RGB.size)]),
        PICTURE,
    ),
    "pages": (encoded(RGB, "TIFF", save_all=True, append_images=[Image.new("RGB", RGB.size)]), PICTURE),
}  # fmt: skip
INVERTED = 255 - np.asarray(RGB.convert("CMYK"))  # as Adobe's programs, and so all, store it
LOSSY: dict[str, bytes] = {
    "jpeg": encoded(RGB, "JPEG", quality=98),
    "progressive": encoded(RGB, "JPEG", quality=98, progressive=True),
    "rgb jpeg": encoded(RGB, "JPEG", quality=98, keep_rgb=True),
    "cmyk": encoded(RGB.convert("CMYK"), "JPEG", quality=98),
    "ycck": simplejpeg.encode_jpeg(np.ascontiguousarray(INVERTED), quality=98, colorspace="CMYK"),
    "mpo": encoded(RGB, "MPO", quality=98, save_all=True, append_images=[Image.new("RGB", RGB.size)]),
    "avif": encoded(RGB, "AVIF", quality=98, subsampling="4:4:4"),
}


@pytest.mark.parametrize("kind", CASES)
def test_pixels_are_exact(kind):
    data, expected = CASES[kind]
    found = decode(data, kind)
    assert found.dtype == np.uint8 and np.array_equal(found, expected)


@pytest.mark.parametrize("kind", LOSSY)
def test_pixels_are_near_where_the_format_loses_some(kind):
    found = decode(LOSSY[kind], kind).astype(int)
    assert found.shape == PICTURE.shape and np.abs(found - PICTURE).mean() < 2.5


def test_the_ycck_case_is_one():
    assert simplejpeg.decode_jpeg_header(LOSSY["ycck"])[2] == "YCCK"


def test_not_finite_values_of_a_float_picture_do_no_harm():
    values = FLOAT.copy()
    values[0, :3] = np.nan, np.inf, -np.inf
    found = decode(encoded(Image.fromarray(values), "TIFF"), "x")
    assert found[0, :3, 0].tolist() == [0, 255, 0] and np.array_equal(found[1:], gray3(RAMP)[1:])
    flat = decode(encoded(Image.fromarray(np.full((4, 5), np.nan, np.float32)), "TIFF"), "x")
    assert flat.shape == (4, 5, 3) and not flat.any()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("JPEG", {"quality": 98}),
    ],
)
def test_orientation_is_reported_and_never_applied(turn, kind, options, tmp_path):
    """A TIFF's too, which Pillow would turn by itself."""
    exif = Image.Exif()
    exif[0x0112] = turn
    if kind == "TIFF":
        data = encoded(RGB, kind, tiffinfo={0x0112: turn}, **options)
    else:
        data = encoded(RGB, kind, exif=exif, **options)
    found = decode(data, "x").astype(int)
    assert found.shape == PICTURE.shape and np.abs(found - PICTURE).mean() < 2
    (tmp_path / "x").write_bytes(data)
    header = read_headers((str(tmp_path), ["x"]))[0]
    assert (header.height, header.width, header.orientation) == (HEIGHT, WIDTH, turn)


@pytest.mark.parametrize("kind", ["16 bit", "cmyk", "palette, alphas", "avif", "jpeg"])
def test_training_evaluation_and_prediction_see_the_same_pixels(kind, tmp_path):
    data = CASES[kind][0] if kind in CASES else LOSSY[kind]
    (tmp_path / "a.img").write_bytes(data)
    source = tmp_path / "x.json"
    source.write_text(json.dumps(document([image(1, "a.img", WIDTH, HEIGHT)], [])))
    manifest, _ = prepare(str(source), str(tmp_path), tmp_path / "cache")
    sizes, rows = (np.array([HEIGHT]), np.array([WIDTH])), np.array([0])
    config = DatasetConfig(image_size=WIDTH)  # nothing to resize
    plan = plan_evaluation(*sizes, rows, config, batch_size=1, divisor=1, rank=0, world=1)
    loaded = load(Shard(manifest, plan, LoadSpec("longest", "mean", 0, None)))[0].pixels_BHW3[0]
    expected = decode(data, "x")
    assert np.array_equal(loaded, expected)
    assert np.array_equal(to_pixels(tmp_path / "a.img"), expected)
    assert np.array_equal(to_pixels(data), expected)
    with Image.open(tmp_path / "a.img") as picture:
        assert np.array_equal(to_pixels(picture), expected)
        assert "transparency" in picture.info or kind != "palette, alphas"  # the caller's image is left as it was


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A gray PNG of one bit that claims a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def claiming(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose header claims a size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def webp_claiming(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    content = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size + encoded(RGB, "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(content)) + content


def tiff_with_a_large_tile(side: int) -> bytes:
    """A picture of 16 x 16 in one tile of side x side that unpacks a thousandfold."""
    tile = zlib.compress(bytes(side * side), 9)
    tags = [(256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
            (322, 4, side), (323, 4, side), (324, 4, 8), (325, 4, len(tile))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + struct.pack("<H", len(tags)) + entries + bytes(4)


def scans(count: int) -> bytes:
    """A progressive JPEG with its last scan repeated."""
    data = encoded(RGB, "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def hidden(data: bytes) -> bytes:
    """With a marker before the scans that has no length, followed by what would be one that spans all of them."""
    at = data.index(b"\xff\xda")
    at = data.index(b"\xff\xc4", at)
    return data[:at] + b"\xff\x01\xff\xff" + data[at:]


SIDE = 9250
BOMBS: dict[str, tuple[bytes, str]] = {
    "png": (png(SIDE, SIDE, bytes(SIDE * (1 + (SIDE + 7) // 8))), "9250 x 9250 are more pixels than max_pixels"),
    "png claim": (png(2**31 - 1, 2**31 - 1), "DecompressionBombError"),
    "png line": (png(2**30, 1), "DecompressionBombError"),
    "jpeg": (claiming(LOSSY["jpeg"], 65500, 65500), "65500 x 65500 are more pixels"),
    "jpeg 0": (claiming(LOSSY["jpeg"], 0, 60), "cannot decode image"),
    "webp": (webp_claiming(16383, 16383), "cannot decode image"),
    "tiff tile": (tiff_with_a_large_tile(20000), "20000 x 20000 are more pixels"),
    "scans": (scans(10_000), f"more than {MAX_SCANS} scans"),
    "hidden scans": (hidden(scans(1000)), f"more than {MAX_SCANS} scans"),
    "gif": (b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded(PALETTE, "GIF")[10:], "DecompressionBombError"),
    "bmp": (encoded(RGB, "BMP")[:18] + struct.pack("<ii", 60000, 60000) + encoded(RGB, "BMP")[26:], "Decompression"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_by_what_it_claims(kind, tmp_path):
    data, message = BOMBS[kind]
    assert len(data) < 4e6
    with pytest.raises(UserError, match=message) as caught:
        decode(data, "bomb")
    assert "\n" not in str(caught.value)
    (tmp_path / "bomb").write_bytes(data)
    header = read_headers((str(tmp_path), ["bomb"]))[0]
    assert header.state == "unreadable" and header.problem


def test_memory_and_time_stay_bounded_for_all_bombs(tmp_path):
    """In a process of its own, whose memory grows by far less than any of them claims."""
    for kind, (data, _) in BOMBS.items():
        (tmp_path / kind.replace(" ", "_")).write_bytes(data)
    code = f"""
import resource, sys, time
from pathlib import Path
from ray_det.data.decode import read_image
from ray_det.data.headers import read_headers
from ray_det.types import UserError
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
paths = sorted(Path({str(tmp_path)!r}).iterdir())
for path in paths:
    try:
        read_image(str(path))
        raise SystemExit(f"{{path}} was decoded")
    except UserError:
        pass
states = {{h.state for h in read_headers(({str(tmp_path)!r}, [p.name for p in paths]))}}
assert states == {{"unreadable"}}, states
print(len(paths), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count, grown = done.stdout.split()
    assert int(count) == len(BOMBS) and float(grown) < 60, f"{grown} MiB"


def test_a_picture_at_the_limit_is_read_and_one_pixel_more_is_not(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(CASES["png"][0])
    size = path.stat().st_size
    assert read_image(str(path), ImageLimits(HEIGHT * WIDTH, size)).shape == PICTURE.shape
    with pytest.raises(UserError, match="60 x 40 are more pixels than max_pixels 2399"):
        read_image(str(path), ImageLimits(HEIGHT * WIDTH - 1, size))
    with pytest.raises(UserError, match=f"cannot read .*a.png: {size} bytes are more than max_bytes {size - 1}"):
        read_image(str(path), ImageLimits(HEIGHT * WIDTH, size - 1))
    with pytest.raises(UserError, match=f"{size} bytes are more than max_bytes {size - 1}"):
        decode(path.read_bytes(), "x", ImageLimits(HEIGHT * WIDTH, size - 1))


def test_a_large_file_is_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="more than max_bytes"):
        read_image(str(tmp_path / "a.jpg"))
    assert read_headers((str(tmp_path), ["a.jpg"]))[0].state == "unreadable"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_bytes_that_look_like_scans_behind_a_picture_are_no_scans():
    """Films and notes that cameras put behind a picture."""
    data = LOSSY["jpeg"] + b"\xff\xda" * 5000
    assert np.array_equal(decode(data, "x"), decode(LOSSY["jpeg"], "x"))


@pytest.mark.parametrize("kind", [k for k in [*CASES, *LOSSY] if k != "16 bit pgm"])
def test_cut_and_empty_files_are_one_line(kind):
    data = CASES[kind][0] if kind in CASES else LOSSY[kind]
    for end in (0, 1, 3, 10, 25, len(data) // 10):
        with pytest.raises(UserError, match="cannot decode image x.jpg: ") as caught:
            decode(data[:end], "x.jpg")
        assert "\n" not in str(caught.value)


def test_other_kinds_of_files_are_refused(tmp_path):
    """Pillow would hand PostScript to a program."""
    for data in (encoded(RGB, "EPS"), encoded(RGB, "ICO"), b"<svg/>", b"%PDF-1.4", b"PK\3\4"):
        with pytest.raises(UserError, match="^cannot decode image x: not an image, or of a kind that is not read$"):
            decode(data, "x")
        (tmp_path / "x").write_bytes(data)
        header = read_headers((str(tmp_path), ["x"]))[0]
        assert (header.state, header.problem) == ("unreadable", "not an image, or of a kind that is not read")
