"""Tensors in files: images, .npy and .npz, there and back."""

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
    """Give a result with an output."""
    return PoolResult(array, (array.shape,), indices)


@pytest.mark.parametrize(
    ("branches", "dtype"),
    [(MAX, np.uint8), (MEAN, np.float32), (MAX + MEAN, np.float32), ([(*MAX[0], *MEAN[0])], np.float32)],
)
def test_an_image_is_read_as_bytes_where_every_layer_takes_them(tmp_path, branches, dtype):
    """An image is channels-last uint8, or float32 of the same values where a layer takes no integers."""
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    source = load(tmp_path / "x.png", branches)
    assert (source.layout, source.x.dtype, source.indices) == ("NHWC", dtype, None)
    assert np.array_equal(source.x, PIXELS)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_an_image_of_any_mode_is_read_in_colour(tmp_path, mode):
    """Grey, transparent and indexed images have three channels too."""
    Image.fromarray(PIXELS).convert(mode).save(tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"))
    path = next(tmp_path.iterdir())
    assert load(path, MAX).x.shape == (4, 6, 3)


def test_an_array_is_read_as_it_lies(tmp_path):
    """A .npy is a tensor in torch's order; a .npz has it as x, or as its only array, with indices beside it."""
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
    """Give the bytes of a .npy."""
    held = io.BytesIO()
    np.save(held, array, allow_pickle=True)
    return held.getvalue()


def npz(**members):
    """Give the bytes of a .npz with such members."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return held.getvalue()


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
def test_a_file_that_holds_no_tensor_is_refused(tmp_path, name):
    """A file that is cut, damaged, empty, another's, a pickle or a bomb is refused by name; nothing else is raised."""
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises((InvalidArgumentError, OSError), match=name):
        load(tmp_path / name, MAX)
    gc.collect()  # A file that was left open is warned of now, and here.


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.png"])
def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path, name):
    """A missing file is what it is."""
    with pytest.raises(FileNotFoundError):
        load(tmp_path / name, MAX)


def test_outputs_are_written_one_by_one(tmp_path):
    """One output has the name that was given, several are numbered before the suffix; all are said."""
    one, two = result(np.ones((1, 2))), result(np.zeros((2, 1)))
    source = Source(np.ones((2, 2)), "NCHW")
    assert save(tmp_path / "y.npy", [one], source) == [tmp_path / "y.npy"]
    assert save(tmp_path / "y.npy", [one, two], source) == [tmp_path / "y-0.npy", tmp_path / "y-1.npy"]
    assert np.array_equal(np.load(tmp_path / "y-1.npy"), two.output)


def test_a_npz_holds_every_output_and_its_indices(tmp_path):
    """A .npz has output and indices, those of further branches numbered from 1."""
    values, places = np.ones((1, 2)), np.array([[3, 4]])
    paths = save(
        tmp_path / "y.npz", [result(values, places), result(values * 2), result(values, places)], Source(values, "NCHW")
    )
    assert paths == [tmp_path / "y.npz"]
    with np.load(paths[0]) as held:
        assert sorted(held.files) == ["indices", "indices_2", "output", "output_1", "output_2"]
        assert np.array_equal(held["indices"], places)
        assert np.array_equal(held["output_1"], values * 2)


def test_an_image_is_rounded_and_cut_to_its_range(tmp_path):
    """A channels-last output becomes an image of bytes: rounded, with what is below 0 or over 255 cut."""
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
def test_what_is_no_image_is_not_saved_as_one(tmp_path, name, shape, layout):
    """A batch, a channels-first output, and a suffix that no image has are refused with the file's name."""
    output = np.ones(shape, np.float32)
    with pytest.raises(InvalidArgumentError, match=name) as raised:
        save(tmp_path / name, [result(output)], Source(output, layout))
    assert [each.field for each in raised.value.violations] == ["save"]
