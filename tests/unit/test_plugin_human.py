"""`"diversity": "human"`: the target entropy of the served checkpoint."""

from types import SimpleNamespace

import pytest
from dftserve_vllm import capabilities, engine, human, request_context
from dftserve_vllm.request_context import RequestContext
from vllm.exceptions import VLLMValidationError

from dftserve.spec import CheckpointInfo
from tests.vllm_requests import params_of

EFFECTIVE = {"law": "budget", "target_entropy": 1.25, "max_temperature": 4.0}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The folder of the served model."""
    model_config = SimpleNamespace(
        model=str(tmp_path), is_diffusion=False, override_generation_config={}
    )
    config = SimpleNamespace(
        model_config=model_config, speculative_config=None, use_v2_model_runner=True
    )
    monkeypatch.setattr(engine, "_config", config)
    human._of_checkpoint.cache_clear()
    yield tmp_path
    human._of_checkpoint.cache_clear()


@pytest.mark.parametrize(
    "fields", [{"diversity": "human"}, {"vllm_xargs": {"diversity": "human"}}], ids=["top", "xargs"]
)
def test_human_is_the_budget_law_at_the_target_entropy(served, fields):
    CheckpointInfo(recipe="r", target_entropy=1.25).write(served)
    assert params_of(**fields).extra_args["diversity"] == EFFECTIVE
    assert capabilities.capabilities()["human"] == EFFECTIVE


def test_the_answer_reports_the_effective_diversity(served):
    CheckpointInfo(recipe="r", target_entropy=1.25).write(served)
    context = RequestContext()
    token = request_context.current.set(context)
    try:
        params_of(diversity="human")
    finally:
        request_context.current.reset(token)
    assert EFFECTIVE.items() <= context.members()["diversity"].items()


@pytest.mark.parametrize("written", ["nothing", "no entropy", "entropy 0", "something else"])
def test_without_a_target_entropy_human_is_refused(served, written):
    if written == "something else":
        (served / CheckpointInfo.FILE).write_text("{")
    elif written != "nothing":
        CheckpointInfo(recipe="r", target_entropy=0.0 if written == "entropy 0" else None).write(
            served
        )
    with pytest.raises(VLLMValidationError, match="target_entropy above 0") as raised:
        params_of(diversity="human")
    assert raised.value.parameter == "diversity"
    assert "got 'human'; accepted: a number from 0" in str(raised.value)
    assert capabilities.capabilities()["human"] is None
    assert params_of(diversity=0.5).extra_args["diversity"]["level"] == 0.5


def test_human_is_refused_before_the_engine_is_configured(monkeypatch):
    monkeypatch.setattr(engine, "_config", None)
    with pytest.raises(VLLMValidationError, match="target_entropy above 0"):
        params_of(diversity="human")
