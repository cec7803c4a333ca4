"""Tensors in files: .npy and .npz, read and written; tests of images are in test_images.py."""

import gc
import io
import os
import resource
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from poolrpc import AvgPool2d, InvalidArgumentError, MaxPool2d, MaxPool3d, MaxUnpool2d, PoolResult
from poolrpc.command.files import Source, load, target_for

MAX, MEAN = [(MaxPool2d(2),)], [(AvgPool2d(2),)]
WITH_INDICES = [(MaxPool2d(2, return_indices=True),)]


def result(array, indices=None):
    """Return a result with this output."""
    return PoolResult(array, (array.shape,), indices)


def test_an_array_is_read_unchanged(tmp_path):
    """A .npy is a tensor; a .npz has it as x, or as its only array, and may have indices and a layout."""
    x, indices = np.ones((1, 2, 3), np.float64), np.zeros((1, 2, 3), np.int64)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "one.npz", anything=x)
    np.savez(tmp_path / "two.npz", x=x, indices=indices)
    np.savez(tmp_path / "three.npz", x=x, layout=np.array("NHWC"))
    for name in ("x.npy", "one.npz", "two.npz", "three.npz"):
        source = load(tmp_path / name)
        assert (source.layout, source.x.dtype, source.image) == (
            "NHWC" if name == "three.npz" else None,
            np.float64,
            None,
        )
        assert np.array_equal(source.x, x)
        assert (source.indices is None) == (name != "two.npz")
        assert source.notes == ()
    assert np.array_equal(load(tmp_path / "two.npz").indices, indices)


def test_arrays_that_are_left_out_are_named(tmp_path):
    """A .npz with other arrays next to x is read with a note that names them."""
    np.savez(tmp_path / "x.npz", x=np.ones(3), mean=np.ones(1), labels=np.ones(2))
    assert load(tmp_path / "x.npz").notes == ("the arrays mean, labels are left out",)


@pytest.mark.parametrize("name", ["X.NPY", "x.Npz"])
def test_a_suffix_may_be_in_capitals(tmp_path, name):
    """Files with a suffix in capitals are read and written as arrays, under their own names."""
    x = np.ones((1, 1, 2, 2), np.float32)
    target_for(tmp_path / name, Source(x), MAX, None).save([result(x)])
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert np.array_equal(load(tmp_path / name).x, x)


def test_the_layout_is_that_of_the_file_or_else_the_users():
    """The user's layout applies to a file that states none; another one than the file's is rejected."""
    x = np.ones((1, 2, 3))
    assert [Source(x).layout_for(each) for each in (None, "NCHW", "NHWC")] == ["NCHW", "NCHW", "NHWC"]
    assert [Source(x, "NHWC").layout_for(each) for each in (None, "NHWC")] == ["NHWC", "NHWC"]
    with pytest.raises(InvalidArgumentError, match="layout: expected NHWC, which is the layout of the file, got NCHW"):
        Source(x, "NHWC").layout_for("NCHW")


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
    "unknown-layout.npz": npz(x=npy(np.ones(1)), layout=npy(np.array("CHW"))),
    "huge.npy": npy(np.ones(1)).replace(b"'shape': (1,), }" + b" " * 15, b"'shape': (%d,), }" % 10**15),
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
    with pytest.raises((InvalidArgumentError, OSError), match=name) as raised:
        load(tmp_path / name)
    assert not str(raised.value).rstrip().endswith((":", "got"))
    gc.collect()  # makes the warning of an unclosed file appear in this test


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.png"])
def test_a_missing_file_raises_file_not_found(tmp_path, name):
    """A missing file raises FileNotFoundError."""
    with pytest.raises(FileNotFoundError):
        load(tmp_path / name)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_outputs_are_written_to_one_file_each(tmp_path, suffix):
    """One output has the given name; several are numbered before the suffix; each is read again as it was."""
    outputs = [np.ones((1, 1, 1, 2)), np.zeros((1, 1, 2, 1))]
    source = Source(np.ones((1, 1, 2, 2)))
    one = target_for(tmp_path / f"y{suffix}", source, MAX, None)
    assert one.paths == (tmp_path / f"y{suffix}",)
    target = target_for(tmp_path / f"y{suffix}", source, MAX + MEAN, None)
    assert target.paths == (tmp_path / f"y-0{suffix}", tmp_path / f"y-1{suffix}")
    target.save(list(map(result, outputs)))
    for path, output in zip(target.paths, outputs, strict=True):
        assert np.array_equal(load(path).x, output)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_npz_is_read_as_it_was_written(tmp_path, layout):
    """A .npz has the output, its indices and the layout."""
    output, indices = np.ones((1, 2, 2, 3), np.float32), np.full((1, 2, 2, 3), 7)
    source = Source(np.ones((1, 4, 4, 6), np.float32))
    target_for(tmp_path / "y.npz", source, WITH_INDICES, layout).save([result(output, indices)])
    read = load(tmp_path / "y.npz")
    assert (read.layout, read.notes) == (layout, ())
    assert np.array_equal(read.x, output)
    assert np.array_equal(read.indices, indices)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_bfloat16_is_read_as_it_was_written(tmp_path, suffix):
    """NumPy's files hold it as two bytes without a meaning."""
    output = np.arange(24).reshape(1, 2, 3, 4).astype(ml_dtypes.bfloat16)
    target_for(tmp_path / f"y{suffix}", Source(output), [(MaxPool2d(1),)], None).save([result(output)])
    read = load(tmp_path / f"y{suffix}").x
    assert read.dtype == ml_dtypes.bfloat16
    assert np.array_equal(read, output)


@pytest.mark.parametrize(
    ("layers", "shape", "expected"),
    [(MAX, (2, 4, 4, 3), (2, 3, 4, 4)), (MAX, (4, 4, 3), (3, 4, 4)), ([(MaxPool3d(1),)], (4, 4, 4, 3), (3, 4, 4, 4))],
)
def test_a_npy_is_channels_first_unless_the_user_chose_a_layout(tmp_path, layers, shape, expected):
    """What is NHWC by the file is written NCHW, as a .npy is read; with the user's --layout it stays as it is."""
    output = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    source = Source(output, "NHWC")
    target = target_for(tmp_path / "y.npy", source, layers, None)
    target.save([result(output)])
    read = load(tmp_path / "y.npy").x
    assert read.shape == expected
    assert target.remark == " as NCHW"
    assert np.array_equal(np.moveaxis(read, -len(expected) + (len(expected) == 4 and layers is MAX), -1), output)
    chosen = target_for(tmp_path / "z.npy", source, layers, "NHWC")
    chosen.save([result(output)])
    assert np.array_equal(load(tmp_path / "z.npy").x, output)
    assert chosen.remark == ""


@pytest.mark.parametrize("name", ["y.npy", "y.NPY", "y.png", "y.tiff"])
@pytest.mark.parametrize("layers", [WITH_INDICES, MAX + WITH_INDICES])
def test_indices_are_not_dropped(tmp_path, name, layers):
    """A layer with return_indices is rejected for every format but .npz, before the call."""
    with pytest.raises(InvalidArgumentError, match=f"save: expected .npz for a layer with return_indices.*{name}"):
        target_for(tmp_path / name, Source(np.ones((1, 1, 4, 4), np.float32)), layers, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["y.png", "y.xyz", "y"])
def test_an_output_that_is_not_an_image_is_rejected(tmp_path, name):
    """A suffix other than .npy and .npz is rejected with the file's name for an array."""
    with pytest.raises(InvalidArgumentError, match=f"save: expected .npy or .npz .*{name}$"):
        target_for(tmp_path / name, Source(np.ones((1, 1, 4, 4), np.float32)), MAX, None)


def test_a_missing_folder_is_rejected_before_the_call(tmp_path):
    """A file in a folder that does not exist is rejected, and the folder is not created."""
    with pytest.raises(InvalidArgumentError, match="save: expected a file in an existing folder"):
        target_for(tmp_path / "no" / "y.npy", Source(np.ones((1, 1, 4, 4))), MAX, None)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["y.npy", "y.npz"])
def test_a_full_disk_leaves_the_old_file(tmp_path, name):
    """If a file can't be written, the error names it and the cause, and the file that was there is unchanged."""
    path = tmp_path / name
    path.write_bytes(b"old")
    target = target_for(path, Source(np.ones((1, 1, 4, 4), np.float32)), MAX, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=f"File too large.*{name}"):
            target.save([result(np.ones((1, 1, 400, 400), np.float32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208 - the names alone
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["y.npy", "y.npz"])
def test_a_device_is_written_in_place(tmp_path, name):
    """A link to a device is written through; a full one has an error with the file and the cause."""
    (tmp_path / name).symlink_to("/dev/full")
    target = target_for(tmp_path / name, Source(np.ones((1, 1, 4, 4), np.float32)), MAX, None)
    with pytest.raises(OSError, match="No space left on device"):
        target.save([result(np.ones((1, 1, 4, 4), np.float32))])
    assert Path("/dev/full").is_char_device()
    assert (tmp_path / name).is_symlink()


def test_only_an_image_is_converted():
    """The layers of an array are those of the user, whatever they take."""
    x = np.ones((1, 1, 4, 4), np.uint8)
    assert Source(x).layers_for(MEAN) == (*MEAN,)
    assert Source(x).layers_for([(MaxUnpool2d(2),)]) == ((MaxUnpool2d(2),),)
