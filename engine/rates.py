"""How fast a machine computes and moves bytes: what a plan's seconds are made of."""

from __future__ import annotations

from dataclasses import dataclass

from .sizes import GIB


@dataclass(frozen=True)
class Rates:
    """Per second, of one rank."""

    name: str
    flops: float
    """Of matrix products in half precision, as the towers reach it"""
    single: float
    """The same in fp32, with TensorFloat-32 where the configuration allows it"""
    memory: float
    """Bytes to or from the device's memory"""
    link: float
    """Bytes to other ranks"""
    host_link: float = 12e9
    """Bytes between device and host"""
    host_memory: float = 20e9
    """Bytes to or from the host's memory, in the optimizer's step"""
    launch: float = 6e-6
    """Seconds that the host needs to start an operator"""


SHARE_REACHED = 0.55
"""Of the products in data sheets, what training is taken to reach. This, the links, and the host's rates and launch
times are assumptions, not measurements"""

SHEETS = [
    Rates("a card like the RTX 3090", 71e12, 35.6e12, 936e9, 8e9),
    Rates("a card like the RTX A6000", 155e12, 77.4e12, 768e9, 8e9),
    Rates("a card like the A100", 312e12, 156e12, 2039e9, 200e9),
    Rates("a card like the H200", 989e12, 494e12, 4800e9, 350e9),
]
"""Dense bf16 and TF32 products with fp32 sums, and memory bandwidth, as the makers' data sheets have them, by size of
memory"""


def rates_for(memory: float) -> Rates:
    """Rates to expect of a card with so many bytes: only their ratios matter for which plan is best."""
    sheet = SHEETS[sum(memory > GIB * size for size in (24, 48, 80))]
    return Rates(
        f"{sheet.name}, by its data sheet", SHARE_REACHED * sheet.flops, SHARE_REACHED * sheet.single,
        0.8 * sheet.memory, sheet.link,
    )  # fmt: skip
