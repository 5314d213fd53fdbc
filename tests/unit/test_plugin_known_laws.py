"""The laws that only cut, in the plug-in: the draws of `xtc` on both runners, and `min_p`."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dftserve_vllm import request_params, seals
from dftserve_vllm.extra_args import of_choice
from dftserve_vllm.request_context import PromptContext
from dftserve_vllm.v1 import V1Processor
from dftserve_vllm.v2 import V2Processor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor.interface import BatchUpdate

from dftserve.sampling.draws import draw_key
from dftserve.spec import parse
from tests.reference import draw_reference
from tests.vllm_config import config
from tests.vllm_requests import params_of

XTC = {"law": "xtc", "xtc_probability": 0.5}
ROW = torch.tensor([0.5, 0.3, 0.2]).log()
STEPS = 48
CPU = torch.device("cpu")


def params(seed=None, identity=None):
    carried = {"diversity": XTC, "diversity_id": identity}
    return SamplingParams(temperature=0.9, seed=seed, extra_args=carried)


def expected_exclusions(key, first=0):
    """For each step whether the top choices are excluded."""
    return [draw_reference(key, first + step) < 0.5 for step in range(STEPS)]


def v1_exclusions(*requests):
    """For each request and step whether the top choice was excluded."""
    outputs = [[] for _ in requests]
    processor = V1Processor(config(), CPU, False)
    added = [(i, each, [1], outputs[i]) for i, each in enumerate(requests)]
    processor.update_state(BatchUpdate(len(requests), removed=[], added=added, moved=[]))
    excluded = []
    for _ in range(STEPS):
        logits_RV = (ROW / 0.9).repeat(len(requests), 1)
        processor.apply(logits_RV)
        excluded.append((logits_RV[:, 0] == -torch.inf).tolist())
        for output in outputs:
            output.append(2)
    assert processor.state.faults == 0
    return [list(each) for each in zip(*excluded, strict=True)]


def v2_exclusions(request, *, drafts):
    """The same for one request from position 4 on, with this number of drafts in each step."""
    lengths = SimpleNamespace(np=np.ones(4, int), gpu=torch.ones(4))
    states = SimpleNamespace(max_num_reqs=4, device=CPU, prefill_len=lengths, prompt_len=lengths)
    given = config()
    given.speculative_config = SimpleNamespace(num_speculative_tokens=drafts)
    processor = V2Processor(given, states)
    assert processor.add_request(2, request)
    processor.apply_staged_writes()
    excluded = []
    for first in range(0, STEPS, 1 + drafts):
        offset_R = torch.arange(1 + drafts)
        context = SimpleNamespace(
            idx_mapping_np=np.array([2]),
            expanded_idx_mapping=torch.full_like(offset_R, 2),
            expanded_local_pos=offset_R,
            pos=4 + first + offset_R,
        )
        logits_RV = ROW.repeat(1 + drafts, 1)
        processor.apply(logits_RV, context)
        excluded += (logits_RV[:, 0] == -torch.inf).tolist()
    assert processor.state.faults == 0
    return excluded


def test_v1_draws_by_the_seed_and_the_output_length():
    assert v1_exclusions(params(seed=3), params(seed=4), params(seed=3)) == [
        expected_exclusions(draw_key("seed", seed)) for seed in (3, 4, 3)
    ]


@pytest.mark.parametrize("drafts", [0, 2])
def test_v2_draws_by_the_seed_and_each_rows_position(drafts):
    assert v2_exclusions(params(seed=3), drafts=drafts) == expected_exclusions(
        draw_key("seed", 3), first=4
    )


def test_without_a_seed_xtc_draws_by_the_requests_identity_and_choice():
    """All tensor-parallel ranks have these."""
    of_prompt = params(identity="x")
    choices = [of_choice(of_prompt, index, None) for index in range(2)]
    expected = [expected_exclusions(draw_key("identity", name)) for name in ("x.0", "x.1")]
    assert v1_exclusions(*choices) == expected
    assert v2_exclusions(choices[1], drafts=1) == expected_exclusions(
        draw_key("identity", "x.1"), first=4
    )


def test_without_seed_and_identity_xtc_draws_by_the_order_of_arrival():
    """Offline: ranks receive the same requests in the same order."""
    expected = [expected_exclusions(draw_key("arrival", n)) for n in range(3)]
    assert v1_exclusions(params(), params(), params()) == expected


def test_identities_contain_a_token_of_the_server_start():
    """Otherwise the first request after each start would have the same draws."""
    first, second = (PromptContext(parse(XTC), 1).identity for _ in range(2))
    assert first.split("-")[:2] == second.split("-")[:2]
    assert len(first.split("-")) > 2
    # Another import of the module is another start.
    specification = importlib.util.spec_from_file_location("another_start", seals.__file__)
    another_start = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(another_start)
    assert another_start.fresh_name().split("-")[1] != first.split("-")[1]


SIGMA = {"law": "top_n_sigma", "n_sigma": 1}


def test_min_p_becomes_the_guard_of_laws_with_a_guard():
    sampling_params = params_of(diversity=XTC, min_p=0.1)
    assert (sampling_params.min_p, sampling_params.extra_args["diversity"]["min_p"]) == (0, 0.1)
    assert params_of(diversity={"law": "guard", "min_p": 0.1}, min_p=0.1).min_p == 0
    assert "min_p" not in params_of(diversity=SIGMA).extra_args["diversity"]


def test_min_p_is_refused_with_a_law_that_has_its_own_cut():
    with pytest.raises(VLLMValidationError, match="with the law 'top_n_sigma'") as raised:
        params_of(diversity=SIGMA, min_p=0.1)
    assert raised.value.parameter == "min_p"


def test_a_default_law_with_its_own_cut_is_not_applied_to_requests_with_min_p(monkeypatch):
    monkeypatch.setattr(request_params, "default_diversity", lambda: parse(SIGMA))
    assert params_of(diversity=None).extra_args["diversity"] == SIGMA
    sampling_params = params_of(diversity=None, min_p=0.1)
    assert (sampling_params.min_p, sampling_params.extra_args) == (0.1, None)
