"""Make `.venv-clients`: the clients of docs/clients.md apart from the engine's environment.

    python3 tools/clients_env.py

Needs `.venv` (tools/setup.py), whose uv it uses. A second run does nothing while this file, the
pinned versions and the Python are unchanged.
"""

from pathlib import Path

from separate_env import make
from setup import ROOT

PINNED = "constraints/clients.txt"
CLIENTS = ["openai", "litellm[proxy]", "langchain-openai", "llm", "vllm-router"]
REQUIREMENTS = [*CLIENTS, "-e", "plugins/llm"]

if __name__ == "__main__":
    inputs = [Path(__file__), ROOT / PINNED, ROOT / "plugins/llm/pyproject.toml"]
    make(ROOT / ".venv-clients", [*REQUIREMENTS, "--constraint", PINNED], inputs)
