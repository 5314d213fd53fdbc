"""The benches that measure the cost of the field on an engine run, with the shortest settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.long

VOCABULARY, TOKENS = 4096, 128
"""Of the smaller model of bench/tiny_model.py and of its requests' output."""


def test_overhead_transforms_the_rows_of_requests_with_the_field(tmp_path):
    (row,) = _document("overhead", tmp_path, "--batch", "2")["rows"]
    assert row["no field_transforms"] == 0
    assert row["tenth_transforms"] == row["field_transforms"] == TOKENS


def test_served_measures_the_plug_ins_memory():
    import served

    memory = served.memory_bytes((VOCABULARY,))
    assert memory["slot"] > 0
    assert memory["room"][VOCABULARY] > 0


def _document(bench: str, folder: Path, *options: str) -> dict:
    """The results of a bench after one round of each variant."""
    output = folder / "results.json"
    brief_options = ("--pairs", "1", "--vocabulary", str(VOCABULARY), "--output", output)
    command = [sys.executable, ROOT / "bench" / f"{bench}.py", *brief_options, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())
