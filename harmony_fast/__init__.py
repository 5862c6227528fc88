"""harmony-fast: a low-resource, fast training engine for Harmony."""

__version__ = "0.1.0"
