"""With the newest supported transformers, training and generation work without warnings."""

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
def test_unit_tests_pass_with_the_newest_transformers(tmp_path, record_values):
    oldest, beyond = TRANSFORMERS
    try:
        install_beside(tmp_path, f"transformers>={oldest},<{beyond}")
    except NoWheelError as problem:
        pytest.skip(str(problem))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": FOR_CHILDREN}
    code = "import transformers; print(transformers.__version__, transformers.__file__)"
    version, location = _output_of([sys.executable, "-c", code], environment).split()
    assert Path(location).is_relative_to(tmp_path)
    tests = [str(ROOT / "tests" / "unit" / name) for name in MODULES]
    log = _output_of([sys.executable, "-m", "pytest", "-q", "-m", "not long", *tests], environment)
    record_values(transformers=version, summary=log.splitlines()[-1])


def _output_of(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout.strip()
