"""HOW the hot spots are computed: one file per operation. Imports nothing else of this project."""

# From inside a checkout, libraries that look for another package of this name (transformers) find this folder: they
# must not define the operators a second time, which takes the memory of the first ones away.
if __name__ == "harmony_fast.kernels":
    from .contrastive import contrastive_loss, contrastive_terms
    from .ema import ema_update_
    from .interpreter import install, interpreting
    from .masked_attention import masked_attention
    from .prototype_ce import prototype_cross_entropy, prototype_sums

    if interpreting():
        install()

__all__ = [
    "contrastive_loss",
    "contrastive_terms",
    "ema_update_",
    "masked_attention",
    "prototype_cross_entropy",
    "prototype_sums",
]
