"""Tensors in files: images, .npy and .npz, read and written."""

import gc
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from poolrpc import AvgPool2d, InvalidArgumentError, MaxPool2d, PoolResult
from poolrpc.command.files import Source, load, save

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
MAX, MEAN = [(MaxPool2d(2),)], [(AvgPool2d(2),)]


def result(array, indices=None):
    """Return a result with this output."""
    return PoolResult(array, (array.shape,), indices)


@pytest.mark.parametrize(
    ("branches", "dtype"),
    [(MAX, np.uint8), (MEAN, np.float32), (MAX + MEAN, np.float32), ([(*MAX[0], *MEAN[0])], np.float32)],
)
def test_an_image_is_uint8_if_every_layer_takes_it(tmp_path, branches, dtype):
    """An image is channels-last uint8, or float32 with the same values if a layer takes no integers."""
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    source = load(tmp_path / "x.png", branches)
    assert (source.layout, source.x.dtype, source.indices) == ("NHWC", dtype, None)
    assert np.array_equal(source.x, PIXELS)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_an_image_of_any_mode_is_read_as_rgb(tmp_path, mode):
    """Grey, transparent and indexed images have three channels too."""
    Image.fromarray(PIXELS).convert(mode).save(tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"))
    path = next(tmp_path.iterdir())
    assert load(path, MAX).x.shape == (4, 6, 3)


def test_an_array_is_read_unchanged(tmp_path):
    """A .npy is a channels-first tensor; a .npz has it as x, or as its only array, and may have indices."""
    x, indices = np.ones((1, 2, 3), np.float64), np.zeros((1, 2, 3), np.int64)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "one.npz", anything=x)
    np.savez(tmp_path / "two.npz", x=x, indices=indices)
    for name in ("x.npy", "one.npz", "two.npz"):
        source = load(tmp_path / name, MAX)
        assert (source.layout, source.x.dtype) == ("NCHW", np.float64)
        assert np.array_equal(source.x, x)
        assert (source.indices is None) == (name != "two.npz")
    assert np.array_equal(load(tmp_path / "two.npz", MAX).indices, indices)


def npy(array):
    """Return the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz(**members):
    """Return the bytes of a .npz file with these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


WHOLE = npz(x=npy(np.ones(1000)))
DAMAGED = {
    "empty.npy": b"",
    "text.npy": b"text",
    "cut.npy": npy(np.ones(9))[:-8],
    "pickled.npy": npy(np.array([{}], object)),
    "open-header.npy": b"\x93NUMPY\x01\x00\x0b\x00{'descr': (\n",
    "empty.npz": b"",
    "text.npz": b"text",
    "cut.npz": WHOLE[:-20],
    "nothing-inside.npz": npz(),
    "no-x-inside.npz": npz(a=npy(np.ones(1)), b=npy(np.ones(1))),
    "text-inside.npz": npz(x=b"text"),
    "pickle-inside.npz": npz(x=npy(np.array([{}], object))),
    "damaged-inside.npz": WHOLE[:40] + b"\xff" * 10 + WHOLE[50:],
    "unknown-compression.npz": WHOLE[:8]
    + b"\x63"
    + WHOLE[9:].replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x08", b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x63"),
    "empty.png": b"",
    "text.png": b"text",
    "header.ppm": b"P6\n\x7f 8\n255\n",
    "cut.ppm": b"P6\n8 8\n255\n",
    "bomb.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_invalid_file_is_rejected(tmp_path, name):
    """A truncated, damaged or unknown file, a pickle and a decompression bomb raise errors with the file's name."""
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises((InvalidArgumentError, OSError), match=name):
        load(tmp_path / name, MAX)
    gc.collect()  # makes the warning of an unclosed file appear in this test


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.png"])
def test_a_missing_file_raises_file_not_found(tmp_path, name):
    """A missing file raises FileNotFoundError."""
    with pytest.raises(FileNotFoundError):
        load(tmp_path / name, MAX)


def test_outputs_are_written_to_one_file_each(tmp_path):
    """One output has the given name; several are numbered before the suffix; the paths are returned."""
    one, two = result(np.ones((1, 2))), result(np.zeros((2, 1)))
    source = Source(np.ones((2, 2)), "NCHW")
    assert save(tmp_path / "y.npy", [one], source) == [tmp_path / "y.npy"]
    assert save(tmp_path / "y.npy", [one, two], source) == [tmp_path / "y-0.npy", tmp_path / "y-1.npy"]
    assert np.array_equal(np.load(tmp_path / "y-1.npy"), two.output)


def test_a_npz_holds_every_output_and_its_indices(tmp_path):
    """A .npz has output and indices, numbered from 1 for further branches."""
    values, indices = np.ones((1, 2)), np.array([[3, 4]])
    paths = save(
        tmp_path / "y.npz",
        [result(values, indices), result(values * 2), result(values, indices)],
        Source(values, "NCHW"),
    )
    assert paths == [tmp_path / "y.npz"]
    with np.load(paths[0]) as arrays:
        assert sorted(arrays.files) == ["indices", "indices_2", "output", "output_1", "output_2"]
        assert np.array_equal(arrays["indices"], indices)
        assert np.array_equal(arrays["output_1"], values * 2)


def test_an_image_is_rounded_and_clipped(tmp_path):
    """A channels-last output is rounded, and clipped to 0..255."""
    output = np.array([[[-5.0, 0.4, 0.6], [254.6, 255.4, 1000.0]]], np.float32)
    save(tmp_path / "y.png", [result(output)], Source(output, "NHWC"))
    assert np.asarray(Image.open(tmp_path / "y.png")).tolist() == [[[0, 0, 1], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("name", "shape", "layout"),
    [
        ("y.png", (1, 3, 4, 4), "NCHW"),
        ("y.png", (1, 4, 4, 3), "NHWC"),
        ("y.png", (3, 4, 4), "NCHW"),
        ("y.xyz", (4, 4, 3), "NHWC"),
        ("y", (4, 4, 3), "NHWC"),
    ],
)
def test_an_output_that_is_not_an_image_is_rejected(tmp_path, name, shape, layout):
    """A batch, a channels-first output, and an unknown suffix are rejected with the file's name."""
    output = np.ones(shape, np.float32)
    with pytest.raises(InvalidArgumentError, match=name) as raised:
        save(tmp_path / name, [result(output)], Source(output, layout))
    assert [each.field for each in raised.value.violations] == ["save"]
