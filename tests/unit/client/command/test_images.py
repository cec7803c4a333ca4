"""Images: read with their own depth and channels, written so, and rejected where Pillow cuts them."""

import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from poolrpc import (
    AvgPool2d,
    InvalidArgumentError,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    Normalize,
    PoolResult,
    Round,
    ToDtype,
)
from poolrpc.command.files import Source, load, target_for
from poolrpc.command.images import FORMATS, MODES, SUFFIXES, ImageKind
from poolrpc.command.inputs import find_inputs

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (4, 6, 3), np.uint8)
DEEP = RANDOM.integers(0, 65536, (4, 6), np.uint16)
MAX, MEAN = [(MaxPool2d(2),)], [(AvgPool2d(2),)]


def random_pixels(mode):
    """Return random pixels of a mode, with the ends of its range."""
    dtype, channels = MODES[mode]
    if dtype == "float32":
        return RANDOM.standard_normal((4, 6, channels)).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    pixels = RANDOM.integers(low, high, (4, 6, channels), dtype, endpoint=True)
    pixels[0, :2] = np.array([low, high])[:, None]
    return pixels


def image_of(pixels, mode):
    """Return Pillow's image of these pixels."""
    return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), pixels.tobytes())


def result(array):
    """Return a result with this output."""
    return PoolResult(array, (array.shape,))


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in FORMATS.items() for mode in modes])
def test_depth_and_channels_are_kept(tmp_path, name, mode):
    """What is written in any format is read again with its depth and channels, and its values unless it is a JPEG."""
    pixels = random_pixels(mode)
    path = tmp_path / f"x{SUFFIXES[name]}"
    target_for(path, Source(pixels, "NHWC", None, ImageKind(mode)), MAX, None).save([result(pixels)])
    source = load(path)
    assert (source.layout, source.image.mode, source.notes) == ("NHWC", mode, ())
    assert (source.x.dtype, source.x.shape) == (pixels.dtype, pixels.shape)
    assert name == "JPEG" or np.array_equal(source.x, pixels)
    with Image.open(path) as image:
        assert image.mode in (mode, "I")  # in which Pillow reads a .pgm of 16 bits


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in FORMATS for mode in MODES])
def test_a_format_that_does_not_keep_the_pixels_is_rejected(tmp_path, name, mode):
    """A suffix of another format is rejected before the call, with the formats that keep the pixels."""
    source = Source(random_pixels(mode), "NHWC", None, ImageKind(mode))
    if mode in FORMATS[name]:
        assert target_for(tmp_path / f"y{SUFFIXES[name]}", source, MAX, None).format == name
        return
    dtype, channels = MODES[mode]
    with pytest.raises(InvalidArgumentError, match=rf"save: expected .* keeps {channels} x {dtype} .*\.tiff") as raised:
        target_for(tmp_path / f"y{SUFFIXES[name]}", source, MAX, None)
    assert f"got '{SUFFIXES[name]}'" in str(raised.value)


@pytest.mark.parametrize("suffix", [".gif", ".pdf", ".xyz", ""])
def test_other_formats_are_rejected(tmp_path, suffix):
    """A format that may cut pixels, one that holds no image alone, and an unknown suffix are rejected."""
    source = Source(PIXELS, "NHWC", None, ImageKind("RGB"))
    with pytest.raises(InvalidArgumentError, match=f"got '{suffix}'"):
        target_for(tmp_path / f"y{suffix}", source, MAX, None)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
def test_16_bits_are_read_as_uint16(tmp_path, suffix):
    """A grey image of 16 bits, as Pillow writes it, is one channel of uint16."""
    Image.fromarray(DEEP).save(tmp_path / f"x{suffix}")
    source = load(tmp_path / f"x{suffix}")
    assert (source.x.dtype, source.image.mode) == (np.uint16, "I;16")
    assert np.array_equal(source.x[..., 0], DEEP)


def test_16_bits_of_the_other_byte_order_are_read(tmp_path):
    """A big-endian TIFF has the same values."""
    Image.frombytes("I;16B", (6, 4), DEEP.astype(">u2").tobytes()).save(tmp_path / "x.tiff")
    assert np.array_equal(load(tmp_path / "x.tiff").x[..., 0], DEEP)


@pytest.mark.parametrize(
    ("header", "maximum", "notes"),
    [
        (b"P5 6 4 65535\n", 65535, ()),
        (b"P5 6 4 1023\n", 1023, ("values of 0 to 1023 are scaled to 0 to 65535",)),
        (b"P5 6 4 15\n", 15, ("values of 0 to 15 are scaled to 0 to 255",)),
    ],
)
def test_the_values_of_a_pgm_are_scaled_with_a_note(tmp_path, header, maximum, notes):
    """Pillow scales values to the whole range of 8 or 16 bits, which is injective, and a note says so."""
    values = (np.arange(24).reshape(4, 6) * maximum // 23).astype(">u2" if maximum > 255 else "u1")
    (tmp_path / "x.pgm").write_bytes(header + values.tobytes())
    source = load(tmp_path / "x.pgm")
    full = 255 if maximum < 256 else 65535
    assert (source.notes, source.x.dtype.itemsize) == (notes, values.dtype.itemsize)
    assert np.array_equal(source.x[..., 0], np.rint(values.astype(float) * full / maximum))


def wide_png(colour, channels):
    """Return a PNG of 16 bits with colours, which Pillow doesn't write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(range(2 * channels)) * 2 for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(bits, sample_format, data, photometric=1, extra=()):
    """Return a TIFF of 2 x 2 pixels, of a kind that Pillow doesn't write."""
    count = len(bits)
    tags = [(256, 4, [2]), (257, 4, [2]), (258, 3, bits), (259, 3, [1]), (262, 3, [photometric]), (273, 4, [8])]
    tags += [(277, 3, [count]), (278, 4, [2]), (279, 4, [len(data)]), (339, 3, [sample_format] * count)]
    tags += [(338, 3, list(extra))] if extra else []
    tags.sort()
    offset = 8 + len(data) + len(data) % 2
    extras, entries, free = b"", b"", offset + 2 + 12 * len(tags) + 4
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            entries += struct.pack("<HHII", tag, kind, len(values), free + len(extras))
            extras += packed
        else:
            entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    ifd = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", offset) + data.ljust(offset - 8, b"\0") + ifd + extras


CUT = {
    "rgb16.png": wide_png(2, 3),
    "rgba16.png": wide_png(6, 4),
    "la16.png": wide_png(4, 2),
    "rgb16.ppm": b"P6 2 2 65535\n" + bytes(range(24)),
    "rgb10.ppm": b"P6 2 2 1023\n" + bytes(24),
    "rgb16.tiff": tiff([16] * 3, 1, bytes(range(24)), 2),
    "rgba16.tiff": tiff([16] * 4, 1, bytes(range(32)), 2, [2]),
    "cmyk16.tiff": tiff([16] * 4, 1, bytes(range(32)), 5),
    "float64.tiff": tiff([64], 3, np.ones(4).tobytes()),
    "rgbx.tiff": tiff([8] * 4, 1, bytes(range(16)), 2, [0]),
    "uint32.tiff": tiff([32], 1, np.full(4, 2**31, "<u4").tobytes()),
}


@pytest.mark.parametrize("name", CUT)
def test_what_pillow_cuts_is_rejected(tmp_path, name):
    """An image of which Pillow reads fewer bits or channels than it has is rejected with the file's name."""
    (tmp_path / name).write_bytes(CUT[name])
    with pytest.raises(InvalidArgumentError, match=f"^file: .*expected .*{name}|^file: .*{name}: expected"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff([16], 2, np.array([-32768, 0, 5, 32767], "<i2").tobytes()), [-32768, 0, 5, 32767]),
        (tiff([32], 1, np.array([0, 1, 5, 2**31 - 1], "<u4").tobytes()), [0, 1, 5, 2**31 - 1]),
        (tiff([32], 2, np.array([-(2**31), 1, 5, 2**31 - 1], "<i4").tobytes()), [-(2**31), 1, 5, 2**31 - 1]),
    ],
    ids=["int16", "uint32", "int32"],
)
def test_other_integers_are_read_as_int32(tmp_path, data, expected):
    """Signed integers, and unsigned ones of 32 bits that fit, are int32 with the same values."""
    (tmp_path / "x.tiff").write_bytes(data)
    source = load(tmp_path / "x.tiff")
    assert source.x.dtype == np.int32
    assert source.x.ravel().tolist() == expected


def test_palettes_and_bits_are_read_as_what_they_show(tmp_path):
    """A palette becomes RGB, or RGBA if it has transparency; 1 bit becomes 0 and 255; transparent greys become LA."""
    palette = Image.fromarray(PIXELS).quantize(16)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(load(tmp_path / "p.png").x, np.asarray(palette.convert("RGB")))
    palette.save(tmp_path / "t.png", transparency=3)
    clear = load(tmp_path / "t.png")
    assert clear.image.mode == "RGBA"
    assert np.array_equal(clear.x[..., 3] == 0, np.asarray(palette) == 3)
    bits = RANDOM.integers(0, 2, (4, 6)).astype(bool)
    for name in ("b.png", "b.tiff", "b.pbm"):
        Image.fromarray(bits).save(tmp_path / name)
        assert np.array_equal(load(tmp_path / name).x[..., 0], bits * np.uint8(255))
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "l.png", transparency=int(PIXELS[0, 0, 0]))
    grey = load(tmp_path / "l.png")
    assert grey.image.mode == "LA"
    assert np.array_equal(grey.x[..., 0], PIXELS[..., 0])
    assert grey.x[0, 0, 1] == 0
    Image.fromarray(PIXELS).save(tmp_path / "rgb.png", transparency=tuple(map(int, PIXELS[0, 0])))
    assert load(tmp_path / "rgb.png").x[0, 0].tolist() == [*PIXELS[0, 0].tolist(), 0]
    Image.fromarray(DEEP).save(tmp_path / "d.png", transparency=5)
    assert load(tmp_path / "d.png").notes in ((), ("the value that means transparent is left out",))


def test_a_mode_whose_values_are_not_amounts_is_rejected(tmp_path):
    """LAB, whose colours are signed, is rejected with the modes that are read."""
    Image.frombytes("LAB", (6, 4), PIXELS.tobytes()).save(tmp_path / "x.tiff")
    with pytest.raises(InvalidArgumentError, match=r"expected an image of mode 1, P, L, .*, got LAB"):
        load(tmp_path / "x.tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tiff", "x.webp"])
def test_the_orientation_of_exif_is_applied(tmp_path, name, orientation):
    """The pixels are as a viewer shows them, for every orientation."""
    blocks = np.kron(np.array([[0, 60, 120], [255, 200, 160]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "x.webp" else {}
    Image.fromarray(np.dstack([blocks] * 3)).save(tmp_path / name, exif=exif, **options)
    shown = {
        1: blocks,
        2: blocks[:, ::-1],
        3: blocks[::-1, ::-1],
        4: blocks[::-1],
        5: blocks.T,
        6: blocks[::-1].T,
        7: blocks[::-1, ::-1].T,
        8: blocks.T[::-1],
    }[orientation]
    source = load(tmp_path / name)
    assert source.x.shape == (*shown.shape, 3)
    assert np.abs(source.x[..., 0].astype(int) - shown).max() < 10
    target_for(tmp_path / "y.png", source, MAX, None).save([result(source.x)])
    assert np.array_equal(load(tmp_path / "y.png").x, source.x)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of the damage
def test_damaged_exif_is_left_out(tmp_path):
    """An image whose EXIF data can't be read is read as it is stored."""
    Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert np.array_equal(load(tmp_path / "x.png").x, PIXELS)


@pytest.mark.parametrize("name", ["x.gif", "x.tiff", "x.png", "x.webp"])
def test_later_frames_are_left_out_with_a_note(tmp_path, name):
    """The first frame of an animation, or the first page of a TIFF, is read, and a note counts the others."""
    frames = [Image.fromarray(np.full((4, 6, 3), value, np.uint8)) for value in (10, 200, 90)]
    options = {"lossless": True} if name == "x.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    source = load(tmp_path / name)
    assert source.notes == ("the frames after the first (2) are left out",)
    assert np.array_equal(source.x[..., :3], np.full((4, 6, 3), 10))


@pytest.mark.parametrize(
    ("mode", "layers", "converted"),
    [
        ("RGB", MAX, MAX),
        ("RGB", MEAN, [(ToDtype("float32"), *MEAN[0])]),
        ("RGB", MAX + MEAN, [MAX[0], (ToDtype("float32"), *MEAN[0])]),
        ("RGB", [(*MAX[0], *MEAN[0], *MEAN[0])], [(*MAX[0], ToDtype("float32"), *MEAN[0], *MEAN[0])]),
        ("RGB", [(ToDtype("float16"), *MEAN[0])], [(ToDtype("float16"), *MEAN[0])]),
        ("RGB", [(Round(), Normalize(1, 2), *MAX[0])], [(Round(), ToDtype("float32"), Normalize(1, 2), *MAX[0])]),
        ("I;16", MAX, MAX),
        ("I;16", MEAN, [(ToDtype("float32"), *MEAN[0])]),
        ("I", MAX, MAX),
        ("I", MEAN, [(ToDtype("float64"), *MEAN[0])]),
        ("F", MAX, MAX),
        ("F", MEAN, MEAN),
    ],
)
def test_integers_are_converted_before_a_layer_that_does_not_take_them(mode, layers, converted):
    """An image is sent as it is: the layers get a step to floats that have the same values, where they need one."""
    assert Source(random_pixels(mode), "NHWC", None, ImageKind(mode)).layers_for(layers) == (*converted,)


@pytest.mark.parametrize("layer", [MaxPool1d(2), MaxPool3d(1)])
def test_only_2d_layers_pool_an_image(layer):
    """A layer of another rank would take the rows for images, or the channels for an axis: it is rejected."""
    with pytest.raises(InvalidArgumentError, match="layer: expected 2d layers for an image"):
        Source(PIXELS, "NHWC", None, ImageKind("RGB")).layers_for([(layer,)])


@pytest.mark.parametrize(
    ("mode", "values", "expected", "notes"),
    [
        ("L", [-5.0, 0.4, 0.6, 254.6, 255.4, 1000.0], [0, 0, 1, 255, 255, 255], 2),
        ("I;16", [-1.0, 0.4, 300.6, 65534.6, 65535.4, 1e9], [0, 0, 301, 65535, 65535, 65535], 2),
        ("I", [-3e9, -0.6, 0.6, 7.0, 2147483647.0, 3e9], [-(2**31), -1, 1, 7, 2**31 - 1, 2**31 - 1], 2),
        ("L", [0.0, 1.0, 2.0, 3.0, 254.0, 255.0], [0, 1, 2, 3, 254, 255], 0),
    ],
)
def test_floats_are_rounded_to_the_depth_of_the_image(tmp_path, mode, values, expected, notes):
    """The result of an image of integers is rounded, and cut to its range with a note of how many values were cut."""
    output = np.array(values, np.float64).reshape(1, 6, 1)
    target = target_for(tmp_path / "y.tiff", Source(output, "NHWC", None, ImageKind(mode)), MEAN, None)
    changes = target.save([result(output)])
    assert load(tmp_path / "y.tiff").x.ravel().tolist() == expected
    assert [each.partition(" ")[0] for each in changes] == ([str(notes)] if notes else [])


def test_the_largest_integers_are_cut_from_float32_too(tmp_path):
    """float32 has no 2**31 - 1, so that 2**31 is beyond the range of an image of int32."""
    output = np.array([2.0**31, -(2.0**31)], np.float32).reshape(1, 2, 1)
    target = target_for(tmp_path / "y.tiff", Source(output, "NHWC", None, ImageKind("I")), MEAN, None)
    (change,) = target.save([result(output)])
    assert change.startswith("1 values outside")
    assert load(tmp_path / "y.tiff").x.ravel().tolist() == [2**31 - 1, -(2**31)]


def test_nan_is_not_a_pixel_of_integers(tmp_path):
    """NaN is rejected for an image of integers, and kept in one of floats."""
    output = np.full((1, 1, 1), np.nan, np.float32)
    target = target_for(tmp_path / "y.png", Source(output, "NHWC", None, ImageKind("L")), MEAN, None)
    with pytest.raises(InvalidArgumentError, match="save: expected numbers for an image of uint8, got NaN"):
        target.save([result(output)])
    assert not (tmp_path / "y.png").exists()
    target_for(tmp_path / "y.tiff", Source(output, "NHWC", None, ImageKind("F")), MEAN, None).save([result(output)])
    assert np.isnan(load(tmp_path / "y.tiff").x).all()


def test_the_colour_profile_is_kept(tmp_path):
    """The ICC profile of an image is written with the result."""
    Image.fromarray(PIXELS).save(tmp_path / "x.png", icc_profile=b"profile")
    source = load(tmp_path / "x.png")
    for name in ("y.png", "y.tiff", "y.jpg", "y.bmp"):
        target_for(tmp_path / name, source, MAX, None).save([result(source.x)])
        with Image.open(tmp_path / name) as image:
            assert image.info.get("icc_profile") == (None if name == "y.bmp" else b"profile")


def test_without_pillow_an_image_names_the_extra(tmp_path, monkeypatch):
    """If Pillow is not installed, an image is rejected with the extra that installs it, and arrays work."""
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", PIXELS)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InvalidArgumentError, match=r"expected Pillow .*: pip install 'poolrpc\[images\]'"):
        load(tmp_path / "x.png")
    assert np.array_equal(load(tmp_path / "x.npy").x, PIXELS)
    assert [path.name for path, _ in find_inputs([str(tmp_path)], None).files] == ["x.npy", "x.png"]
