"""One file per training signal. Importing this package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from .base import REGISTRY, Collectives, Embeddings, Features, Objective, ObjectiveConfig, Outcome, Surroundings

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "REGISTRY",
    "Collectives",
    "Embeddings",
    "Features",
    "Objective",
    "ObjectiveConfig",
    "Outcome",
    "Surroundings",
]
