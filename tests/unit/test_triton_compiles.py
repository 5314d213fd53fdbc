"""That Triton's kernels compile for GPUs, to machine code, by the compiler that Triton brings."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dftserve.sampling import fused_triton, slots_triton

KERNELS = {
    "_maxima": (fused_triton, {"rows": "*i64"}),
    "_decide": (
        fused_triton,
        {"rows": "*i64", "stop_ids": "*i64", "active": "*i32", "stop_at": "*i32"},
    ),
    "_write": (fused_triton, {"rows": "*i64", "stop_at": "*i32"}),
    "_settle": (
        slots_triton,
        dict.fromkeys(("slot", "position", "offset", "steered", "tokens", "base"), "*i64")
        | {"rows": "i32"},
    ),
    "_remember": (
        slots_triton,
        dict.fromkeys(("slot", "position", "offset", "base", "unsound"), "*i64")
        | {"samples": "*i1", "sound": "*i1"},
    ),
}
"""Their module, and the type of each argument that is not a pointer to float32."""
SPECIALIZED = ("stride", "vocabulary")
"""Sizes that have kernels of their own where they are multiples of 16."""
SIZES = dict.fromkeys((*SPECIALIZED, "chunks", "width", "count", "rows_per_request"), "i32")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("aligned", [True, False], ids=["V=16n", "any V"])
@pytest.mark.parametrize("name", list(KERNELS))
def test_the_kernels_compile_for_gpus(name, capability, aligned, tmp_path, monkeypatch):
    """Rows that are aligned move 16 bytes at a time."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    module, types = KERNELS[name]
    kernel = getattr(module, name)
    constants = {each: getattr(module, each) for each in kernel.arg_names if each.isupper()}
    signature = {each: types.get(each, SIZES.get(each, "*fp32")) for each in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, (each, kind) in enumerate(signature.items())
        if kind.startswith("*") or (aligned and each in SPECIALIZED)
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=divisible),
        target=GPUTarget("cuda", capability, 32),
        options=dict(fused_triton._EXACT),
    )
    assert compiled.asm["cubin"]
    if aligned and name in ("_maxima", "_write"):
        assert "ld.global.v4" in compiled.asm["ptx"]
