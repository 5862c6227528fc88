"""Which backend computes each kernel of a run: the configuration's `kernels:`, told to the dispatcher and checked."""

from __future__ import annotations

import torch

from ..kernels import dispatch
from .config import RunConfig
from .errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def settle_precision(config: RunConfig, bf16: bool) -> RunConfig:
    """`precision: auto` as what it comes to. bf16: whether the device is a GPU that has it."""
    return config.model_copy(update={"precision": "bf16" if bf16 else "fp32"}) if config.precision == "auto" else config


def has_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU that multiplies in bf16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def use_backends(config: RunConfig, device: torch.device) -> dict[str, dispatch.Choice]:
    """Prefer the configuration's backends and precision of products from now on; the choices for this device, by
    operation.

    Raises UserError if a backend that the configuration or HARMONY_FAST_KERNELS asks for cannot run here.
    """
    if device.type == "cuda":
        # In half precision only the contrast multiplies in fp32, for its logits' sake.
        coarse = config.tf32 and config.precision == "fp32"
        torch.set_float32_matmul_precision("high" if coarse else "highest")
    try:
        dispatch.prefer(config.kernels.model_dump())
        return choices(device, DTYPES[config.precision])
    except ValueError as error:
        raise UserError(f"{error}; say auto, or another backend") from None


def choices(device: torch.device, dtype: torch.dtype) -> dict[str, dispatch.Choice]:
    """What the dispatcher chooses for tensors of a dtype on a device (the EMA's are fp32 always), by operation.

    Raises ValueError if a backend that was asked for cannot do it.
    """
    found = {}
    for operation in dispatch.OPERATIONS:
        example = torch.empty(0, dtype=torch.float32 if operation == "ema" else dtype, device=device)
        found[operation] = dispatch.choose(operation, example)
    return found
