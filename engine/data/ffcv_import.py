"""FFCV, imported without its side effects. Import FFCV's parts from here first, nowhere else before."""

from __future__ import annotations

import numba.typed
import torch

_threads = torch.get_num_threads()
_typed_dict = numba.typed.Dict
# At import FFCV fills a numba-typed dictionary of two image modes, which makes numba compile for several seconds in
# every process; it is only ever read from Python, where a plain one does.
numba.typed.Dict = dict
try:
    import ffcv.fields.rgb_image
    import ffcv.loader  # noqa: F401
finally:
    numba.typed.Dict = _typed_dict
    torch.set_num_threads(_threads)  # importing FFCV sets torch to a single thread
