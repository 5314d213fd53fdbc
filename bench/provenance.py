"""The machine and the package versions of a result; every bench writes both to its JSON."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine() -> dict[str, object]:
    """The processor and the device of this machine, and how many threads torch uses."""
    import torch  # Imported late: a bench may have to set its number of threads first.

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, dftserve, torch and the given packages."""
    names = ("dftserve", "torch", *packages)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
