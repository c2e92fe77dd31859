"""Bytes of a member to uint8 arrays; sizes are checked before pixels are allocated, and nothing is ever unpickled."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import warnings
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

png_decode: Any
try:  # wheels exist for the usual platforms; Pillow gives the same pixels elsewhere, at a third of the pace
    import simplejpeg
except ImportError:
    simplejpeg = None
try:
    from imagecodecs import png_decode
except ImportError:
    png_decode = None

# Of a damaged EXIF Pillow tells each entry; what is wrong with an image is said here, in one sentence.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

Pixels = npt.NDArray[np.uint8]
Bytes = bytes | memoryview

ENCODED = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "bmp": "BMP"}  # suffix -> Pillow's format
IMAGE_SUFFIXES = ("npy", *ENCODED)
LABEL_SUFFIX = "cls"
MASK_SUFFIXES = ("mask.png", "mask.npy", "seg.png")
SIGNAL_SUFFIX = "signal.npy"
ROLES = {  # what a member is, by its suffix; members of other suffixes are never read
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    LABEL_SUFFIX: "label",
    **dict.fromkeys(MASK_SUFFIXES, "mask"),
    SIGNAL_SUFFIX: "signal",
}
MAX_PIXELS = 1 << 26
MAX_SIGNAL = 1 << 24  # values of one signal
MAX_CHANNELS = 4096  # of one signal
_SPREAD = {2: 85, 4: 17}
_TURNS = {  # by EXIF's orientation; Pillow's own way writes the EXIF anew, and fails on what it cannot write
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY_MODES = ("1", "L", "LA")
_EXIF = b"Exif\0\0"


def channels_of(image: Image.Image) -> int:
    """1 for a grey image, 3 for any other; transparency does not count."""
    return 1 if image.mode in _GREY_MODES else 3


@lru_cache(maxsize=1024)
def _npy_shape(header: bytes, kind: str = "|u1", axes: tuple[int, ...] = (2, 3)) -> tuple[int, ...]:
    """The shape of a version-1 .npy header in C order; the same few headers come again and again."""
    stream = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"version {version} instead of (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1024)
    except (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(f"has no .npy header that is read: {error}") from None
    if dtype != np.dtype(kind) or fortran:
        wanted = "an image is uint8" if kind == "|u1" else "a signal is float32"
        raise ValueError(f"holds {dtype} {'in Fortran order' if fortran else ''}; {wanted} in C order")
    if len(shape) not in axes or not all(type(n) is int and n >= 1 for n in shape) or shape[2:] > (16,):
        wanted = (
            "a signal is (channels, length)"
            if kind != "|u1"
            else "an image is (height, width) or (height, width, channels)"
        )
        raise ValueError(f"has shape {shape}; {wanted}")
    return shape


def npy_header(data: Bytes) -> bytes:
    """The header of a .npy member, up to where its values begin."""
    if len(data) < 10:
        raise ValueError("is cut off")
    return bytes(data[: 10 + int.from_bytes(data[8:10], "little")])


def npy_shape(header: bytes) -> tuple[int, int, int]:
    """(H, W, C) of an image from its .npy header; raises ValueError."""
    shape = _npy_shape(header)
    return shape if len(shape) == 3 else (*shape, 1)  # type: ignore[return-value]


def _npy(data: Bytes) -> Pixels:
    """(H, W, C) view of the bytes of a .npy member."""
    header = npy_header(data)
    shape = npy_shape(header)
    if len(data) - len(header) != math.prod(shape):
        raise ValueError(f"holds {len(data) - len(header)} bytes of pixels for shape {shape}")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def signal_values(data: Bytes) -> npt.NDArray[np.float32]:
    """(C, L) view of the values of a signal; raises ValueError."""
    header = npy_header(data)
    shape = _npy_shape(header, "<f4", (2,))
    if shape[0] > MAX_CHANNELS:
        raise ValueError(f"has {shape[0]} channels; the limit is {MAX_CHANNELS}")
    if len(data) - len(header) != 4 * math.prod(shape) or math.prod(shape) > MAX_SIGNAL:
        raise ValueError(
            f"holds {len(data) - len(header)} bytes of values for shape {shape}; the limit is {MAX_SIGNAL} values"
        )
    values = np.frombuffer(data, "<f4", offset=len(header)).reshape(shape)
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    return values


def _jpeg_head(data: Bytes) -> tuple[int, int, int] | None:
    """(height, width, channels) of a JPEG that can be decoded as it lies; None where Pillow must look."""
    if simplejpeg is None or _EXIF in bytes(data[: 1 << 16]):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    channels = {"Gray": 1, "YCbCr": 3}.get(colours)
    return (height, width, channels) if channels and height * width <= MAX_PIXELS else None


def _png_head(data: Bytes) -> tuple[int, int, int] | None:
    """(height, width, channels) of a PNG of 8 bits a channel, grey or RGB, and nothing out of the ordinary; else None."""
    head = bytes(data[:33])
    if len(head) < 33 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        return None
    width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
    channels = {0: 1, 2: 3}.get(colour) if depth == 8 else None
    if (
        not channels
        or not 0 < width * height <= MAX_PIXELS
        or zlib.crc32(head[12:29]) != int.from_bytes(head[29:33], "big")
    ):
        return None
    before_pixels = bytes(
        data[33 : 1 << 12]
    )  # what could turn the image, add a channel or make libpng complain is here
    return None if any(chunk in before_pixels for chunk in (b"eXIf", b"tRNS", b"iCCP")) else (height, width, channels)


def _fast_head(data: Bytes, suffix: str) -> tuple[int, int, int] | None:
    if suffix in ("jpg", "jpeg"):
        return _jpeg_head(data)
    return _png_head(data) if suffix == "png" else None


def is_turned(data: Bytes, suffix: str) -> bool:
    """Whether EXIF turns or mirrors an image; raises ValueError."""
    if suffix == "npy" or _fast_head(data, suffix) is not None:
        return False
    return _orientation(open_encoded(data, suffix)) != 1


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error) as error:
        raise ValueError(f"has damaged EXIF: {error}") from None
    return found if found in range(1, 9) else 1


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
    deep = suffix == "png" and bytes(data[24:25]) == b"\x10"  # Pillow would cut RGB down to 8 bits
    if deep or image.mode.startswith(("I", "F")):
        raise ValueError(f"has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits first")
    return image


def check_encoded(data: bytes | memoryview, suffix: str) -> None:
    """Decodes an encoded image to its end; raises ValueError when it is damaged, which its header does not tell."""
    try:
        open_encoded(data, suffix).load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot be decoded: {error}") from None


def image_shape(data: Bytes, suffix: str) -> tuple[int, int, int]:
    """(height, width, channels) as `decoded` will give them, from the header alone; raises ValueError."""
    if suffix == "npy":
        header = npy_header(data)
        height, width, channels = npy_shape(header)
        if height * width > MAX_PIXELS:
            raise ValueError(f"has {width}×{height} pixels; the limit is {MAX_PIXELS}")
        if len(data) - len(header) != height * width * channels:
            raise ValueError(f"holds {len(data) - len(header)} bytes of pixels for shape {(height, width, channels)}")
        return height, width, channels
    fast = _fast_head(data, suffix)
    if fast is not None:
        return fast
    image = open_encoded(data, suffix)
    width, height = image.size
    if _orientation(image) in (5, 6, 7, 8):  # the orientations that lie on their side
        width, height = height, width
    return height, width, channels_of(image)


def to_array(image: Image.Image, channels: int) -> Pixels:
    """(H, W, channels) uint8 of a Pillow image, turned as its EXIF says; transparency is dropped."""
    turn = _TURNS.get(_orientation(image))
    upright = image.transpose(turn) if turn is not None else image
    pixels = np.asarray(upright.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def decoded(data: Bytes, suffix: str, channels: int, out: Pixels | None = None) -> Pixels:
    """(H, W, channels) pixels of an image, in `out` where that has its size; raises ValueError when it is damaged.

    Which library decodes does not show in the pixels: both use libjpeg-turbo's accurate transform.
    """
    if suffix == "npy":
        return _npy(data)
    head = _fast_head(data, suffix)
    if head is not None and head[2] == channels:
        into = out if out is not None and out.shape == head and out.flags.c_contiguous else None
        try:
            if suffix != "png":
                colours = "GRAY" if channels == 1 else "RGB"
                pixels: Pixels = simplejpeg.decode_jpeg(data, colours, fastdct=False, fastupsample=False, buffer=into)
                return pixels
            if png_decode is not None:
                pixels = png_decode(
                    bytes(data), out=into.reshape(head if channels == 3 else head[:2]) if into is not None else None
                )
                return pixels.reshape(head)
        except (ValueError, RuntimeError) as error:  # imagecodecs' own errors are RuntimeErrors
            raise ValueError(f"cannot be decoded: {error}") from None
    image = open_encoded(data, suffix)
    try:
        return to_array(image, channels)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise ValueError(f"cannot be decoded: {error}") from None


def image_pixels(data: Bytes, suffix: str, out: Pixels) -> None:
    """Decodes an image into `out` (H, W, C); raises ValueError when it is damaged or has another size."""
    height, width, _ = image_shape(data, suffix)
    if (height, width) != out.shape[:2]:  # before pixels are allocated
        raise ValueError(f"is {width}×{height}, and the dataset says {out.shape[1]}×{out.shape[0]}")
    pixels = decoded(data, suffix, out.shape[2], out)
    if pixels.shape[2] != out.shape[2] and pixels.shape[2] != 1:
        raise ValueError(f"has {pixels.shape[2]} channels, and the dataset says {out.shape[2]}")
    if not np.shares_memory(pixels, out):
        out[:] = pixels


def mask_classes(data: Bytes, suffix: str) -> Pixels:
    """(H, W) class numbers of a mask: the values of a grey PNG, the indices of a palette PNG, or a 2-D array; raises ValueError."""
    if suffix.endswith("npy"):
        pixels = _npy(data)
        if pixels.shape[2] != 1:
            raise ValueError(f"has {pixels.shape[2]} channels; a mask has one")
        return pixels[:, :, 0]
    image = open_encoded(data, "png")
    if image.mode not in ("P", "L", "1"):
        raise ValueError(f"has the mode {image.mode}; a mask is a grey or palette PNG of class numbers, not of colours")
    try:
        pixels = np.asarray(image, dtype=np.uint8)  # of a palette image these are its indices
        # Pillow spreads grey values of 2 and 4 bits over 0 … 255; as class numbers they are what was stored.
        return pixels // _SPREAD[depth] if image.mode == "L" and (depth := data[24]) in _SPREAD else pixels
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot be decoded: {error}") from None


def label_number(data: Bytes) -> int:
    """The class number that a `.cls` member holds as text."""
    text = bytes(data[:24])
    if not text.strip().isdigit() or len(data) > 20:
        raise ValueError(f"holds {text!r}; a label is a whole number as text")
    return int(text)
