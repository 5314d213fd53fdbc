"""What this machine's CPU can do."""

import torch

BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Names of instructions that multiply in bfloat16, of x86 and ARM."""


def has_bf16() -> bool:
    """Whether the CPU multiplies in bfloat16; without such instructions it is many times slower
    than float32. False, too, where this torch cannot say."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in BF16)
