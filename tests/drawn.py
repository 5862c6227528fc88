"""Views of crops and captions that a test has made."""

from harmony_fast.harmony.views import Views, ViewsConfig, assemble, draw_masks
from torch import Tensor


def draw_views(
    config: ViewsConfig, patch_size: int, global_crops: Tensor, local_crops: Tensor, tokens: Tensor, index: Tensor,
    seed: int, epoch: int,
) -> Views:  # fmt: skip
    """Masks drawn and put together with the crops, at the first step's ratio."""
    masks = draw_masks(config, patch_size, tokens, index, seed, epoch, config.pixel_mask_ratio)
    return assemble(global_crops, local_crops, masks)
