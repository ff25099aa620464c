"""bf16 where the hardware multiplies it."""

import torch

from embedding.errors import UserError


def check_precision(precision: str, device: torch.device, setting: str) -> None:
    """Refuse bf16 where it would be emulated.

    Args:
        precision: `fp32` or `bf16`.
        device: where the products run.
        setting: the recipe's name of it, for the message.

    Raises:
        UserError: the CPU has no bf16 matrix instructions.
    """
    if precision != "bf16" or device.type != "cpu" or cpu_has_bf16():
        return
    raise UserError(
        f"{setting}=bf16: this CPU has neither avx512_bf16 nor amx instructions, and emulated bf16 "
        f"products are hundreds of times slower; set {setting} to fp32"
    )


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
