"""Images, which Pillow reads and writes, as arrays of their own depth and channels."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from poolrpc.tensors import Array

MODES: dict[str, tuple[str, int]] = {
    "L": ("uint8", 1),
    "LA": ("uint8", 2),
    "RGB": ("uint8", 3),
    "RGBA": ("uint8", 4),
    "CMYK": ("uint8", 4),
    "I;16": ("uint16", 1),
    "I": ("int32", 1),
    "F": ("float32", 1),
}
"""Dtype and number of channels of an image, by Pillow's name of its mode."""

FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": ("L", "LA", "RGB", "RGBA", "I;16"),
    "TIFF": tuple(MODES),
    "PPM": ("L", "RGB", "I;16", "F"),
    "BMP": ("L", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
}
"""Modes whose depth and channels each format keeps, by Pillow's name of the format. Pillow cuts others in silence."""

SUFFIXES = {"PNG": ".png", "TIFF": ".tiff", "PPM": ".pgm", "BMP": ".bmp", "WEBP": ".webp", "JPEG": ".jpg"}
"""The suffix that a message proposes for a format."""

SAVE_OPTIONS: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True, "exact": True}}
"""Options with which Pillow writes a format as it is; JPEG always loses something."""

WIDE_SAMPLES = re.compile(r";(16|32|64)[A-Z]+$")
"""Pillow's name of a layout in a file with channels of more than 8 bits, as in "RGB;16B"; not "BGR;16" of 5 bits."""

ORIENTATION, BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, SAMPLE_FORMAT = 0x0112, 258, 277, 339
"""Numbers of tags in TIFF and EXIF."""


@dataclass(frozen=True, slots=True)
class ImageKind:
    """What an image is besides its pixels.

    Attributes:
        mode: Pillow's name of the mode; one of MODES.
        icc_profile: The colour profile; None if there is none.

    """

    mode: str
    icc_profile: bytes | None = None


def read_image(file: BinaryIO) -> tuple[Array, ImageKind, tuple[str, ...]]:
    """Read an image.

    Palettes become RGB or RGBA, and 1-bit images become 0 and 255: the same pixels. The orientation that EXIF names is
    applied.

    Returns:
        The pixels as (H, W, C) of the dtype in MODES, the kind, and what was left out, one sentence each.

    Raises:
        InvalidArgumentError: Pillow is not installed, or reads the file only with fewer bits or channels than it has.

    """
    module = image_module()
    from PIL import ImageOps, UnidentifiedImageError  # noqa: PLC0415 - optional; the line above checks that it is there

    try:
        image = module.open(file)
    except UnidentifiedImageError:
        raise ValueError("not in a format that Pillow reads") from None
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"the frames after the first ({frames - 1}) are left out")
    icc_profile, is_pnm, (layouts, maximum) = image.info.get("icc_profile"), image.format == "PPM", _in_file(image)
    tags = dict(getattr(image, "tag_v2", {}))
    _check_is_whole(image, layouts, maximum, tags)
    if maximum not in (255, 65535):
        notes.append(f"values of 0 to {maximum} are scaled to 0 to {255 if maximum < 255 else 65535}")  # noqa: PLR2004 - 8 bits
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - Pillow raises many types for damaged EXIF
        notes.append("the orientation is left out, since the EXIF data is damaged")
    image = _expand(image, notes)
    pixels: Array = np.asarray(image)
    mode = image.mode
    # In which Pillow reads 16 bits without a sign; those with a sign are "I;16S".
    if mode == "I" and (is_pnm or "I;16B" in layouts):
        mode = "I;16"
    unsigned = mode == "I" and tags.get(SAMPLE_FORMAT, (1,))[0] == 1 and BITS_PER_SAMPLE in tags
    if unsigned and pixels.min() < 0:
        raise _cut("values up to 2147483647", "larger ones")
    dtype, channels = MODES[mode]
    return (
        pixels.astype(dtype, copy=False).reshape(*pixels.shape[:2], channels),
        ImageKind(mode, icc_profile),
        (*notes,),
    )


def _in_file(image: Any) -> tuple[list[str], int]:  # noqa: ANN401 - Pillow is optional
    """Return Pillow's names of how pixels are in the file, such as "RGB;16B", and the largest value in a .pgm."""
    layouts, maximum = [], 255
    for codec, _, _, arguments in getattr(image, "tile", ()):
        several = arguments if isinstance(arguments, tuple | list) else (arguments,)
        layouts += [each for each in several if isinstance(each, str)]
        if codec in ("ppm", "ppm_plain"):
            maximum = next((each for each in several if isinstance(each, int)), maximum)
    return layouts, maximum


def _check_is_whole(image: Any, layouts: list[str], maximum: int, tags: dict[int, Any]) -> None:  # noqa: ANN401 - as above
    mode = "I;16" if image.mode.startswith("I;16") else image.mode
    bits = 8 * np.dtype(MODES.get(mode, ("uint8", 0))[0]).itemsize
    wide = [int(found[1]) for each in layouts if (found := WIDE_SAMPLES.search(each))]
    wide += [int(each) for each in tags.get(BITS_PER_SAMPLE, ())] + [maximum.bit_length()]
    if max(wide) > bits:
        raise _cut(f"at most {bits} bits in each channel of an image of mode {mode}", str(max(wide)))
    samples = int(tags.get(SAMPLES_PER_PIXEL, 1))
    if samples > len(image.getbands()):
        raise _cut(f"{len(image.getbands())} channels in an image of mode {mode}", str(samples))


def _cut(expected: str, got: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"expected {expected}, since Pillow reads no more, got {got}", field="file")


def _expand(image: Any, notes: list[str]) -> Any:  # noqa: ANN401 - Pillow is optional
    """Return an image of one of MODES with the same pixels."""
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if "transparency" in image.info:
        if image.mode in ("1", "L", "RGB"):
            return image.convert("RGBA" if image.mode == "RGB" else "LA")
        if image.mode not in ("LA", "RGBA"):
            notes.append("the value that means transparent is left out")
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I;16"):  # of any byte order
        return image if image.mode == "I;16" else image_module().fromarray(np.asarray(image).astype("<u2"))
    if image.mode not in MODES:
        msg = f"expected an image of mode 1, P, {', '.join(MODES)}, got {image.mode}"
        raise InvalidArgumentError(msg, field="file")
    return image


def check_format(suffix: str, kind: ImageKind) -> str:
    """Return Pillow's name of the format of a suffix.

    Raises:
        InvalidArgumentError: The suffix is not that of a format that keeps the depth and the channels of this kind.

    """
    name = image_module().registered_extensions().get(suffix.lower(), "")
    if kind.mode in FORMATS.get(name, ()):
        return str(name)
    dtype, channels = MODES[kind.mode]
    keeps = ", ".join(SUFFIXES[each] for each, modes in FORMATS.items() if kind.mode in modes)
    msg = f"expected the suffix of a format that keeps {channels} x {dtype} (mode {kind.mode}): {keeps}, .npy or .npz; "
    raise InvalidArgumentError(f"{msg}got {suffix!r}", field="save")


def encode_image(output: Array, kind: ImageKind, name: str) -> tuple[bytes, tuple[str, ...]]:
    """Return the bytes of an image file, and what was changed, one sentence each.

    Args:
        output: The pixels, (H, W, C). For an image of integers they are rounded, and cut to the range of its dtype.
        kind: The kind of the image.
        name: Pillow's name of the format, from check_format.

    Raises:
        InvalidArgumentError: The image has integers, and a pixel is NaN.

    """
    dtype = np.dtype(MODES[kind.mode][0])
    notes: tuple[str, ...] = ()
    if dtype.kind != "f" and output.dtype != dtype:
        if output.dtype.kind == "f" and np.isnan(output).any():
            raise InvalidArgumentError(f"expected numbers for an image of {dtype.name}, got NaN", field="save")
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        rounded = np.rint(output.astype(np.float64))  # in which the largest integers of 32 bits are exact
        outside = int(((rounded < low) | (rounded > high)).sum())
        if outside:
            notes = (f"{outside} values outside of {low} to {high} are cut to it",)
        output = np.clip(rounded, low, high)
    pixels = np.ascontiguousarray(output.astype(dtype, copy=False))
    image = image_module().frombytes(kind.mode, (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
    profile = {"icc_profile": kind.icc_profile} if kind.icc_profile else {}
    # Into memory first: when the disk is full, Pillow raises an error without the cause.
    encoded = io.BytesIO()
    image.save(encoded, name, **profile, **SAVE_OPTIONS.get(name, {}))
    return encoded.getvalue(), notes


def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that Pillow reads, in lower case; the usual ones if it is not installed."""
    try:
        module = image_module()
    except InvalidArgumentError:
        # So that the images of a folder fail with a message, and are not passed over.
        return frozenset({*SUFFIXES.values(), ".jpeg", ".tif", ".ppm", ".gif"})
    return frozenset(suffix for suffix, name in module.registered_extensions().items() if name in module.OPEN)


def image_module() -> Any:  # noqa: ANN401 - PIL's module, which is optional
    """Return PIL.Image.

    Raises:
        InvalidArgumentError: Pillow is not installed.

    """
    try:
        from PIL import Image  # noqa: PLC0415 - optional, and only images need it
    except ImportError:
        msg = "expected Pillow to be installed, for images: pip install 'poolrpc[images]'"
        raise InvalidArgumentError(msg, field="file") from None
    return Image
