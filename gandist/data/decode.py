"""Bytes of a member to uint8 arrays; sizes are checked before pixels are allocated, and nothing is ever unpickled."""

from __future__ import annotations

import io
import math
import struct
import tokenize
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

ENCODED = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "bmp": "BMP"}  # suffix -> Pillow's format
IMAGE_SUFFIXES = ("npy", *ENCODED)
LABEL_SUFFIX = "cls"
MAX_PIXELS = 1 << 26
_GREY_MODES = ("1", "L", "LA")


def channels_of(image: Image.Image) -> int:
    """1 for a grey image, 3 for any other; transparency does not count."""
    return 1 if image.mode in _GREY_MODES else 3


@lru_cache(maxsize=1024)
def _npy_shape(header: bytes) -> tuple[int, ...]:
    """The shape of a version-1 .npy header of uint8 in C order; the same few headers come again and again."""
    stream = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"version {version} instead of (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1024)
    except (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(f"has no .npy header that is read: {error}") from None
    if dtype != np.uint8 or fortran:
        raise ValueError(f"holds {dtype} {'in Fortran order' if fortran else ''}; an image is uint8 in C order")
    if len(shape) not in (2, 3) or not all(type(n) is int and n >= 1 for n in shape) or shape[2:] > (16,):
        raise ValueError(f"has shape {shape}; an image is (height, width) or (height, width, channels)")
    return shape


def _npy(data: bytes | memoryview) -> Pixels:
    """(H, W, C) view of the bytes of a .npy member."""
    if len(data) < 10:
        raise ValueError("is cut off")
    end = 10 + int.from_bytes(data[8:10], "little")
    shape = _npy_shape(bytes(data[:end]))
    if len(data) - end != math.prod(shape):
        raise ValueError(f"holds {len(data) - end} bytes of pixels for shape {shape}")
    return np.frombuffer(data, np.uint8, offset=end).reshape(shape if len(shape) == 3 else (*shape, 1))


def open_encoded(data: bytes | memoryview, suffix: str) -> Image.Image:
    """A Pillow image whose header has been read and whose size is within bounds; no pixels are decoded yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=[ENCODED[suffix]])
    except UnidentifiedImageError:
        raise ValueError(f"is not a {ENCODED[suffix]} image") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"is not a {ENCODED[suffix]} image: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"has {image.width}×{image.height} pixels; the limit is {MAX_PIXELS}")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"has mode {image.mode} (more than 8 bits a channel); convert it to 8 bits first")
    return image


def check_encoded(data: bytes | memoryview, suffix: str) -> None:
    """Decodes an encoded image to its end; raises ValueError when it is damaged, which its header does not tell."""
    try:
        open_encoded(data, suffix).load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot be decoded: {error}") from None


def image_shape(data: bytes | memoryview, suffix: str) -> tuple[int, int, int]:
    """(height, width, channels) as `image_pixels` will give them, from the header alone; raises ValueError."""
    if suffix == "npy":
        height, width, channels = _npy(data).shape
        return height, width, channels
    image = open_encoded(data, suffix)
    width, height = image.size
    try:
        orientation = image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise ValueError(f"has damaged EXIF: {error}") from None
    if orientation in (5, 6, 7, 8):  # the orientations that lie on their side
        width, height = height, width
    return height, width, channels_of(image)


def to_array(image: Image.Image, channels: int) -> Pixels:
    """(H, W, channels) uint8 of a Pillow image, turned as its EXIF says; transparency is dropped."""
    upright = ImageOps.exif_transpose(image)
    pixels = np.asarray(upright.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def image_pixels(data: bytes | memoryview, suffix: str, out: Pixels) -> None:
    """Decodes an image into `out` (H, W, C); raises ValueError when it is damaged or has another size."""
    if suffix == "npy":
        pixels = _npy(data)
    else:
        image = open_encoded(data, suffix)
        height, width, _ = image_shape(data, suffix)
        if (height, width) != out.shape[:2]:
            raise ValueError(f"is {width}×{height}, and the dataset says {out.shape[1]}×{out.shape[0]}")
        try:
            pixels = to_array(image, out.shape[2])
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"cannot be decoded: {error}") from None
    if pixels.shape != out.shape and pixels.shape != (*out.shape[:2], 1):  # grey spreads over the channels
        raise ValueError(f"has shape {pixels.shape}, and the dataset says {out.shape}")
    out[:] = pixels


def label_number(data: bytes | memoryview) -> int:
    """The class number that a `.cls` member holds as text."""
    text = bytes(data[:24])
    if not text.strip().isdigit() or len(data) > 20:
        raise ValueError(f"holds {text!r}; a label is a whole number as text")
    return int(text)
