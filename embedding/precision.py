"""bf16 where the hardware multiplies it, and fp32 without TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products of matrices on GPUs in fp32; some container images ask for TF32."""
    matmul = torch.backends.cuda.matmul
    asks_for_tf32 = matmul.fp32_precision == "tf32"
    # The older of torch's two switches sets the newer one, too; it refuses a mixture of both.
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        if asks_for_tf32:
            matmul.allow_tf32 = True
