"""A fake GPU for Triton that compiles and counts kernels: they are compiled to machine code,
checked by Triton and launched as in production, but not executed.

Tensors stay on the CPU: to this driver an address is only a number.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dftserve.sampling.backends import triton, triton_slots, triton_style

KERNELS = {
    name: kernel
    for module in (triton, triton_slots, triton_style)
    for name, kernel in vars(module).items()
    if isinstance(kernel, JITFunction)
}
"""Every function that Triton compiles, including those only called by others."""


class FakeGPU:
    """A driver with what Triton needs."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.loaded: Counter[str] = Counter()
        """How often machine code was loaded, by kernel: once per compilation."""
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        """Kernel and grid of each launch."""
        self.current = 0
        """The current device of the process."""
        self.devices: list[int] = []
        """The device that was current at each launch."""
        self.arguments: list[list[Any]] = []
        """The kernel's arguments for each launch."""
        self.signatures: dict[str, dict[str, str]] = {}
        """The type of each argument, by kernel."""
        self.utils = SimpleNamespace(load_binary=self._load, unload_module=lambda module: None)

    def launched(self) -> Counter[str]:
        return Counter(name for name, _ in self.launches)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self.current

    @contextmanager
    def tensors_on(self, device: int) -> Iterator[None]:
        """Every tensor says that it lies on this device, whichever is current."""

        def exchange(index: int) -> int:
            former = self.current
            self.current = max(index, 0)
            return former

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            patch.setattr(torch.Tensor, "get_device", lambda tensor: device)
            for name in ("_exchange_device", "_maybe_exchange_device"):
                patch.setattr(torch.cuda, name, exchange)
            yield

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        self.signatures[metadata.name] = source.signature

        def launch(x, y, z, *rest):
            self.launches.append((metadata.name, (x, y, z)))
            self.devices.append(self.current)
            self.arguments.append([each for each in rest if isinstance(each, torch.Tensor | int)])

        return launch

    def _load(self, name, machine_code, shared, device):
        assert machine_code
        self.loaded[name] += 1
        module, function, registers, spills, threads = object(), 1, 32, 0, 1024
        return module, function, registers, spills, threads


@contextmanager
def fake_gpu(
    capability: int, cache: Path, kernels: Mapping[str, JITFunction] = KERNELS
) -> Iterator[FakeGPU]:
    """Replace Triton's driver temporarily; `cache` is the folder of compiled kernels for reuse."""
    gpu = FakeGPU(capability)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.cache, "dir", str(cache))
        patch.setattr(driver, "_active", gpu)
        patch.setattr("triton.compiler.compiler.max_shared_mem", lambda device: 232_448)
        for kernel in kernels.values():
            patch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        try:
            yield gpu
        finally:
            for compiled in compiled_kernels(kernels):
                compiled.module = None  # Otherwise it is unloaded later, without this driver.


def compiled_kernels(kernels: Mapping[str, JITFunction] = KERNELS) -> list[CompiledKernel]:
    """All compiled variants of the kernels, on all devices."""
    devices = [each for kernel in kernels.values() for each in kernel.device_caches.values()]
    caches = [cache for cache, *_ in devices]
    return [compiled for cache in caches for compiled in cache.values()]
