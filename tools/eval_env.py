"""Make `.venv-eval`: lm-eval and IFEval's rules, whose needs would change the engine's environment.

    python3 tools/eval_env.py

Needs `.venv` (tools/setup.py), whose uv it uses. A second run does nothing while this file and the
Python are unchanged.
"""

from pathlib import Path

from separate_env import make
from setup import ROOT

REQUIREMENTS = ["lm-eval[api]==0.4.13", "if-verifiable==0.1.2"]

if __name__ == "__main__":
    make(ROOT / ".venv-eval", REQUIREMENTS, [Path(__file__)])
