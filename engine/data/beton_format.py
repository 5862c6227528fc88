"""FFCV's `.beton` format (version 2): its record types.

    header | 3 field descriptors | metadata[N] | data region | checksums[N] | allocation table[3N]

The fields of a sample are `image` (JPEG bytes), `tokens` (int32 [context]) and `key` (UTF-8 sample id); where samples
have several captions there is a fourth, `captions`, the token rows of all of them (int32 [k, context], k >= 1, of which
`tokens` repeats the first). The CRC-32 of each sample's data is ours: FFCV does not see it, and its place is noted
where FFCV stores nothing, in the arguments of the image field. The types are written out here so that a file can be
made or checked without importing FFCV, which takes seconds; a test holds them against `ffcv.types`.
"""

from __future__ import annotations

import json

import numpy as np

VERSION = 2
PAGE = 8 << 20
"""Smallest page, bytes. A page is what FFCV reads at once when a file does not fit in memory; no sample crosses one."""

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
KEY = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_COMMON: list[tuple[str, np.dtype | str]] = [("image", IMAGE), ("tokens", "<u8"), ("key", KEY)]
METADATA = np.dtype(_COMMON, align=True)
METADATA_SEVERAL = np.dtype([*_COMMON, ("captions", KEY)], align=True)
"""With several captions a sample."""

FIELDS = {"image": 2, "tokens": 4, "key": 3}  # name -> FFCV's type id: RGBImageField, NDArrayField, BytesField
FIELDS_SEVERAL = {**FIELDS, "captions": 3}
MODE_JPEG = 0


def data_start(fields: int) -> int:
    """Where the metadata begin, bytes."""
    return HEADER.itemsize + fields * FIELD.itemsize


DATA_START = data_start(len(FIELDS))
"""No sample's data lie before this byte."""


def descriptors(context: int, several: bool = False, checksums: int = 0) -> np.ndarray:
    """The field descriptors of a file whose captions are `context` tokens long: FIELD [3], or [4] with several.

    checksums: byte at which they begin; 0 where the file has none.
    """
    names = FIELDS_SEVERAL if several else FIELDS
    fields = np.zeros(len(names), FIELD)
    for field, (name, type_id) in zip(fields, names.items(), strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    fields[0]["arguments"][:8] = np.frombuffer(np.uint64(checksums).tobytes(), np.uint8)
    dtype = json.dumps([["", "<i4"]]).encode()
    shape_and_length = np.zeros(33, "<u8")  # FFCV: 32 dimensions (0 = unused), then the length of the type's JSON
    shape_and_length[[0, 32]] = context, len(dtype)
    arguments = shape_and_length.tobytes() + dtype
    fields[1]["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
    return fields
