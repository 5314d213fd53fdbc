"""A GPU for Triton that compiles and counts: kernels take the way to a launch that they take in
production, to machine code and through Triton's own checks, and are not executed.

Tensors stay on the CPU: to this driver an address is a number.
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
"""Every function that Triton compiles, also those that only others call."""


class FakeGPU:
    """What Triton asks of a driver."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.loaded: Counter[str] = Counter()
        """Machine code that was loaded: once for each time that a kernel was compiled."""
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        """Kernel and grid."""
        self.current = 0
        """The device that the process is on."""
        self.devices: list[int] = []
        """Of each launch, the device that was current."""
        self.arguments: list[list[Any]] = []
        """Of each launch, what the kernel was given."""
        self.signatures: dict[str, dict[str, str]] = {}
        """Type of each argument, by kernel."""
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
    """Triton's driver for a while; `cache` keeps what was compiled, for the next one."""
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
                compiled.module = None  # Else it is unloaded when there is no such driver any more.


def compiled_kernels(kernels: Mapping[str, JITFunction] = KERNELS) -> list[CompiledKernel]:
    """Of all kernels, whatever they were compiled for."""
    devices = [each for kernel in kernels.values() for each in kernel.device_caches.values()]
    caches = [cache for cache, *_ in devices]
    return [compiled for cache in caches for compiled in cache.values()]
