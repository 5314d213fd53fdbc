"""bench/gpu.py: a failed stage does not stop the others; and the table of its results."""

import importlib
import json
import sys

import pytest
import torch


@pytest.fixture
def gpu(monkeypatch):
    """The bench with empty stages, on a CPU."""
    module = importlib.import_module("gpu")
    for stage in ("exactness", "samplers", "steps", "training", "targets", "generation"):
        monkeypatch.setattr(module, stage, lambda *_: [])
    return module


def run(gpu, monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    gpu.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_failed_stage_is_reported_and_the_others_run(gpu, monkeypatch, capsys, tmp_path):
    def failing(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(gpu, "training", failing)
    monkeypatch.setattr(gpu, "targets", lambda *_: {"tokens_per_second": 5.0})
    file = tmp_path / "gpu.json"
    results = run(gpu, monkeypatch, capsys, "--device", "cpu", "--quick", "--output", str(file))
    assert results["train"]["failed"] == "MemoryError: too large"
    assert results["targets"]["result"] == {"tokens_per_second": 5.0}
    assert json.loads(file.read_text()) == results
    assert not results["is_whole_run"]


def test_a_run_without_a_gpu_does_not_write_the_results(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    for options in (("--device", "cpu"), ("--device", "cpu", "--quick")):
        run(gpu, monkeypatch, capsys, *options)
    assert not (tmp_path / "gpu.json").exists()


def test_a_missing_package_is_replaced_by_a_stand_in(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "blake3", None)
    gpu.stand_in_for_absent_packages()
    from blake3 import blake3

    assert isinstance(blake3, type)


def test_the_exactness_stage_detects_a_wrong_law(monkeypatch):
    gpu = importlib.import_module("gpu")
    size = gpu.Size(**{**vars(gpu.QUICK), "step_vocabulary": 300})
    monkeypatch.setattr(gpu, "KINDS", {"few": None, "gaussian": None})
    monkeypatch.setattr(gpu, "get_backend", lambda device, token_classes: None)

    def untouched(logits_RV, asked, stops, backend):
        return logits_RV, torch.zeros(len(logits_RV))

    monkeypatch.setattr(gpu, "rewritten", untouched)
    with pytest.raises(ArithmeticError, match="another support"):
        gpu.exactness(torch.device("cpu"), size)


def test_the_table_has_a_line_for_every_result_and_every_failure():
    table = importlib.import_module("gpu_table").table
    found = {"ratio": 1.2, "interval": [1.1, 1.3]}
    document = {
        "machine": {"device": "a card"},
        "exactness": {"result": {"rows": 9, "worst": {"log_p": 1e-6, "nats": 2e-6}}},
        "sampler": {"result": [{"vocabulary": 131_072, "rows": 64, "ours_to_copy": found}]},
        "step": {"result": [{"rows": 32, "host_us": 55.2}]},
        "train": {"failed": "OutOfMemoryError: no room"},
        "targets": {"result": {"tokens_per_second": 51_234.0}},
        "generate": {"result": "not run: no --model"},
    }
    written = table(document)
    assert written.startswith("On one a card:")
    assert "| one call / a copy | V=131,072, R=64 | 1.20 [1.10, 1.30] | 1.15 |" in written
    assert "| host time of a step | R=32 | 55 µs | 60 µs |" in written
    assert "| train |  | failed: OutOfMemoryError: no room |  |" in written
    assert "51,234" in written
    assert "generate" not in written
