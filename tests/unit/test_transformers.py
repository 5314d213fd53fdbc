"""The newest transformers of the range: what trains and generates does so, and warns of nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dftserve.vllm_contract import TRANSFORMERS
from tests.environment import NoWheelError, install_beside
from tests.future import FOR_CHILDREN

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("test_train.py", "test_hf.py", "test_divergences.py", "test_first_law.py")


@pytest.mark.long
def test_the_newest_transformers(tmp_path, figure):
    oldest, beyond = TRANSFORMERS
    try:
        install_beside(tmp_path, f"transformers>={oldest},<{beyond}")
    except NoWheelError as problem:
        pytest.skip(str(problem))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": FOR_CHILDREN}
    code = "import transformers; print(transformers.__version__, transformers.__file__)"
    version, place = _said([sys.executable, "-c", code], environment).split()
    assert Path(place).is_relative_to(tmp_path)
    tests = [str(ROOT / "tests" / "unit" / name) for name in MODULES]
    said = _said([sys.executable, "-m", "pytest", "-q", "-m", "not long", *tests], environment)
    figure(transformers=version, summary=said.splitlines()[-1])


def _said(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout.strip()
