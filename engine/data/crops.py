"""Decode each JPEG once and cut all its crops, compiled by numba around FFCV's decoder.

Everything heavy is a module-level function, so that numba keeps the machine code on disk and a later process starts
at once. What changes between epochs comes in as an argument (`epoch_key`), never as a captured value: numba freezes
those. Random numbers and boxes are those of `harmony.randomness` and `harmony.views.crop_boxes`, operation by
operation in float64; a test compares them. `ffcv_operation` makes an operation for FFCV's own loader of it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, cast

import llvmlite.binding as llvm
import numpy as np
from numba import njit, prange, types

from ...harmony.randomness import GOLDEN as _GOLDEN
from ...harmony.randomness import MIX1 as _MIX1
from ...harmony.randomness import MIX2 as _MIX2
from ...harmony.randomness import Purpose
from ...harmony.views import CROP_ATTEMPTS, ViewsConfig
from . import ffcv_import  # noqa: F401 - before FFCV's own parts

from ffcv.fields.rgb_image import IMAGE_MODES  # isort: skip
from ffcv.libffcv import ctypes_imdecode, ctypes_memcopy  # isort: skip

GOLDEN, MIX1, MIX2 = np.uint64(_GOLDEN), np.uint64(_MIX1), np.uint64(_MIX2)
CROP = np.uint64(int(Purpose.CROP))
MOST_REDUCED = 8
"""How many times smaller an image is decoded at most, where its crops allow."""
JPG, RAW = int(IMAGE_MODES["jpg"]), int(IMAGE_MODES["raw"])


class Status(IntEnum):
    """What became of a sample's image."""

    GOOD = 0
    NOT_STORED = 1
    """the file's tables lead nowhere"""
    NOT_DECODED = 2
    """the decoder reported an error, or raw pixels have another size than the record says"""


_GOOD, _NOT_STORED, _NOT_DECODED = (int(status) for status in Status)


def _external(name: str, function: Any, signature: Any) -> Callable[..., int]:
    """A C function that compiled code calls by name: unlike a ctypes pointer, numba can cache such code."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    if address is None:
        raise ImportError(f"FFCV's library has no function for {name}")
    llvm.add_symbol(name, address)
    return cast("Callable[..., int]", types.ExternalFunction(name, signature))


_u32 = types.uint32
_jpeg_decode = _external(
    "harmony_fast_ffcv_imdecode",
    ctypes_imdecode,
    types.int32(types.uintp, types.uint64, _u32, _u32, types.uintp, *[_u32] * 8),
)
_copy = _external("harmony_fast_ffcv_memcpy", ctypes_memcopy, types.void(types.uintp, types.uintp, types.uint64))


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
def _covered(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `size` output pixels: the first source pixel that it covers, how many, and their shares of it."""
    scale = length / size
    first, count = np.empty(size, np.int32), np.empty(size, np.int32)
    share = np.zeros((size, math.ceil(scale) + 1), np.float32)
    for i in range(size):
        start, end = i * scale, min((i + 1) * scale, float(length))
        first[i] = int(start)
        count[i] = min(math.ceil(end), length) - first[i]
        for k in range(count[i]):
            share[i, k] = (min(first[i] + k + 1.0, end) - max(float(first[i] + k), start)) / scale
    return first, count, share


@njit(cache=True)
def _shrink(image: np.ndarray, top: int, left: int, h: int, w: int, out: np.ndarray) -> None:
    """Area interpolation: every source pixel counts as much as it is covered, so nothing aliases.

    Rows are averaged first, a whole row at a time, which the compiler turns into vector instructions.
    """
    first_y, count_y, share_y = _covered(h, out.shape[0])
    first_x, count_x, share_x = _covered(w, out.shape[1])
    pixels = image.reshape(image.shape[0], -1)[top : top + h, 3 * left : 3 * (left + w)]
    row = np.empty(3 * w, np.float32)
    for y in range(out.shape[0]):
        row[:] = 0
        for k in range(count_y[y]):
            share, source = share_y[y, k], pixels[first_y[y] + k]
            for i in range(3 * w):
                row[i] += share * np.float32(source[i])
        for x in range(out.shape[1]):
            red = green = blue = np.float32(0.5)  # to round
            for k in range(count_x[x]):
                share, i = share_x[x, k], 3 * (first_x[x] + k)
                red += share * row[i]
                green += share * row[i + 1]
                blue += share * row[i + 2]
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = np.int32(red), np.int32(green), np.int32(blue)


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
def _widen(source: np.ndarray, before: np.ndarray, after: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    """One row of `_enlarge`: uint8 [3 w] to float32 [3 size]."""
    for x in range(len(right)):
        a, b = 3 * before[x], 3 * after[x]
        for c in range(3):
            value = np.float32(source[a + c])
            out[3 * x + c] = value + right[x] * (np.float32(source[b + c]) - value)


@njit(cache=True)
def _enlarge(image: np.ndarray, top: int, left: int, h: int, w: int, out: np.ndarray) -> None:
    """Bilinear interpolation with half-pixel centres (area interpolation would repeat pixels in blocks).

    Every source row is widened once; output rows are then mixed of two of them.
    """
    above, below, down = _neighbours(h, out.shape[0])
    before, after, right = _neighbours(w, out.shape[1])
    pixels = image.reshape(image.shape[0], -1)[top : top + h, 3 * left : 3 * (left + w)]
    finished = out.reshape(out.shape[0], -1)
    wide = np.empty((2, 3 * out.shape[1]), np.float32)
    held = np.full(2, -1)  # which source rows are in `wide`: row r at place r % 2
    for y in range(out.shape[0]):
        for r in (above[y], below[y]):
            if held[r % 2] != r:
                _widen(pixels[r], before, after, right, wide[r % 2])
                held[r % 2] = r
        upper, lower, share, row = wide[above[y] % 2], wide[below[y] % 2], down[y], finished[y]
        for i in range(len(row)):
            row[i] = np.int32(upper[i] + share * (lower[i] - upper[i]) + np.float32(0.5))


@njit(cache=True)
def cut(image: np.ndarray, box: tuple[int, int, int, int], out: np.ndarray) -> None:
    """Resize `box` (top, left, height, width) of `image` uint8 [h, w, 3] into `out` uint8 [size, size, 3]."""
    top, left, h, w = box
    if h >= out.shape[0] and w >= out.shape[1]:
        _shrink(image, top, left, h, w, out)
    else:
        _enlarge(image, top, left, h, w, out)


@njit(cache=True)
def _load_image(mode: int, address: int, size: int, height: int, width: int, part: int, image: np.ndarray) -> int:
    """Fill `image` (uint8 [ceil(height / part), ceil(width / part), 3]) from the bytes of a sample; a `Status`."""
    if mode == JPG:
        verdict = _jpeg_decode(address, size, height, width, image.ctypes.data, height, width, 0, 0, 1, part, 0, 0)
        return _GOOD if verdict == 0 else _NOT_DECODED
    if mode != RAW or size != image.size:
        return _NOT_DECODED
    _copy(address, image.ctypes.data, size)
    return _GOOD


@njit(cache=True)
def reduction(boxes: np.ndarray, sides: np.ndarray, most: int) -> int:
    """1, 2, 4 or 8, at most `most`: how many times smaller the JPEG decoder may make the image, so that no crop is
    enlarged by it.

    boxes: int64 [crops, 4], top, left, height, width; sides: int64 [crops], of the finished crops, pixels. The decoder
    then leaves out the high frequencies (DCT scaling), which is faster, and they could not be seen anyway. Boxes are
    then cut at whole pixels of the smaller image, so a crop may move by half of one.
    """
    part = most
    for c in range(len(boxes)):
        while part > 1 and (boxes[c, 2] < sides[c] * part or boxes[c, 3] < sides[c] * part):
            part //= 2
    return part


@njit(cache=True)
def _reduced(start: int, length: int, part: int, side: int, whole: int) -> tuple[int, int]:
    """Start and length of a box's side in an image made `part` times smaller, `whole` pixels long: whole pixels."""
    first = (2 * start + part) // (2 * part)
    last = (2 * (start + length) + part) // (2 * part)
    last = min(max(last, first + side), whole)
    return min(first, last - side), max(last - first, side)


@njit(cache=True)
def _boxes(key: np.uint64, height: int, width: int, geometry: np.ndarray, count: int, kind: int) -> np.ndarray:
    """Boxes of the global (kind 0) or local (1) crops: int64 [count, 4]."""
    boxes = np.empty((count, 4), np.int64)
    for c in range(count):
        boxes[c] = crop_box(child(child(key, kind), c), height, width, geometry[kind], geometry[2])
    return boxes


@njit(cache=True)
def _cut_sample(
    stored: tuple[int, int, int, int, int],
    key: np.uint64,
    geometry: np.ndarray,
    most: int,
    global_crops: np.ndarray,
    local_crops: np.ndarray,
) -> int:
    """Decode one sample and cut its crops; a `Status`.

    stored: mode, height, width, memory address, bytes; geometry: rows global scale, local scale, aspect.
    """
    mode, height, width, address, size = stored
    if size == 0 or height == 0 or width == 0:
        return _NOT_STORED
    globals_, locals_ = len(global_crops), len(local_crops)
    boxes, sides = np.empty((globals_ + locals_, 4), np.int64), np.empty(globals_ + locals_, np.int64)
    boxes[:globals_] = _boxes(key, height, width, geometry, globals_, 0)
    boxes[globals_:] = _boxes(key, height, width, geometry, locals_, 1)
    sides[:globals_], sides[globals_:] = global_crops.shape[1], local_crops.shape[1]
    part = reduction(boxes, sides, most) if mode == JPG else 1
    image = np.empty(((height + part - 1) // part, (width + part - 1) // part, 3), np.uint8)
    status = _load_image(mode, address, size, height, width, part, image)
    if status != _GOOD:
        return status
    for c in range(globals_ + locals_):
        top, left, h, w = boxes[c]
        if part > 1:
            top, h = _reduced(top, h, part, sides[c], image.shape[0])
            left, w = _reduced(left, w, part, sides[c], image.shape[1])
        cut(image, (top, left, h, w), global_crops[c] if c < globals_ else local_crops[c - globals_])
    return _GOOD


# The arrays come one by one: numba drops what a parallel loop writes to an array unpacked from a tuple.
@njit(parallel=True, nogil=True, cache=True)
def cut_batch(
    indices: np.ndarray,
    modes: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    addresses: np.ndarray,
    sizes: np.ndarray,
    epoch_key: np.uint64,
    geometry: np.ndarray,
    most: int,
    global_crops: np.ndarray,
    local_crops: np.ndarray,
    status: np.ndarray,
) -> None:
    """Decode B images and cut all their crops, in numba's threads.

    indices: int64 [B], places in the data set; modes: int64 [B]; heights, widths: int64 [B], pixels; addresses: int64
    [B], where each image's bytes begin in memory; sizes: int64 [B], bytes; geometry: see `geometry`; most: see
    `reduction`. Writes global_crops, uint8 [B, G, size, size, 3], local_crops, uint8 [B, N, size, size, 3], and status,
    int32 [B]: crops of a sample that is not GOOD are undefined.
    No array is uint8 [B] or uint64 [B]: FFCV's loader changes those types of numba's in place, and with them the keys
    of what was compiled.

    Sample i's key is k = `sample_keys(seed, epoch, i, Purpose.CROP)`; its global boxes are
    `crop_boxes(split(k, 2)[0], count=G)`, its local boxes `crop_boxes(split(k, 2)[1], count=N)`.
    """
    for slot in prange(len(indices)):
        key = mix(mix(epoch_key + np.uint64(indices[slot])) + CROP)
        stored = int(modes[slot]), heights[slot], widths[slot], addresses[slot], sizes[slot]
        status[slot] = _cut_sample(stored, key, geometry, most, global_crops[slot], local_crops[slot])


def compile_ahead() -> None:
    """Cut an empty batch: where this was never done, numba compiles for 20 s, which later processes are spared."""
    places, crops = np.empty(0, np.int64), np.empty((0, 1, 1, 1, 3), np.uint8)
    key, drawn, status = np.uint64(0), np.ones((3, 2)), np.empty(0, np.int32)
    cut_batch(places, places, places, places, places, places, key, drawn, MOST_REDUCED, crops, crops, status)


def geometry(views: ViewsConfig) -> np.ndarray:
    """The numbers that `cut_batch` draws boxes by: float64 [3, 2], rows global scale, local scale, aspect."""
    return np.array([views.global_scale, views.local_scale, views.aspect], np.float64)
