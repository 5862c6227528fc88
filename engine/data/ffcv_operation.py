"""The decode-once operation for whoever uses FFCV's own loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numba import carray, types
from numba.core.base import BaseContext
from numba.extending import intrinsic

from ...harmony.views import ViewsConfig
from . import ffcv_import  # noqa: F401 - before FFCV's own parts
from .crops import MOST_REDUCED, cut_batch, epoch_key, geometry

from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # isort: skip
from ffcv.pipeline.allocation_query import AllocationQuery  # isort: skip
from ffcv.pipeline.state import State  # isort: skip


@intrinsic
def _pointer(_: Any, address: types.Integer) -> Any:
    """An address as a pointer to uint64."""

    def generate(context: BaseContext, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint64)(types.uintp), generate


class MultiCrop(SimpleRGBImageDecoder):
    """Decoder of an FFCV image field that decodes each image once and gives all its crops, for images of any size.

    `ffcv.loader.Loader(path, ..., pipelines={"image": [MultiCrop(views, seed)], ...})` yields for the field a tuple:
    uint8 [B, G, size, size, 3] global crops, uint8 [B, N, size, size, 3] local crops, int32 [B] `crops.Status` of each
    sample. The crops are those of `crops.cut_batch`; call `set_epoch` before each epoch.
    """

    def __init__(self, views: ViewsConfig, seed: int) -> None:
        super().__init__()
        self.views, self.seed = views, seed
        self._key = np.zeros(1, np.uint64)  # read by address in compiled code, which freezes values
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The crops to come are those of this epoch."""
        self._key[0] = epoch_key(self.seed, epoch)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        """The buffers FFCV allocates, per sample."""
        v = self.views
        crops = (v.global_crops, v.global_size, v.global_size, 3), (v.local_crops, v.local_size, v.local_size, 3)
        buffers = [AllocationQuery(shape, np.dtype("u1")) for shape in crops]
        buffers.append(AllocationQuery((), np.dtype("i4")))
        return replace(previous_state, jit_mode=True, shape=crops[0], dtype=np.dtype("u1")), tuple(buffers)

    def generate_code(self) -> Callable[..., Any]:
        """A thin function for FFCV to compile; the work is in the cached `cut_batch`."""
        shape, address, read = geometry(self.views), self._key.ctypes.data, self.memory_read

        def decode(indices, memory, records, storage):  # type: ignore[no-untyped-def]
            count = len(indices)
            places, modes = np.empty(count, np.int64), np.empty(count, np.int64)
            heights, widths = np.empty(count, np.int64), np.empty(count, np.int64)
            addresses, sizes = np.empty(count, np.int64), np.empty(count, np.int64)
            for slot in range(count):
                record = records[indices[slot]]
                stored = read(record["data_ptr"], storage)
                places[slot], modes[slot] = indices[slot], record["mode"]
                heights[slot], widths[slot] = record["height"], record["width"]
                addresses[slot], sizes[slot] = stored.ctypes.data, stored.size
            key = carray(_pointer(address), 1)[0]  # type: ignore[call-arg]  # numba gives the context
            global_crops, local_crops, status = memory
            cut_batch(
                places, modes, heights, widths, addresses, sizes, key, shape, MOST_REDUCED, global_crops, local_crops,
                status,
            )  # fmt: skip
            return memory

        return decode
