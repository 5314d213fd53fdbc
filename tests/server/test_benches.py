"""The benches that ask an engine what the field costs do so still, as briefly as they go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.long

VOCABULARY, TOKENS = 4096, 128
"""The smaller model's, and the output tokens of its requests (bench/tiny_model.py)."""


def test_overhead_transforms_the_rows_of_those_that_ask(tmp_path):
    (row,) = _document("overhead", tmp_path, "--batch", "2")["rows"]
    assert row["no field_transforms"] == 0
    assert row["tenth_transforms"] == row["field_transforms"] == TOKENS


def test_served_counts_what_the_plug_in_keeps():
    import served

    kept = served.memory_bytes((VOCABULARY,))
    assert kept["slot"] > 0
    assert kept["room"][VOCABULARY] > 0


def _document(bench: str, place: Path, *options: str) -> dict:
    """What a bench writes after one round of each way."""
    output = place / "results.json"
    briefly = ("--pairs", "1", "--vocabulary", str(VOCABULARY), "--output", output)
    command = [sys.executable, ROOT / "bench" / f"{bench}.py", *briefly, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())
