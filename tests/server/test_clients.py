"""What arrives through the clients that people use, in `.venv-clients` (make clients-env).

What is found must be what bench/results/clients.json says, which is the table of docs/clients.md.
After a change that is meant:

    DFTSERVE_RECORD=1 python -m pytest -m long tests/server/test_clients.py
    python bench/report.py
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client_rows import Outcome, as_recorded, row
from tests.conftest import KEY, ROOT, Engine
from tests.recorder import Exchange, Recorder, recording

pytestmark = pytest.mark.long

ENVIRONMENT = ROOT / ".venv-clients"
DOCUMENT = ROOT / "docs" / "clients.md"
SCRIPTS = {
    "openai": ("openai_sdk", "openai"),
    "LiteLLM": ("litellm_sdk", "litellm"),
    "LiteLLM proxy": ("litellm_proxy", "litellm"),
    "langchain-openai": ("langchain_sdk", "langchain-openai"),
    "llm": ("llm_cli", "llm"),
}
"""The script in tests/clients and the distribution of each client."""


@pytest.fixture(scope="module")
def recorder(v1: Engine) -> Iterator[Recorder]:
    with recording(v1.url) as made:
        yield made


@pytest.mark.parametrize("client", SCRIPTS)
def test_what_arrives(client, recorder, tmp_path):
    script, distribution = SCRIPTS[client]
    cases = _asked(script, recorder, tmp_path)
    rows = [row(client, cases[at : at + 3]) for at in range(0, len(cases), 3)]
    asked = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    versions = {distribution: _run(ENVIRONMENT / "bin" / "python", "-c", asked).strip()}
    assert as_recorded(client, rows, versions) == rows


def _asked(script: str, recorder: Recorder, place: Path) -> list[tuple[Outcome, list[Exchange]]]:
    """What the script reports of each case, and what passed to the engine for it."""
    results = place / "results.jsonl"
    recorder.exchanges.clear()
    path = ROOT / "tests" / "clients" / f"{script}.py"
    _run(ENVIRONMENT / "bin" / "python", path, recorder.url, results)
    reported = map(json.loads, results.read_text().splitlines())
    return [(said, recorder.exchanges.get(said["case"], [])) for said in reported]


def _run(*words: str | Path, **variables: str) -> str:
    """The stdout of a command that succeeds: see `_done`."""
    done = _done(*words, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _done(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command with the clients' environment first and nothing of this project."""
    if not ENVIRONMENT.exists():
        pytest.skip(f"no {ENVIRONMENT.name}: make clients-env")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    path = f"{ENVIRONMENT / 'bin'}{os.pathsep}{kept['PATH']}"
    environment = kept | {"PATH": path, "NO_PROXY": "*", **variables}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


def _lines_to_write() -> list[tuple[str, str]]:
    """(command, lines) of each `<!-- run: COMMAND -->` of the document."""
    found = re.findall(r"<!-- run: (\w+) -->\n\n((?:    .*\n|\n(?=    ))+)", DOCUMENT.read_text())
    return [(command, re.sub(r"^    ", "", lines, flags=re.MULTILINE)) for command, lines in found]


@pytest.mark.parametrize(("command", "lines"), _lines_to_write())
def test_the_lines_of_the_document_print_what_is_in_force(command, lines, v1, tmp_path):
    script = tmp_path / "lines"
    for shown, here in {
        "http://localhost:8000": v1.url,
        "MODEL": "demo",
        '"KEY"': f'"{KEY}"',
    }.items():
        lines = lines.replace(shown, here)
    script.write_text(lines)
    said = _run(command, script, LLM_USER_PATH=str(tmp_path))
    assert re.search(r"""['"]level['"]: ?0\.5\b""", said), said


@pytest.mark.parametrize(
    "written", ["- {", "5", "model_id: story", "- story", "- {model_id: story, api_bas: there}"]
)
def test_llm_dftserve_says_what_is_wrong_with_its_models(written, tmp_path):
    models = tmp_path / "dftserve-models.yaml"
    models.write_text(written)
    done = _done("llm", "models", LLM_USER_PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {models}: ")
    assert "accepted: a list of models, each with model_id and api_base" in done.stderr


def test_llm_dftserve_sends_no_key_that_is_not_for_its_server(recorder, tmp_path):
    entry = {"model_id": "story", "api_base": f"{recorder.url}/key/v1", "api_key_name": "here"}
    (tmp_path / "dftserve-models.yaml").write_text(json.dumps([entry]))
    variables = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "for another server"}
    done = _done("llm", "-m", "story", "Tell me a story.", **variables)
    assert done.returncode == 1
    assert "llm keys set here" in done.stderr
    assert "key" not in recorder.exchanges
