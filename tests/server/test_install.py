"""The documented ways to install, in empty environments.

`pip install . ./plugins/vllm` and `uv pip install` of the same copy the code, `make setup` links to
the checkout, and plugins/vllm/Dockerfile builds wheels from a checkout.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.environment import ROOT, uv

pytestmark = pytest.mark.long

DOCKERFILE = ROOT / "plugins" / "vllm" / "Dockerfile"
BOTH = (".", "./plugins/vllm")
DESCRIBE = """
import importlib.util, json
from importlib.metadata import distribution, entry_points
names = ("dftserve", "dftserve-vllm")
links = {name: json.loads(distribution(name).read_text("direct_url.json")) for name in names}
groups = ("vllm.logits_processors", "vllm.general_plugins")
print(json.dumps({
    "editable": {name: link["dir_info"].get("editable", False) for name, link in links.items()},
    "ours": sorted(f"{e.group} {e.value}" for g in groups for e in entry_points(group=g)
                   if e.name == "dftserve" and importlib.util.find_spec(e.module)),
}))
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the files of this checkout that git tracks or does not ignore."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, names)):
        if (ROOT / name).is_file():
            copy = tmp_path / "checkout" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy)
    return tmp_path / "checkout"


@pytest.fixture
def environment(tmp_path) -> Path:
    venv.create(tmp_path / "environment", with_pip=True)
    return tmp_path / "environment"


def run(*command: str | Path, cwd: Path | None = None, expected: int = 0) -> str:
    """The stdout of a command, which runs without the PYTHON variables of the test run."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == expected, f"{command}:\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def described(environment: Path) -> dict:
    """Which distributions are editable, and our entry points whose modules can be found."""
    return json.loads(run(environment / "bin" / "python", "-c", DESCRIBE))


def pip_install(environment: Path, checkout: Path, *args: str) -> None:
    run(environment / "bin" / "python", "-m", "pip", "install", *args, cwd=checkout)


def uv_install(environment: Path, checkout: Path, *args: str) -> None:
    wheels = os.environ.get("PIP_FIND_LINKS")
    source = ["--find-links", wheels] if wheels else ["--torch-backend", "cpu"]
    uv("pip", "install", "--python", environment / "bin" / "python", *args, *source, cwd=checkout)


@pytest.mark.parametrize("install", [pip_install, uv_install])
def test_a_plain_install_works_without_the_checkout(install, environment, checkout):
    install(environment, checkout, *BOTH, "--constraint", "constraints/cpu.txt")
    shutil.rmtree(checkout)
    assert described(environment) == {
        "editable": {"dftserve": False, "dftserve-vllm": False},
        "ours": [
            "vllm.general_plugins dftserve_vllm:register",
            "vllm.logits_processors dftserve_vllm.processor:DiversityProcessor",
        ],
    }
    command = environment / "bin" / "dftserve"
    assert re.fullmatch(r"dftserve, version \d+\.\d+\.\d+\n", run(command, "--version"))
    # Only the engine is missing, and doctor reports no other error.
    findings = json.loads(run(command, "doctor", "--json", expected=1))["findings"]
    assert [found["name"] for found in findings if found["state"] == "error"] == ["vllm"]


def test_an_editable_install_stays_editable(environment, checkout):
    """The arguments of `make setup`. Dependencies are resolved but not installed."""
    editable = ("-e", ".", "-e", "plugins/vllm")
    constraint = ("--constraint", "constraints/cpu.txt")
    uv_install(environment, checkout, "--dry-run", *editable, *constraint)
    uv_install(environment, checkout, "--no-deps", *editable)
    assert set(_links(environment).values()) == {True}


def _links(environment: Path) -> dict[str, bool]:
    found = environment.glob("lib/python*/site-packages/dftserve*.dist-info/direct_url.json")
    links = {path.parent.name: json.loads(path.read_text())["dir_info"] for path in found}
    assert len(links) == 2, links
    return {name: link.get("editable", False) for name, link in links.items()}


def test_the_dockerfile_builds_and_installs_the_wheels_of_a_checkout(environment, checkout):
    """Runs the COPY and RUN lines of both stages without Docker."""
    building, serving = _stages()
    context = checkout.with_name("context")
    for words in building["COPY"]:
        _copy(words.split(), checkout, context)
    for line in building["RUN"]:
        run("sh", "-ec", f'PATH="{environment / "bin"}:$PATH"; {line}', cwd=context)
    wheels = context / "wheels"
    names = sorted(wheel.name.partition("-")[0] for wheel in wheels.iterdir())
    assert names == ["dftserve", "dftserve_vllm"]

    assert serving["COPY"] == ["--from=wheels /checkout/wheels /tmp/wheels"]
    for line in serving["RUN"]:
        line = line.replace("--system", f"--python {environment}").replace(
            "/tmp/wheels", f"{wheels}"
        )
        uv_here = Path(sys.executable).parent
        run("sh", "-ec", f'PATH="{uv_here}:$PATH"; {line}')
    installed = run(environment / "bin" / "python", "-m", "pip", "list", "--format", "json")
    ours = {entry["name"].replace("_", "-") for entry in json.loads(installed)}
    assert {"dftserve", "dftserve-vllm"} <= ours


def _stages() -> list[dict[str, list[str]]]:
    """The arguments of the COPY and RUN lines of each stage."""
    text = DOCKERFILE.read_text()
    stages = [stage.splitlines() for stage in re.split(r"^FROM .*\n", text, flags=re.MULTILINE)[1:]]
    return [
        {
            kind: [line.removeprefix(f"{kind} ") for line in lines if line.startswith(f"{kind} ")]
            for kind in ("COPY", "RUN")
        }
        for lines in stages
    ]


def _copy(words: list[str], checkout: Path, context: Path) -> None:
    """Run a COPY line; its sources must be allowed by the .dockerignore file."""
    *sources, target = words
    ignore = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    for source in sources:
        assert f"!{source}" in ignore, f"{source} is not in the build context"
        if (checkout / source).is_dir():
            shutil.copytree(checkout / source, context / target)
        else:
            (context / target).mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / source, context / target)
