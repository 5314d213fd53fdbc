"""Requests through common clients, which run in `.venv-clients` (make clients-env).

The results must equal those of bench/results/clients.json, the table of docs/clients.md. After an
intended change:

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
    with recording(v1.url) as proxy:
        yield proxy


@pytest.mark.parametrize("client", SCRIPTS)
def test_the_fields_path_through_each_client_is_as_recorded(client, recorder, tmp_path):
    script, distribution = SCRIPTS[client]
    cases = _results(script, recorder, tmp_path)
    rows = [row(client, cases[at : at + 3]) for at in range(0, len(cases), 3)]
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    versions = {distribution: _run(ENVIRONMENT / "bin" / "python", "-c", code).strip()}
    assert as_recorded(client, rows, versions) == rows


def _results(script: str, recorder: Recorder, folder: Path) -> list[tuple[Outcome, list[Exchange]]]:
    """The outcome of each case by the script, and its exchanges with the engine."""
    results = folder / "results.jsonl"
    recorder.exchanges.clear()
    path = ROOT / "tests" / "clients" / f"{script}.py"
    _run(ENVIRONMENT / "bin" / "python", path, recorder.url, results)
    reported = map(json.loads, results.read_text().splitlines())
    return [(outcome, recorder.exchanges.get(outcome["case"], [])) for outcome in reported]


def _run(*arguments: str | Path, **variables: str) -> str:
    """The stdout of a command that must succeed: see `_done`."""
    done = _done(*arguments, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _done(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the clients' environment, without this project on its path."""
    if not ENVIRONMENT.exists():
        pytest.skip(f"no {ENVIRONMENT.name}: make clients-env")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    path = f"{ENVIRONMENT / 'bin'}{os.pathsep}{inherited['PATH']}"
    environment = inherited | {"PATH": path, "NO_PROXY": "*", **variables}
    return subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)


def _examples() -> list[tuple[str, str]]:
    """(command, lines) of each `<!-- run: COMMAND -->` of the document."""
    found = re.findall(r"<!-- run: (\w+) -->\n\n((?:    .*\n|\n(?=    ))+)", DOCUMENT.read_text())
    return [(command, re.sub(r"^    ", "", lines, flags=re.MULTILINE)) for command, lines in found]


@pytest.mark.parametrize(("command", "lines"), _examples())
def test_the_examples_of_the_document_print_the_level(command, lines, v1, tmp_path):
    script = tmp_path / "lines"
    for shown, here in {
        "http://localhost:8000": v1.url,
        "MODEL": "demo",
        '"KEY"': f'"{KEY}"',
    }.items():
        lines = lines.replace(shown, here)
    script.write_text(lines)
    output = _run(command, script, LLM_USER_PATH=str(tmp_path))
    assert re.search(r"""['"]level['"]: ?0\.5\b""", output), output


@pytest.mark.parametrize(
    "written", ["- {", "5", "model_id: story", "- story", "- {model_id: story, api_bas: there}"]
)
def test_llm_dftserve_reports_what_is_wrong_with_its_models_file(written, tmp_path):
    models = tmp_path / "dftserve-models.yaml"
    models.write_text(written)
    done = _done("llm", "models", LLM_USER_PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {models}: ")
    assert "accepted: a list of models, each with model_id and api_base" in done.stderr


def test_llm_dftserve_does_not_send_the_key_of_another_server(recorder, tmp_path):
    entry = {"model_id": "story", "api_base": f"{recorder.url}/key/v1", "api_key_name": "here"}
    (tmp_path / "dftserve-models.yaml").write_text(json.dumps([entry]))
    variables = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "for another server"}
    done = _done("llm", "-m", "story", "Tell me a story.", **variables)
    assert done.returncode == 1
    assert "llm keys set here" in done.stderr
    assert "key" not in recorder.exchanges
