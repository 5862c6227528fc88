"""The FFCV operation that decodes each JPEG once and cuts all its crops, compiled by numba.

Everything heavy is a module-level function, so that numba keeps the machine code on disk and a later process starts
at once. What changes between epochs comes in as an argument (`epoch_key`), never as a captured value: numba freezes
those. Random numbers and boxes are those of `harmony.randomness` and `harmony.views.crop_boxes`, operation by
operation in float64; a test compares them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import njit, prange, types

from ...harmony.randomness import GOLDEN as _GOLDEN
from ...harmony.randomness import MIX1 as _MIX1
from ...harmony.randomness import MIX2 as _MIX2
from ...harmony.randomness import Purpose
from ...harmony.views import CROP_ATTEMPTS, ViewsConfig
from . import ffcv_import  # noqa: F401 - before FFCV's own parts

from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder  # isort: skip
from ffcv.libffcv import ctypes_imdecode, ctypes_resize  # isort: skip
from ffcv.pipeline.allocation_query import AllocationQuery  # isort: skip
from ffcv.pipeline.state import State  # isort: skip

GOLDEN, MIX1, MIX2 = np.uint64(_GOLDEN), np.uint64(_MIX1), np.uint64(_MIX2)
CROP = np.uint64(int(Purpose.CROP))
JPG, RAW = int(IMAGE_MODES["jpg"]), int(IMAGE_MODES["raw"])


class Status(IntEnum):
    """What became of a sample's image."""

    GOOD = 0
    NOT_STORED = 1
    """the record points outside the file's data"""
    NOT_DECODED = 2
    """the decoder reported an error, or raw pixels have another size than the record says"""


_GOOD, _NOT_STORED, _NOT_DECODED = (int(status) for status in Status)


def _external(name: str, function: Any, signature: Any) -> types.ExternalFunction:
    """A C function called by name: unlike a ctypes pointer, numba can cache code that calls it."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    if address is None:
        raise ImportError(f"FFCV's library has no function for {name}")
    llvm.add_symbol(name, address)
    return types.ExternalFunction(name, signature)


_u32 = types.uint32
_jpeg_decode = _external(
    "harmony_fast_ffcv_imdecode",
    ctypes_imdecode,
    types.int32(types.uintp, types.uint64, _u32, _u32, types.uintp, *[_u32] * 8),
)
_area_resize = _external("harmony_fast_ffcv_resize", ctypes_resize, types.void(*[types.int64] * 11))


def epoch_key(seed: int, epoch: int) -> np.uint64:
    """The part of a sample's key that all samples of an epoch share: mix(mix(seed) + epoch)."""
    bits = (1 << 64) - 1
    head = int(mix(np.uint64(seed & bits))) + epoch
    return np.uint64(mix(np.uint64(head & bits)))


@njit(cache=True)
def mix(x: np.uint64) -> np.uint64:
    """The splitmix64 finaliser, as `randomness.mix`."""
    x = (x ^ (x >> np.uint64(30))) * MIX1
    x = (x ^ (x >> np.uint64(27))) * MIX2
    return x ^ (x >> np.uint64(31))


@njit(cache=True)
def child(key: np.uint64, number: int) -> np.uint64:
    """Key `number` (from 0) of `randomness.split(key, ...)`."""
    return mix(key + np.uint64(number + 1) * GOLDEN)


@njit(cache=True)
def uniform(key: np.uint64, number: int) -> float:
    """Number `number` (from 0) of `randomness.uniform(key, ...)`, in [0, 1)."""
    return np.float64(child(key, number) >> np.uint64(40)) * 2.0**-24


@njit(cache=True)
def crop_box(
    key: np.uint64, height: int, width: int, scale: Sequence[float], aspect: Sequence[float]
) -> tuple[int, int, int, int]:
    """One random resized crop: top, left, height, width in pixels.

    `crop_box(child(key, c), ...)` is crop c of `views.crop_boxes(key, ..., count, scale, aspect)`.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for attempt in range(CROP_ATTEMPTS):
        area = np.float64(height) * np.float64(width) * (scale[0] + (scale[1] - scale[0]) * uniform(key, 4 * attempt))
        ratio = math.exp(low + (high - low) * uniform(key, 4 * attempt + 1))
        w = math.floor(math.sqrt(area * ratio) + 0.5)
        h = math.floor(math.sqrt(area / ratio) + 0.5)
        if 1 <= w <= width and 1 <= h <= height:
            top = math.floor(uniform(key, 4 * attempt + 2) * (height - h + 1))
            left = math.floor(uniform(key, 4 * attempt + 3) * (width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width / height > aspect[1]:
        w = math.floor(height * aspect[1] + 0.5)
    if width / height < aspect[0]:
        h = math.floor(width / aspect[0] + 0.5)
    return (height - h) // 2, (width - w) // 2, h, w


@njit(cache=True)
def _decode(jpeg: np.ndarray, image: np.ndarray) -> int:
    """Decode into `image` (uint8 [h, w, 3]); 0 if all went well, warnings of the decoder included."""
    h, w = image.shape[0], image.shape[1]
    return _jpeg_decode(jpeg.ctypes.data, jpeg.size, h, w, image.ctypes.data, h, w, 0, 0, 1, 1, 0, 0)


@njit(cache=True)
def _shrink(image: np.ndarray, top: int, left: int, h: int, w: int, out: np.ndarray) -> None:
    """Area interpolation: every source pixel counts as much as it is covered, so nothing aliases."""
    _area_resize(
        0, image.ctypes.data, image.shape[0], image.shape[1], top, top + h, left, left + w,
        out.ctypes.data, out.shape[0], out.shape[1],
    )  # fmt: skip


@njit(cache=True)
def _neighbours(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `size` output pixels: the two source pixels around its centre, and the weight of the second."""
    first, second, weight = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.float32)
    for i in range(size):
        source = min(max((i + 0.5) * length / size - 0.5, 0.0), length - 1.0)
        first[i] = int(source)
        second[i] = min(first[i] + 1, length - 1)
        weight[i] = source - first[i]
    return first, second, weight


@njit(cache=True)
def _enlarge(image: np.ndarray, top: int, left: int, h: int, w: int, out: np.ndarray) -> None:
    """Bilinear interpolation with half-pixel centres (area interpolation would repeat pixels in blocks)."""
    above, below, down = _neighbours(h, out.shape[0])
    before, after, right = _neighbours(w, out.shape[1])
    pixels = image.reshape(image.shape[0], -1)
    row = np.empty(3 * w, np.float32)
    for y in range(out.shape[0]):
        upper, lower = top + above[y], top + below[y]
        for i in range(3 * w):
            value = np.float32(pixels[upper, 3 * left + i])
            row[i] = value + down[y] * (np.float32(pixels[lower, 3 * left + i]) - value)
        for x in range(out.shape[1]):
            a, b = 3 * before[x], 3 * after[x]
            for c in range(3):
                out[y, x, c] = np.uint8(np.int32(row[a + c] + right[x] * (row[b + c] - row[a + c]) + np.float32(0.5)))


@njit(cache=True)
def cut(image: np.ndarray, box: tuple[int, int, int, int], out: np.ndarray) -> None:
    """Resize `box` (top, left, height, width) of `image` uint8 [h, w, 3] into `out` uint8 [size, size, 3]."""
    top, left, h, w = box
    if h >= out.shape[0] and w >= out.shape[1]:
        _shrink(image, top, left, h, w, out)
    else:
        _enlarge(image, top, left, h, w, out)


@njit(cache=True)
def _load_image(mode: int, stored: np.ndarray, image: np.ndarray) -> int:
    """Fill `image` from the bytes of a sample; a `Status`."""
    if mode == JPG:
        return _GOOD if _decode(stored, image) == 0 else _NOT_DECODED
    if mode != RAW or stored.size != image.size:
        return _NOT_DECODED
    image[:] = stored.reshape(image.shape)
    return _GOOD


@njit(cache=True)
def _cut_sample(
    record: Any, storage: Any, key: np.uint64, geometry: np.ndarray, global_crops: np.ndarray, local_crops: np.ndarray
) -> int:
    """Decode one sample and cut its crops; a `Status`.

    record: mode, height, width, pointer; geometry: rows global scale, local scale, aspect.
    """
    mode, height, width, pointer = record
    file, pointers, sizes = storage
    place = np.searchsorted(pointers, pointer)
    if place == len(pointers) or pointers[place] != pointer:
        return _NOT_STORED
    start, end = np.int64(pointer), np.int64(pointer + sizes[place])
    if end > file.size or height == 0 or width == 0:
        return _NOT_STORED
    image = np.empty((height, width, 3), np.uint8)
    status = _load_image(mode, file[start:end], image)
    if status != _GOOD:
        return status
    for c in range(len(global_crops)):
        cut(image, crop_box(child(child(key, 0), c), height, width, geometry[0], geometry[2]), global_crops[c])
    for c in range(len(local_crops)):
        cut(image, crop_box(child(child(key, 1), c), height, width, geometry[1], geometry[2]), local_crops[c])
    return _GOOD


# The arrays come one by one: numba drops what a parallel loop writes to an array unpacked from a tuple.
@njit(parallel=True, nogil=True, cache=True)
def _cut_batch(
    indices: np.ndarray,
    global_crops: np.ndarray,
    local_crops: np.ndarray,
    status: np.ndarray,
    modes: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    starts: np.ndarray,
    file: np.ndarray,
    pointers: np.ndarray,
    sizes: np.ndarray,
    epoch_key: np.uint64,
    geometry: np.ndarray,
) -> None:
    for slot in prange(len(indices)):
        index = indices[slot]
        key = mix(mix(epoch_key + np.uint64(index)) + CROP)
        record = modes[index], np.int64(heights[index]), np.int64(widths[index]), starts[index]
        storage = file, pointers, sizes
        status[slot] = _cut_sample(record, storage, key, geometry, global_crops[slot], local_crops[slot])


def columns(images: np.ndarray) -> tuple[np.ndarray, ...]:
    """The metadata of an FFCV image field, a structured array [N], as arrays: mode, height, width, data_ptr (views)."""
    return tuple(images[name] for name in ("mode", "height", "width", "data_ptr"))


class MultiCrop(SimpleRGBImageDecoder):
    """Decoder of an FFCV image field that gives all crops of a sample, for images of any size.

    Output, a tuple: uint8 [B, G, size, size, 3] global crops, uint8 [B, N, size, size, 3] local crops, int32 [B]
    `Status` of each sample (crops of a sample that is not GOOD are undefined).

    Sample i's key is k = `sample_keys(seed, epoch, i, Purpose.CROP)`; its global boxes are
    `crop_boxes(split(k, 2)[0], count=G)`, its local boxes `crop_boxes(split(k, 2)[1], count=N)`.

    Two of the arguments FFCV calls the compiled function with are not FFCV's own, so whoever runs the epoch sets them:
    the storage state has a fourth entry beside (file, pointers, sizes), the uint64 `epoch_key`, so that a compiled
    pipeline serves all epochs; and the metadata are those of `columns`.
    """

    def __init__(self, views: ViewsConfig) -> None:
        super().__init__()
        self.views = views

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        """The buffers FFCV allocates, per sample."""
        v = self.views
        crops = (v.global_crops, v.global_size, v.global_size, 3), (v.local_crops, v.local_size, v.local_size, 3)
        buffers = [AllocationQuery(shape, np.dtype("u1")) for shape in crops]
        # Not bytes: when FFCV opens a file it marks numba's type of flat uint8 arrays as read-only, process-wide,
        # which makes numba lose compiled code whose signature has that type.
        buffers.append(AllocationQuery((), np.dtype("i4")))
        return replace(previous_state, jit_mode=True, shape=crops[0], dtype=np.dtype("u1")), tuple(buffers)

    def generate_code(self) -> Callable[..., Any]:
        """A thin function for FFCV to compile; the work is in the cached `_cut_batch`."""
        v = self.views
        geometry = np.array([v.global_scale, v.local_scale, v.aspect], np.float64)

        def decode(indices, memory, records, storage):  # type: ignore[no-untyped-def]
            crops_0, crops_1, status = memory
            mode, height, width, start = records
            file, pointers, sizes, head = storage
            _cut_batch(
                indices, crops_0, crops_1, status, mode, height, width, start, file, pointers, sizes, head, geometry
            )
            return memory

        return decode
