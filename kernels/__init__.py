"""HOW the hot spots are computed: one file per operation. Imports nothing else of this project."""

from .ema import ema_update_
from .masked_attention import masked_attention

__all__ = ["ema_update_", "masked_attention"]
