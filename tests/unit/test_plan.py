"""`train --plan`: the memory and time that a run needs, and its warnings."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dftserve.targets.conversation import NO_STOP
from dftserve.targets.store import MANIFEST
from dftserve.train import plan as plans
from dftserve.train import prepare
from dftserve.train.config import DivergenceConfig, LoraConfig, TrainConfig, load
from dftserve.train.material import read
from dftserve.train.plan import plan_of
from tests.conftest import ROOT
from tests.training import save_model, save_store

EXTRA = 256 << 20
"""Bytes; far more than the process otherwise allocates or frees in a test."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("plan")
    return TrainConfig(
        model=str(save_model(folder / "base")),
        targets=str(save_store(folder / "store")),
        output=str(folder / "run"),
        max_length=64,
        batch_size=2,
        steps=120,
    )


def test_memory_includes_what_the_process_already_holds(config):
    before = plan_of(config)
    allocated = np.ones(EXTRA, dtype=np.uint8)
    after = plan_of(config)
    assert after.process_bytes - before.process_bytes > EXTRA // 2
    assert after.memory_bytes - before.memory_bytes > EXTRA // 2
    assert len(allocated) == EXTRA


def test_memory_includes_the_weights_once(config, monkeypatch):
    """Memory that is allocated while the model is loaded is not counted as the process's."""
    allocated, before, load_model = [], plan_of(config), prepare.load_model

    def heavy(*given):
        allocated.append(np.ones(EXTRA, dtype=np.uint8))
        return load_model(*given)

    monkeypatch.setattr(prepare, "load_model", heavy)
    assert plan_of(config).process_bytes - before.process_bytes < EXTRA // 2
    assert len(allocated) == 1


def test_the_parts_of_memory_are_shown_and_sum_to_the_total(config):
    plan = plan_of(config)
    whole = json.loads(plan.as_json())
    parts = ("process", "weights", "gradient", "optimizer", "activation", "head")
    assert sum(whole[f"{name}_bytes"] for name in parts) == whole["memory_bytes"]
    assert re.search(
        r"^memory +.*: process [\d.e+]+ [MG]iB, weights ", plan.as_text(), re.MULTILINE
    )


def test_disk_includes_the_best_checkpoint_beside_the_newest(config):
    """With `patience`, keep 1 leaves two, and the next is written before one is deleted."""
    early = replace(config, patience=2, evaluate_every=10)
    disk = [plan_of(replace(early, keep=keep)).disk_bytes for keep in (1, 2)]
    assert disk[0] == disk[1]
    assert plan_of(replace(config, keep=1)).disk_bytes < disk[0]


def test_disk_includes_the_weights_once_if_only_adapters_are_trained(config):
    """A checkpoint to resume from has the adapters alone."""
    tuned = replace(config, lora=LoraConfig(rank=1, modules="q_proj"))
    few, many = (plan_of(replace(tuned, keep=keep)) for keep in (1, 3))
    weights = 4 * few.parameters
    assert few.disk_bytes > weights
    assert many.disk_bytes - few.disk_bytes < weights
    assert plan_of(replace(config, keep=3)).disk_bytes > 5 * weights


def test_the_free_disk_is_that_of_the_output(config):
    plan = plan_of(replace(config, output=str(Path(config.output) / "not" / "made")))
    assert plan.free_disk_bytes > 0
    assert re.search(
        r"^disk +[\d.e+]+ \w+ at most; [\d.e+]+ \w+ free$", plan.as_text(), re.MULTILINE
    )
    assert not Path(config.output).exists()


def test_an_output_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cannot be made"):
        plan_of(replace(config, output=str(tmp_path / "file" / "run")))


def test_gpu_memory_excludes_that_of_the_process(config, monkeypatch):
    monkeypatch.setattr(plans, "_device_of", lambda model: "cuda")
    assert plan_of(config).process_bytes == 0


def test_the_steps_include_the_candidates_that_auto_tries(config):
    assert "auto" not in plan_of(config).as_text()
    auto = DivergenceConfig(target_weight="auto")
    shown = plan_of(replace(config, divergence=auto)).as_text()
    assert "before them 40 for target_weight auto, which tries 0, 0.3, 0.6, 0.9\n" in shown


def test_the_readme_plans_the_same_run_that_it_shows():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^    dftserve train (--[^#\n]*)", text, re.MULTILINE)
    planned, run = [_settings(line) for line in lines]
    assert planned == run
    assert planned.divergence.target_weight == "auto"


def _settings(line: str) -> TrainConfig:
    pairs = re.findall(r"--set (\S+?)=(\S+)", line)
    return load(None, dict(pairs))


def test_targets_whose_answers_have_no_end_give_a_warning(config, tmp_path):
    """In the plan and in a run."""
    assert plan_of(config).warning is None
    store = Path(shutil.copytree(config.targets, tmp_path / "store"))
    content = json.loads((store / MANIFEST).read_text())
    content["plan"]["corpus"] = {"noted": {NO_STOP: {"count": 30, "examples": ["chat.jsonl:1"]}}}
    (store / MANIFEST).write_text(json.dumps(content))
    unending = replace(config, targets=str(store))
    plan = plan_of(unending)
    assert plan.warning is not None
    assert f"in 30 conversations {NO_STOP}" in plan.warning
    assert plan.warning in plan.as_text()
    assert plan.warning in read(unending).as_text()
