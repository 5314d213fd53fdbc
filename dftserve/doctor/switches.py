"""Checks the environment variables that switch the plug-in or parts of it on or off."""

import json
from collections.abc import Iterator, Mapping

from dftserve.doctor.entry_points import ENTRY_POINT
from dftserve.doctor.findings import Finding, error, ok, warning
from dftserve.spec import DEFAULT_VARIABLE, DiversityError, parse_default


def findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """The environment variables that disable or limit the plug-in."""
    if environment.get("DFTSERVE_DISABLE", "") not in ("", "0"):
        text = "set: dftserve is inert and the field is ignored; unset it."
        yield warning("DFTSERVE_DISABLE", text)
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is not None and ENTRY_POINT not in plugins.split(","):
        text = f"{plugins!r} leaves {ENTRY_POINT} out: only vllm_xargs.diversity works; add it."
        yield warning("VLLM_PLUGINS", text)
    if environment.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        text = "set: that frontend does not know the diversity field; unset it."
        yield warning("VLLM_USE_RUST_FRONTEND", text)
    if default := environment.get(DEFAULT_VARIABLE):
        yield _default(default)


def _default(text: str) -> Finding:
    try:
        return ok(DEFAULT_VARIABLE, json.dumps(parse_default(text).as_dict()))
    except DiversityError as refusal:
        return error(DEFAULT_VARIABLE, str(refusal))
