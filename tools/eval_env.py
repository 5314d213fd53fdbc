"""Make `.venv-eval`: lm-eval apart from the engine's environment, whose versions it would change.

    python3 tools/eval_env.py

Needs `.venv` (tools/setup.py), whose uv it uses. A second run does nothing while this file and the
Python are unchanged.
"""

from pathlib import Path

from separate_env import make
from setup import ROOT

REQUIREMENTS = ["lm-eval[api]==0.4.13"]

if __name__ == "__main__":
    make(ROOT / ".venv-eval", REQUIREMENTS, [Path(__file__)])
