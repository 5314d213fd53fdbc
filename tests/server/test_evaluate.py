"""`dftserve evaluate` against a real vLLM server, from prompts to report."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dftserve.cli import main
from dftserve.evaluate import reference
from dftserve.evaluate.text.windows import Sample
from dftserve.stories.grammar import PROMPTS
from tests.client import metric
from tests.conftest import KEY
from tests.texts import human_like

SAMPLES = 2
GRID = "0,.5,1"
LONG_ENOUGH = json.dumps({"min_tokens": 180, "presence_penalty": 1.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    samples = [Sample(text) for text in human_like(128)]
    reference.save(reference.build(samples, words=80), folder / "anchors")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def evaluate(engine, folder: Path, monkeypatch, *more: str):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    arguments = [
        *("evaluate", engine.url, "--prompts", f"{folder / 'prompts.txt'}", "--grid", GRID),
        *("--anchors", f"{folder / 'anchors'}", "--out", f"{folder / 'out'}"),
        *("--samples", f"{SAMPLES}", "--max-tokens", "200", "--body", LONG_ENOUGH, *more),
    ]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_evaluate_samples_and_writes_a_report(v1, folder, monkeypatch):
    before = metric(v1, "vllm:request_success_total")
    done = evaluate(v1, folder, monkeypatch)
    assert done.exit_code == 0, done.output
    requests = len(PROMPTS) * SAMPLES * len(GRID.split(","))
    assert metric(v1, "vllm:request_success_total") - before == requests

    result = json.loads((folder / "out" / "result.json").read_text())
    off, half, full = result["levels"]
    assert off["entropy"] is None
    assert half["entropy"]["after"]["value"] > half["entropy"]["before"]["value"]
    assert full["entropy"]["temperature"]["value"] > half["entropy"]["temperature"]["value"] > 1
    for level in result["levels"]:
        assert level["side"]["score"]["texts"] == len(PROMPTS) * SAMPLES
        assert level["tokens"]["value"] >= 180
    assert (folder / "out" / "report.html").stat().st_size > 10_000

    again = evaluate(v1, folder, monkeypatch)
    assert again.exit_code == 0, again.output
    assert metric(v1, "vllm:request_success_total") - before == requests, (
        "an answer is requested twice"
    )
    assert again.stdout.splitlines()[2:] == done.stdout.splitlines()[2:]


def test_a_refusal_by_the_server_is_reported(v1, folder, monkeypatch, tmp_path):
    refused = evaluate(v1, folder, monkeypatch, "--body", '{"top_p": 7}', "--out", f"{tmp_path}")
    assert refused.exit_code == 2
    assert "top_p" in refused.output
