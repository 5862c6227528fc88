"""From the bytes of an image file, of any quality the web has, to a checked RGB image or JPEG.

EXIF orientation is ignored everywhere, as img2dataset and plain PIL pipelines do: a JPEG that is passed through and one
that is encoded again then show the same picture.
"""

from __future__ import annotations

import ctypes
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, WebPImagePlugin

MAX_PIXELS = 1 << 27
"""Images with more pixels (134 million) are taken for decompression bombs."""
FORMATS = ("JPEG", "PNG", "GIF", WebPImagePlugin.WebPImageFile.format)  # PIL registers WebP only when it is imported
FULL_CHROMA_BELOW = 256
"""Images smaller than this are encoded without chroma subsampling, which blurs the colours of small drawings."""


class Rejected(Exception):
    """A sample that cannot be used; the message is the reason, from a small fixed vocabulary."""


@dataclass(frozen=True)
class Jpeg:
    """A JPEG that decodes without complaint."""

    data: bytes
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    passed_through: bool
    """The bytes are the source's own."""


def to_jpeg(data: bytes, max_side: int, min_side: int, quality: int) -> Jpeg:
    """An RGB JPEG of the image file `data`, sides between min_side and max_side pixels.

    A plain RGB JPEG within bounds that libjpeg-turbo decodes without complaint is passed through byte for byte;
    everything else is converted to RGB (transparency over white), shrunk where needed and encoded at `quality`.
    Raises Rejected.
    """
    image = open_image(data)
    width, height = bounded(image.size, max_side)
    if min(width, height) < min_side:
        raise Rejected(f"image smaller than {min_side} px")
    if (width, height) == image.size and _is_plain(image, data) and turbo_decodes(data, width, height):
        return Jpeg(data, width, height, True)
    if (width, height) != image.size:
        image.draft("RGB", (2 * width, 2 * height))  # a JPEG four times too large need not be decoded in full
    rgb = to_rgb(image)
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
    return Jpeg(_encode(rgb, quality), width, height, False)


def decode_rgb(data: bytes) -> Image.Image:
    """The image file `data` as an RGB image in its own size, transparency over white. Raises Rejected."""
    return to_rgb(open_image(data))


def bounded(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """`size` (width, height) scaled down so that neither side exceeds max_side pixels; the aspect ratio is kept."""
    scale = min(1.0, max_side / max(size))
    return round(size[0] * scale), round(size[1] * scale)


def open_image(data: bytes) -> Image.Image:
    """An image file's header; nothing is decoded yet. Raises Rejected."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # bounded below, by our own limit
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Image.DecompressionBombError:
        raise Rejected("image too large (decompression bomb)") from None
    except Exception:
        # Whatever a parser raises on hostile bytes (SyntaxError, struct.error, IndexError, ...) means the same here.
        raise Rejected("image not readable") from None
    if image.width * image.height > MAX_PIXELS:
        raise Rejected("image too large (decompression bomb)")
    if animated:
        raise Rejected("image animated")
    return image


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """An RGB JPEG without a heavy load of metadata (which a re-encoding drops)."""
    return image.format == "JPEG" and image.mode == "RGB" and len(data) <= 3 * image.width * image.height + (1 << 16)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image to RGB, transparency over white. Raises Rejected."""
    _load(image)
    if image.mode.startswith("I"):  # 16 bits a pixel; PIL's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _load(image: Image.Image) -> None:
    before = ImageFile.LOAD_TRUNCATED_IMAGES  # another library may have switched it on: gray halves, silently
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image.load()
    except Exception:
        raise Rejected("image truncated or corrupt") from None  # as in open_image: any exception of a decoder
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _encode(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    subsampling = "4:4:4" if max(image.size) < FULL_CHROMA_BELOW else "4:2:0"
    image.save(file, "JPEG", quality=quality, subsampling=subsampling)
    return file.getvalue()


def turbo_decodes(jpeg: bytes, width: int, height: int) -> bool:
    """Whether FFCV's decoder reads `jpeg` (width x height pixels) to the end without an error or a warning.

    FFCV's loader ignores the decoder's verdict and leaves an old image in the buffer: what it cannot read must not
    get into a file.
    """
    source = np.frombuffer(jpeg, np.uint8)
    pixels = np.empty((height, width, 3), np.uint8)
    size = height, width
    return _imdecode()(source.ctypes.data, source.size, *size, pixels.ctypes.data, *size, 0, 0, 1, 1, False, False) == 0


@cache
def _imdecode() -> Callable[..., int]:
    """The C function behind `ffcv.libffcv.imdecode`, without the seconds that importing ffcv takes."""
    spec = find_spec("ffcv")
    if spec is None or spec.origin is None:
        raise ImportError("ffcv is not installed")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("_libffcv*.so"))))
    number, pointer, flag = ctypes.c_uint32, ctypes.c_void_p, ctypes.c_bool
    library.imdecode.argtypes = [pointer, ctypes.c_uint64, number, number, pointer, *6 * [number], flag, flag]
    return library.imdecode
