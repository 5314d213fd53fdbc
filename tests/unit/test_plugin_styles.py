"""The field `style` in the plug-in: from the request's body to the rows of both runners, and
refusals."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dftserve_vllm import engine, request_context, request_params, styles
from dftserve_vllm.processor import DiversityProcessor
from dftserve_vllm.request_context import PromptContext, RequestContext
from dftserve_vllm.styles import Styles
from dftserve_vllm.v1 import V1Processor
from dftserve_vllm.v2 import V2Processor
from vllm import SamplingParams
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor.interface import BatchUpdate

from dftserve import fingerprints, spec
from dftserve.sampling.slots import COLUMNS, COUNT, HELD_BACK, KL, STRENGTH
from dftserve.sampling.style.tables import DEEPEST
from dftserve.styles import profile as profiles
from tests.style_reference import style_reference
from tests.styles import pattern, stored
from tests.vllm_config import config
from tests.vllm_requests import params_of, refused

V = 40
CPU = torch.device("cpu")
PROFILE = stored(vocabulary=V).profile
STYLES = Styles((PROFILE,), {"other": "the style 'other' was built with another tokenizer."})
HUMAN = {"name": "small", "strength": 0.8, "max_kl": 0.2}


@pytest.fixture(autouse=True)
def of_engine(monkeypatch):
    monkeypatch.setattr(styles, "of_engine", lambda vllm_config: STYLES)


def params(style=HUMAN, temperature=0.9, **extra):
    return SamplingParams(temperature=temperature, extra_args={"style": style, **extra})


def expected_row(logits_V, answer, last, level=0.0):
    """The reference log-probabilities after this answer, by the definition of a profile."""
    state = 0
    for token in answer:
        state, _ = PROFILE.step(state, token)
    factor_V = [math.exp(PROFILE.step(state, v)[1]) for v in range(V)]
    delta_V = [PROFILE.delta(last, v) for v in range(V)]
    return style_reference(
        logits_V,
        factor_V,
        delta_V,
        temperature=0.9,
        log_guard=math.log(0.05) + level * math.log(0.4),
        strength=HUMAN["strength"],
        allowance=HUMAN["max_kl"],
    ).log_p_V


def check(after_V, expected_V, divisor=1.0):
    got_V = torch.log_softmax(after_V.double() * divisor / 0.9, 0).numpy()
    np.testing.assert_allclose(got_V, expected_V, atol=1e-3)


def test_v1_depends_on_the_answer_so_far_also_after_a_preemption():
    answers = [[], [4, 2]]
    processor = V1Processor(config(), CPU, False)
    added = [(0, params(), [1, 2], answers[0]), (1, params(), [7], answers[1])]
    processor.update_state(BatchUpdate(2, removed=[], added=added, moved=[]))
    torch.manual_seed(0)
    for following in ([1, 3], [2, 1], [3, 2], [0, 5]):
        logits_RV = torch.randn(2, V)
        after_RV = logits_RV.clone()
        processor.apply(after_RV)
        resumed = V1Processor(config(), CPU, False)
        resumed.update_state(
            BatchUpdate(1, removed=[], added=[(0, params(), [1, 2], answers[0])], moved=[])
        )
        again_RV = logits_RV[:1].clone()
        resumed.apply(again_RV)
        assert torch.equal(again_RV[0], after_RV[0])
        for r, prompt_end in enumerate((2, 7)):
            last = answers[r][-1] if answers[r] else prompt_end
            arrived_V = logits_RV[r].double().numpy() * 0.9
            check(after_RV[r], expected_row(arrived_V, answers[r], last), divisor=0.9)
            answers[r].append(following[r])
    assert processor.state.faults == 0
    assert processor.state.slots.read(processor._slots[0]).sums_F[COUNT] == 3


def v2_processor(drafts=0):
    tokens_SL = torch.zeros(4, 16, dtype=torch.int32)
    lengths = torch.full((4,), 2, dtype=torch.int32)
    states = SimpleNamespace(
        max_num_reqs=4,
        device=CPU,
        all_token_ids=SimpleNamespace(gpu=tokens_SL),
        prefill_len=SimpleNamespace(np=lengths.numpy(), gpu=lengths),
        prompt_len=SimpleNamespace(np=lengths.numpy(), gpu=lengths),
    )
    given = config()
    if drafts:
        given.speculative_config = SimpleNamespace(num_speculative_tokens=drafts)
    return V2Processor(given, states), tokens_SL


def test_v2_reads_committed_tokens_by_slot_and_drafts_from_the_inputs():
    processor, tokens_SL = v2_processor(drafts=2)
    assert processor.add_request(1, params())
    assert processor.add_request(2, params(diversity=0.5))
    assert not processor.add_request(3, SamplingParams())
    processor.apply_staged_writes()
    # The prompts have two tokens. In the first answer 4 and 2 are committed, 3 is the last token,
    # 0 and 1 are drafts. The second answer has one token, 1.
    tokens_SL[1, :4] = torch.tensor([1, 2, 4, 2])
    tokens_SL[2, :2] = torch.tensor([1, 2])
    context = SimpleNamespace(
        idx_mapping_np=np.array([1, 2, 3]),
        expanded_idx_mapping=torch.tensor([1, 1, 1, 2, 3]),
        expanded_local_pos=torch.tensor([0, 1, 2, 0, 0]),
        pos=torch.tensor([4, 5, 6, 2, 7]),
        input_ids=torch.tensor([3, 0, 1, 1, 1], dtype=torch.int32),
    )
    logits_RV = torch.randn(5, V)
    after_RV = logits_RV.clone()
    processor.apply(after_RV, context)
    assert processor.state.faults == 0
    texts = [[4, 2, 3], [4, 2, 3, 0], [4, 2, 3, 0, 1]]
    for r, text in enumerate(texts):
        check(after_RV[r], expected_row(logits_RV[r].numpy(), text, text[-1]))
    heated_V = expected_row(logits_RV[3].numpy(), [1], 1, level=0.5)
    assert np.array_equal(np.isinf(heated_V), after_RV[3].isinf().numpy())
    assert torch.equal(after_RV[4], logits_RV[4])


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_the_style_stage_does_not_run_if_no_row_has_a_style(monkeypatch, runner):
    request = SamplingParams(temperature=0.9, extra_args={"diversity": 0.5})
    if runner == "V1":
        processor = V1Processor(config(), CPU, False)
        added = [(0, request, [1], [2])]
        processor.update_state(BatchUpdate(1, removed=[], added=added, moved=[]))
        context = ()
    else:
        processor, _ = v2_processor()
        processor.add_request(0, request)
        processor.apply_staged_writes()
        zero = torch.tensor([0])
        context = (
            SimpleNamespace(
                idx_mapping_np=np.array([0]),
                expanded_idx_mapping=zero,
                expanded_local_pos=zero,
                pos=zero + 3,
                input_ids=zero,
            ),
        )
    monkeypatch.setattr(processor.state, "_style_stage", None)
    logits_RV = torch.randn(1, V)
    after_RV = logits_RV.clone()
    processor.apply(after_RV, *context)
    assert processor.state.faults == 0
    assert not torch.equal(after_RV, logits_RV)


@pytest.fixture
def configured(monkeypatch):
    model = SimpleNamespace(is_diffusion=False, override_generation_config={})
    monkeypatch.setattr(engine, "_config", config(model_config=model, use_v2_model_runner=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"style": "small"},
        {"style": {"name": "small"}},
        {"vllm_xargs": {"style": "small"}},
        {"vllm_xargs": {"style": '{"name": "small"}'}},
        {"style": "small", "vllm_xargs": {"style": "small"}},
    ],
)
def test_a_style_reaches_the_workers_with_its_profiles_values(configured, fields):
    carried = params_of(**fields).extra_args
    assert carried["style"] == {"name": "small", "strength": 1.0, "max_kl": 0.05}
    assert carried["diversity"] == {"law": "gated", "level": 0.0}
    assert carried["diversity_id"]


def test_a_style_is_combined_with_a_diversity_and_min_p(configured):
    carried = params_of(style=HUMAN, diversity=0.5, min_p=0.1).extra_args
    assert carried["style"] == HUMAN
    assert carried["diversity"]["level"] == 0.5
    assert carried["diversity"]["min_p"] == 0.1


@pytest.mark.parametrize(
    ("style", "parameter", "names"),
    [
        ("smal", "style.name", "got 'smal'; accepted: small."),
        ("other", "style.name", "got 'other', which was refused: .*another tokenizer"),
        (7, "style", "got 7; accepted: the name of a style"),
        ({"strength": 1}, "style.name", "got nothing; accepted: the name"),
        ({"name": "small", "strength": 2}, "style.strength", "got 2; accepted: a number from 0"),
        ({"name": "small", "max_kl": math.nan}, "style.max_kl", "got nan; accepted: a number"),
        ({"name": "small", "strenght": 1}, "style.strenght", "did you mean 'strength'"),
    ],
)
def test_an_invalid_style_is_refused_by_name(configured, style, parameter, names):
    import re

    error = refused(style=style)
    assert error.parameter == parameter
    assert re.search(names, str(error)), error
    for temperature in (0.0, 0.9):
        with pytest.raises(ValueError, match=names):
            DiversityProcessor.validate_params(params(style, temperature))


def test_contradictory_styles_and_beam_search_are_refused(configured):
    assert refused(style="small", vllm_xargs={"style": '{"name": "small", "strength": 0.5}'})
    request = CompletionRequest(model="m", prompt="x", style="small")
    refuse = request_params.refuse_beam_search(lambda request: None)
    with pytest.raises(VLLMValidationError, match="style: got it together with use_beam_search"):
        refuse(request)


@pytest.mark.parametrize("law", ["top_n_sigma", "xtc"])
def test_a_law_that_cuts_by_the_whole_row_is_refused_with_a_style(configured, law):
    diversity = {"top_n_sigma": {"n_sigma": 1.0}, "xtc": {"xtc_probability": 0.5}}[law]
    error = refused(style="small", diversity={"law": law, **diversity})
    assert error.parameter == "style"
    assert "gated" in str(error)
    for temperature in (0.0, 0.9):
        carried = params("small", temperature, diversity={"law": law, **diversity})
        with pytest.raises(ValueError, match="gated"):
            DiversityProcessor.validate_params(carried)
    params_of(style={"name": "small", "strength": 0}, diversity={"law": law, **diversity})


def test_a_style_that_is_off_changes_nothing(configured):
    assert params_of(style={"name": "small", "strength": 0}).extra_args is None
    assert params_of(style="small", temperature=0).extra_args is None


def answer_of(**fields) -> tuple[RequestContext, dict]:
    opened = RequestContext()
    token = request_context.current.set(opened)
    try:
        params_of(**fields)
    finally:
        request_context.current.reset(token)
    row_F = np.zeros(COLUMNS)
    row_F[[COUNT, KL, HELD_BACK, STRENGTH]] = 10, 0.2, 0.03, 8.0
    for prompt in opened.prompts:
        for choice in prompt.choices:
            choice.payload = {"row": [10, *row_F, *[0.0] * COLUMNS], "engine": 0}
            choice.produced = 10
    return opened, opened.members()


def test_the_answer_reports_the_styles_statistics(configured):
    _, members = answer_of(style="small", n=2)
    statistics = {
        "tokens": 10,
        "mean_kl": 0.02,
        "effective_strength": 0.8,
        "phrases_held_back": 3.0,
    }
    assert members == {
        "style": {
            "name": "small",
            "strength": 1.0,
            "max_kl": 0.05,
            "choices": [statistics, statistics],
        }
    }
    _, members = answer_of(style="small", diversity=0.5)
    assert members["style"]["choices"] == [statistics]
    assert members["diversity"]["level"] == 0.5
    assert set(members["diversity"]["choices"][0]) == {
        *("tokens", "mean_entropy_before", "mean_entropy_after"),
        *("mean_temperature", "tokens_changed"),
    }
    _, members = answer_of(style="small", temperature=0)
    assert members["style"]["strength"] == 0
    assert "greedy" in members["style"]["reason"]


def test_without_a_style_the_answer_reports_the_diversity_only():
    assert PromptContext(spec.parse(0.5), 1).effective() == {
        "diversity": {"law": "gated", "level": 0.5, "max_temperature": 4.0}
    }


class Tokenizer:
    """The parts of a tokenizer that fingerprints read."""

    chat_template = "a template"

    def __init__(self):
        self.special_tokens_map = {}

    def get_vocab(self):
        return {"a": 0, "b": 1}


def test_profiles_that_do_not_fit_the_engine_are_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.undo()
    tokenizer = Tokenizer()
    own = fingerprints.tokenizer_fingerprint(tokenizer)
    manifests = {
        "fits": {"tokenizer_fingerprint": own},
        "other": {"tokenizer_fingerprint": "b" * 64},
        "templated": {"tokenizer_fingerprint": own, "template_fingerprint": "c" * 64},
        "larger": {"tokenizer_fingerprint": own, "vocabulary": V + 1},
    }
    for name, values in manifests.items():
        vocabulary = values.pop("vocabulary", V)
        profiles.write(tmp_path / name, stored(vocabulary=vocabulary, name=name, **values))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / profiles.MANIFEST).write_text("{")
    surrogate = (tmp_path / "fits" / profiles.MANIFEST).read_text()
    (tmp_path / "surrogate").mkdir()
    (tmp_path / "surrogate" / profiles.MANIFEST).write_text(
        surrogate.replace('"words": 10', '"\\ud800": 10')
    )
    long = pattern(0, *(n % V for n in range(DEEPEST + 1)))
    deep = stored([long], log_ratio_P=(1.0,), vocabulary=V, tokenizer_fingerprint=own, name="deep")
    profiles.write(tmp_path / "deep", deep)
    (tmp_path / "lost+found").mkdir()
    monkeypatch.setattr("dftserve_vllm.vocabulary.tokenizer", lambda model_config: tokenizer)
    model = SimpleNamespace(get_vocab_size=lambda: V)
    given = config(model_config=model, use_v2_model_runner=True)
    assert styles.of_engine(given) is styles.NONE
    monkeypatch.setenv(spec.STYLES_VARIABLE, str(tmp_path))
    loaded = styles.of_engine(given)
    assert [profile.name for profile in loaded.profiles] == ["fits"]
    refused = {"other", "templated", "larger", "broken", "surrogate", "deep"}
    assert set(loaded.refused) == refused
    assert "256 tokens" in loaded.refused["deep"]
    assert str(tmp_path) not in "".join(loaded.refused.values())
    assert "another tokenizer" in loaded.refused["other"]
    assert "columns of logits" in loaded.refused["larger"]
    assert styles.of_engine(given).profiles is loaded.profiles, "read once"
    assert "which was refused" in str(loaded.refusal_of(spec.Style(name="other")))
    assert loaded.refusal_of(spec.Style(name="fits")) is None


def test_v1_with_asynchronous_scheduling_refuses_every_style(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv(spec.STYLES_VARIABLE, str(tmp_path))
    monkeypatch.setattr("dftserve_vllm.vocabulary.tokenizer", lambda model_config: Tokenizer())
    model = SimpleNamespace(get_vocab_size=lambda: V, logits_processors=None)
    given = config(model_config=model, use_v2_model_runner=False)
    given.scheduler_config.async_scheduling = True
    refusal = styles.of_engine(given).refusal_of(spec.Style(name="small"))
    assert "--no-async-scheduling" in str(refusal)
    assert styles.of_engine(given).profiles == ()


def test_an_operators_default_is_dropped_if_it_is_incompatible_with_a_style(
    configured, monkeypatch
):
    default = spec.parse({"law": "xtc", "xtc_probability": 0.5})
    monkeypatch.setattr(request_params, "default_diversity", lambda: default)
    carried = params_of(style="small").extra_args
    assert carried["style"]["name"] == "small"
    assert carried["diversity"]["law"] == "gated"


GROUP = {"level": 0.5, "group": True}


@pytest.mark.parametrize(
    ("default", "fields", "is_in_force"),
    [
        (0.5, {}, True),
        (0.5, {"min_p": 0.1}, True),
        (0.5, {"temperature": 0}, False),
        (0.5, {"stop_token_ids": list(range(65))}, False),
        ({"level": 0.5, "min_p": 0.05}, {"min_p": 0.1}, False),
        ({"law": "guard", "min_p": 0.05}, {"min_p": 0.1}, False),
        ({"law": "guard", "min_p": 0.05}, {"min_p": 0.05}, True),
        (GROUP, {"n": 2}, True),
        (GROUP, {"n": 1025}, False),
    ],
)
@pytest.mark.parametrize("style", [{"style": "small"}, {"style": HUMAN | {"strength": 0}}, {}])
def test_an_operators_default_is_dropped_if_it_conflicts_with_the_clients_fields(
    configured, monkeypatch, default, fields, is_in_force, style
):
    """The default never causes an error, and the style is still in force."""
    monkeypatch.setattr(request_params, "default_diversity", lambda: spec.parse(default))
    token = request_context.current.set(RequestContext())
    try:
        if style == {"style": "small"} and "stop_token_ids" in fields:
            assert refused(**style, **fields).parameter == "stop_token_ids"  # By the style.
            return
        params = params_of(**style, **fields)
        prompts = request_context.current.get().prompts
    finally:
        request_context.current.reset(token)
    carried = params.extra_args or {}
    has_style = style == {"style": "small"} and fields.get("temperature") != 0
    assert ("style" in carried) == has_style
    law = spec.parse(carried["diversity"]) if carried else spec.Diversity(level=0.0)
    assert (law.level != 0) == is_in_force
    assert [prompt.has_diversity for prompt in prompts] == [is_in_force] * bool(
        style or is_in_force
    )


def test_a_clients_min_p_replaces_an_operators_default_with_min_p(configured, monkeypatch):
    guard = spec.parse({"law": "guard", "min_p": 0.05})
    monkeypatch.setattr(request_params, "default_diversity", lambda: guard)
    params = params_of(min_p=0.1)
    assert params.min_p == 0.1
    assert "diversity" not in (params.extra_args or {})
