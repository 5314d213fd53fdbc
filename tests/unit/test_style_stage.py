"""The style stage: compared with fp64 on rows of every kind, its guarantees, its effect on rates.

Triton decides at its import whether it interprets, so the last test runs its kernel in a process of
its own."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.sampling import (
    Controls,
    Slots,
    Step,
    StyleControls,
    StyleTables,
    Texts,
    control_row,
    get_style_stage,
    transform_step,
)
from dftserve.sampling.backends.numba import NumbaBackend
from dftserve.sampling.backends.numba_slots import NumbaSlots
from dftserve.sampling.backends.numba_style import NumbaStyleStage
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.sampling.backends.triton import TritonBackend
from dftserve.sampling.backends.triton_slots import TritonSlots
from dftserve.sampling.backends.triton_style import TritonStyleStage
from dftserve.sampling.slots import COUNT, KL, TILT_KL
from dftserve.sampling.style import PlainStyleStage
from dftserve.spec import Diversity, parse
from tests import interpreted
from tests.chain import Chain
from tests.profiles import random_profile, toy_profile
from tests.rows import KINDS, make_rows
from tests.style_reference import style_reference

LOG_PROBABILITY = 5e-4
NATS = 1e-3
OFF = Diversity(level=0.0)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STAGES = pytest.mark.parametrize(
    "stage", [TritonStyleStage] if INTERPRETED else [PlainStyleStage, NumbaStyleStage]
)
SLOTS = TritonSlots if INTERPRETED else NumbaSlots
EXAMPLES = 5 if INTERPRETED else 60
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="of no kernel, or too long")


class Row:
    """A request: its parameters, its text and how many of its last tokens are drafts."""

    def __init__(self, text=(), *, prompt=(), strength=1.0, max_kl=100.0, **others):
        self.text, self.prompt = list(text), list(prompt)
        self.style = StyleControls(
            profile=others.get("profile", 0), strength=strength, max_kl=max_kl
        )
        self.diversity = others.get("diversity", OFF)
        self.temperature = others.get("temperature", 1.0)
        self.divisor = others.get("divisor", 1.0)
        self.stop_ids = others.get("stop_ids", frozenset())
        self.drafts = others.get("drafts", 0)

    def controls(self, *, has_style=True):
        return control_row(
            self.diversity,
            temperature=self.temperature,
            logits_divisor=self.divisor,
            stop_ids=self.stop_ids,
            style=self.style if has_style else None,
        )


def step_of(rows, *, without=()):
    """A step with a row for each request and each draft. `without`: requests without a style."""
    length = max(len(row.prompt) + len(row.text) for row in rows) + 1
    tokens_SL = np.full((len(rows), length), 10**6, np.int32)
    slots, positions, offsets, at, inputs = [], [], [], [], []
    for s, row in enumerate(rows):
        whole = [*row.prompt, *row.text]
        certain = len(whole) - row.drafts
        # The last certain token is also an input and may not be stored yet.
        tokens_SL[s, : max(certain - 1, 0)] = whole[: max(certain - 1, 0)]
        for k in range(row.drafts + 1):
            slots.append(s)
            at.append(certain - 1 + k)
            positions.append(certain - 1 + k)
            offsets.append(k)
            inputs.append(whole[certain - 1 + k] if whole else -1)
    texts = Texts(
        torch.from_numpy(tokens_SL),
        torch.tensor([len(row.prompt) for row in rows], dtype=torch.int32),
        torch.tensor(at),
        torch.tensor(inputs, dtype=torch.int32),
    )
    controls = [row.controls(has_style=s not in without) for s, row in enumerate(rows)]
    return Step(
        Controls.stack(controls),
        torch.tensor(slots),
        torch.tensor(positions),
        torch.tensor(offsets, dtype=torch.int32),
        texts=texts,
    )


def restyle(stage, profiles, rows, logits_RV, **others):
    """The rows after the stage, and their statistics."""
    after_RV, step = logits_RV.clone(), step_of(rows, **others)
    slots = SLOTS(len(rows), 1 + max(row.drafts for row in rows), "cpu")
    style_stats_RF = stage(StyleTables.of(profiles))(after_RV, step, slots)
    return after_RV, style_stats_RF.clone()


@st.composite
def batches(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    vocabulary = draw(st.sampled_from([2, 3, 17, 64, 257]))
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4))
    profiles = [random_profile(seed + p, vocabulary) for p in range(draw(st.integers(1, 3)))]
    token = st.integers(0, min(vocabulary - 1, 4))
    rows = []
    for _ in kinds:
        text = draw(st.lists(token, min_size=1, max_size=9))
        level = draw(st.floats(0.0, 1.0))
        min_p = draw(st.none() | st.floats(1e-4, 0.5))
        rows.append(
            Row(
                text,
                prompt=draw(st.lists(token, max_size=2)),
                profile=draw(st.integers(0, len(profiles) - 1)),
                strength=draw(st.sampled_from([0.0, 0.3, 1.0])),
                max_kl=draw(st.sampled_from([0.01, 0.05, 100.0])),
                diversity=Diversity(level=level, min_p=min_p),
                temperature=draw(st.floats(0.3, 2.0)),
                stop_ids=draw(st.frozensets(st.integers(0, 20), max_size=3)),
            )
        )
    if draw(st.booleans()):
        for row in rows:
            row.divisor = row.temperature
    return make_rows(kinds, vocabulary, seed), profiles, rows


def log_guard_of(row):
    if row.diversity.min_p is not None:
        return math.log(row.diversity.min_p)
    return math.log(0.05) + row.diversity.level * math.log(0.02 / 0.05)


def expected_of(row, profile, logits_V):
    return style_reference(
        logits_V,
        profile.factors(row.text),
        profile.delta_VV[row.text[-1]],
        temperature=row.temperature,
        log_guard=log_guard_of(row),
        strength=row.style.strength,
        allowance=row.style.max_kl,
        stop_ids=row.stop_ids,
    )


@STAGES
@settings(max_examples=EXAMPLES, deadline=None)
@given(batches())
def test_the_result_equals_the_formula_in_fp64(stage, batch):
    logits_RV, profiles, rows = batch
    divisor_R1 = torch.tensor([row.divisor for row in rows], dtype=torch.float64)[:, None]
    given_RV = (logits_RV.double() / divisor_R1).float()
    after_RV, style_stats_RF = restyle(stage, profiles, rows, given_RV)
    for r, row in enumerate(rows):
        arrived_V = (given_RV[r].double() * divisor_R1[r]).numpy()
        expected = expected_of(row, profiles[row.style.profile], arrived_V)
        largest = np.abs(np.where(np.isfinite(arrived_V), arrived_V, 0)).max()
        resolution = float(np.spacing(np.float32(largest))) / row.temperature
        if expected.margin < max(1e-4, 2 * resolution * row.temperature):
            continue
        got_V = after_RV[r].double() * row.divisor / row.temperature
        got_V = torch.log_softmax(got_V, dim=0).numpy()
        assert (np.isinf(got_V) == np.isinf(expected.log_p_V)).all()
        likely_V = expected.log_p_V > -25
        tolerance = max(LOG_PROBABILITY, 4 * resolution)
        kl, tilt_kl, held_back, strength = style_stats_RF[r].tolist()
        # A reduced strength is found by false position, so it is approximate.
        tolerance += 20 * abs(strength - expected.strength)
        np.testing.assert_allclose(got_V[likely_V], expected.log_p_V[likely_V], atol=tolerance)
        assert kl == pytest.approx(expected.kl, abs=NATS)
        assert tilt_kl == pytest.approx(expected.tilt_kl, abs=NATS)
        assert tilt_kl <= row.style.max_kl + 1e-3
        assert held_back == pytest.approx(expected.held_back, abs=NATS)
        assert strength == pytest.approx(expected.strength, abs=0.01)


@STAGES
@settings(max_examples=EXAMPLES, deadline=None)
@given(batches())
def test_stop_tokens_infinities_and_the_support_of_the_guard_are_kept(stage, batch):
    logits_RV, profiles, rows = batch
    for row in rows:
        row.divisor = 1.0
    after_RV, _ = restyle(stage, profiles, rows, logits_RV)
    assert not after_RV.isnan().any()
    for r, row in enumerate(rows):
        stops = [v for v in row.stop_ids if v < logits_RV.shape[1]]
        peak = logits_RV[r].max()
        kept_V = logits_RV[r] >= peak + log_guard_of(row)
        near_V = (logits_RV[r] - peak - log_guard_of(row)).abs() < 1e-3 + 1e-6 * peak.abs()
        kept_V[stops] = logits_RV[r, stops] > -torch.inf
        near_V[stops] = False
        finite_V = after_RV[r] > -torch.inf
        assert ((finite_V == kept_V) | near_V).all()
        assert finite_V.any()
        assert torch.equal(after_RV[r, stops], logits_RV[r, stops])
        if finite_V.equal(kept_V) and stops and logits_RV[r].abs().nan_to_num(posinf=0).max() < 50:
            guarded_V = torch.where(kept_V, logits_RV[r].double(), -torch.inf) / row.temperature
            before_V = torch.softmax(guarded_V, dim=0)
            after_V = torch.softmax(after_RV[r].double() / row.temperature, dim=0)
            torch.testing.assert_close(after_V[stops], before_V[stops], atol=1e-6, rtol=1e-3)


@STAGES
def test_a_style_without_effect_leaves_the_bits_of_every_kept_token(stage):
    """λ = 0 and δ = 0 at any strength, or any profile at strength 0."""
    logits_RV = make_rows(sorted(KINDS), 257, seed=3)
    idle = toy_profile([(0, 1)], {}, 257)
    for profile, strength in ((idle, 1.0), (idle, 0.3), (random_profile(5, 257), 0.0)):
        rows = [Row([0], strength=strength, temperature=0.7) for _ in logits_RV]
        after_RV, style_stats_RF = restyle(stage, [profile], rows, logits_RV)
        kept_RV = after_RV > -torch.inf
        assert torch.equal(after_RV[kept_RV], logits_RV[kept_RV])
        assert kept_RV.any(dim=1).all()
        assert not style_stats_RF[:, :3].any()


@STAGES
def test_rows_without_a_style_and_invalid_ones_keep_their_bits(stage):
    logits_RV = make_rows(["gaussian"] * 5, 64, seed=1)
    logits_RV[3, 7] = torch.nan
    logits_RV[4] = -torch.inf
    rows = [Row([0, 1]) for _ in logits_RV]
    after_RV, style_stats_RF = restyle(
        stage, [random_profile(1, 64)], rows, logits_RV, without=(1,)
    )
    is_same = [
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(after_RV, logits_RV, strict=True)
    ]
    assert is_same == [False, True, False, True, True]
    assert style_stats_RF.any(dim=1).tolist() == [True, False, True, False, False]


@STAGES
@pytest.mark.parametrize("lead", [0.0, 8.0, 50.0])
def test_content_far_below_a_stop_token_has_no_nan(stage, lead):
    """At a low temperature its share of the probability underflows to 0."""
    stop, profile = 7, random_profile(5, 64)
    row_V = make_rows(["gaussian"], 64, seed=2)[0]
    row_V[stop] = row_V.max() + lead
    rows = [
        Row(
            [0, 1],
            max_kl=max_kl,
            temperature=temperature,
            divisor=divisor,
            stop_ids=frozenset({stop}),
            diversity=parse({"law": "guard", "min_p": 1e-30}),
        )
        for temperature in (0.01, 2.0)
        for divisor in (1.0, temperature)
        for max_kl in (0.0, 0.05)
    ]
    logits_RV = torch.stack([row_V / row.divisor for row in rows])
    after_RV, style_stats_RF = restyle(stage, [profile], rows, logits_RV)
    expected_RV, expected_RF = restyle(PlainStyleStage, [profile], rows, logits_RV)
    assert not after_RV.isnan().any()
    assert torch.equal(after_RV > -torch.inf, expected_RV > -torch.inf)
    # Without the strength, which is undetermined where the divergence is 0 but for rounding.
    torch.testing.assert_close(style_stats_RF[:, :3], expected_RF[:, :3], atol=NATS, rtol=1e-3)
    is_content_V = torch.arange(64) != stop
    for r, row in enumerate(rows):
        got_V, expected_V = (
            torch.log_softmax(each_RV[r, is_content_V].double() * row.divisor / row.temperature, 0)
            for each_RV in (after_RV, expected_RV)
        )
        likely_V = expected_V > -10
        torch.testing.assert_close(
            got_V[likely_V], expected_V[likely_V], atol=LOG_PROBABILITY, rtol=0
        )


@not_interpreted
@STAGES
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_divergence_of_a_tilt_grows_with_its_strength(stage, seed):
    profile = random_profile(seed, 64)
    tilt = toy_profile([(0,)], {}, 64, profile.unigram_V)
    row_RV = make_rows(["gaussian"], 64, seed)
    costs = []
    for strength in np.linspace(0, 1, 6).tolist():
        _, style_stats_RF = restyle(stage, [tilt], [Row([1], strength=strength)], row_RV)
        costs.append(style_stats_RF[0, 1].item())
    assert (np.diff(costs) >= -1e-5).all()


@STAGES
def test_the_context_of_a_draft_includes_the_drafts_before_it(stage):
    """The state depends on the answer alone, not on the prompt, at any length."""
    profile = random_profile(11, 17)
    source = np.random.default_rng(2)
    for drafts in (0, 1, 3):
        texts = [source.integers(0, 4, n).tolist() for n in (4, 5, 12)]
        rows = [Row(text, prompt=[0, 1, 2, 3], drafts=drafts) for text in texts]
        logits_RV = make_rows(["gaussian"] * (3 * (1 + drafts)), 17, seed=drafts)
        after_RV, _ = restyle(stage, [profile], rows, logits_RV)
        for r in range(len(logits_RV)):
            row = rows[r // (1 + drafts)]
            text = row.text[: len(row.text) - drafts + r % (1 + drafts)]
            expected = expected_of(Row(text, prompt=row.prompt), profile, logits_RV[r].numpy())
            got_V = torch.log_softmax(after_RV[r].double(), 0).numpy()
            likely_V = expected.log_p_V > -25
            np.testing.assert_allclose(got_V[likely_V], expected.log_p_V[likely_V], atol=1e-3)


@STAGES
@pytest.mark.parametrize("drafts", [0, 2])
def test_the_mean_divergence_of_the_tilt_stays_within_its_bound(stage, drafts):
    """Over answers of some hundred tokens, with rows from flat to peaky. There are no false alarms:
    the bound holds for any rows and any number of accepted drafts."""
    bounds, answers = (0.01, 0.05, 0.2), 3
    profile = random_profile(4, 64, tilt=4.0)
    source = np.random.default_rng(9)
    tables = StyleTables.of([profile])
    stage, slots = stage(tables), SLOTS(answers, 1 + drafts, "cpu")
    backend = TritonBackend("cpu") if INTERPRETED else TorchBackend("cpu")
    for s in range(answers):
        slots.open(s)
    position, means = [0] * answers, []
    for at in range(8 if INTERPRETED else 120):  # With fewer, an answer may get peaky rows only.
        kinds = [str(source.choice(["flat", "gaussian", "few", "peaky"])) for _ in bounds]
        rows = [
            Row(source.integers(0, 4, 6 + drafts).tolist(), max_kl=b, drafts=drafts) for b in bounds
        ]
        step = step_of(rows)
        offset_R = step.offset_R.long()
        positions_R = torch.tensor(position)[step.slot_R] + offset_R
        logits_RV = make_rows([kind for kind in kinds for _ in range(1 + drafts)], 64, at)
        step = Step(step.controls, step.slot_R, positions_R, step.offset_R, texts=step.texts)
        transform_step(logits_RV, step, slots, backend, stage)
        position = [each + int(source.integers(1, 2 + drafts)) for each in position]
    for s, bound in enumerate(bounds):
        statistics = slots.read(s)
        means.append((statistics.sums_F[TILT_KL] / statistics.sums_F[COUNT]).item())
        assert means[s] <= bound + 1e-3
        assert statistics.sums_F[KL] > 0
    assert INTERPRETED or means[0] > 0.008, "the bound was never met"


@not_interpreted
def test_the_law_keeps_the_support_and_the_stop_tokens_of_the_style():
    """Without a level, the law does not change the styled row; with one, it flattens the rest."""
    profile, logits_RV = random_profile(7, 64), make_rows(["gaussian", "zipf"], 64, seed=2)
    for diversity in (OFF, parse(0.8), parse({"law": "dynatemp", "dynatemp_range": 0.5})):
        rows = [Row([0, 1], diversity=diversity, stop_ids=frozenset({3})) for _ in logits_RV]
        styled_RV, style_stats_RF = restyle(PlainStyleStage, [profile], rows, logits_RV)
        backend, after_RV, slots = TorchBackend("cpu"), logits_RV.clone(), Slots(2, 1, "cpu")
        stage = PlainStyleStage(StyleTables.of([profile]))
        transform_step(after_RV, step_of(rows), slots, backend, stage)
        p_RV, q_RV = styled_RV.softmax(dim=1), after_RV.softmax(dim=1)
        assert torch.equal(p_RV > 0, q_RV > 0)
        torch.testing.assert_close(p_RV[:, 3], q_RV[:, 3], atol=1e-6, rtol=1e-4)
        assert torch.allclose(p_RV, q_RV, atol=1e-5) == diversity.is_off
        assert torch.equal(slots.read(1).waiting_KF[0, KL:], style_stats_RF[1])


@not_interpreted
@settings(max_examples=EXAMPLES, deadline=None)
@given(batches())
def test_a_law_on_the_listed_tokens_equals_the_law_on_the_whole_row(batch):
    logits_RV, profiles, rows = batch
    stage, step, count = NumbaStyleStage(StyleTables.of(profiles)), step_of(rows), len(rows)
    style_stats_RF = stage(logits_RV, step, NumbaSlots(count, 1, "cpu"))
    for r in range(count):
        listed_L = listed(stage, r)
        assert not listed_L or listed_L == (logits_RV[r] > -math.inf).nonzero().flatten().tolist()
    whole_RV, few_RV = logits_RV.clone(), logits_RV.clone()
    for finite_tokens, after_RV in ((None, whole_RV), (stage.finite_tokens, few_RV)):
        law_step = replace(step, style_stats_RF=style_stats_RF, finite_tokens=finite_tokens)
        NumbaBackend("cpu").step(after_RV, law_step, NumbaSlots(count, 1, "cpu"))
    torch.testing.assert_close(few_RV, whole_RV, atol=1e-4, rtol=1e-4, equal_nan=True)


@not_interpreted
def test_a_law_after_the_kernel_neither_reads_nor_writes_cut_tokens():
    rows = [Row([0, 1], diversity=parse(0.5), stop_ids=frozenset({3})) for _ in range(2)]
    logits_RV = 5.0 * torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    stage, step = NumbaStyleStage(StyleTables.of([random_profile(7, 64)])), step_of(rows)
    style_stats_RF = stage(logits_RV, step, NumbaSlots(2, 1, "cpu"))
    cut_RV = logits_RV == -math.inf
    assert [len(listed(stage, r)) for r in range(2)] == (~cut_RV).sum(dim=1).tolist()
    logits_RV[cut_RV] = math.nan
    law_step = replace(step, style_stats_RF=style_stats_RF, finite_tokens=stage.finite_tokens)
    statistics = NumbaBackend("cpu").step(logits_RV, law_step, NumbaSlots(2, 1, "cpu"))
    assert statistics.valid_R.all()
    assert torch.equal(logits_RV.isnan(), cut_RV)


def listed(stage, r):
    token_N, start_R = stage.finite_tokens
    return sorted(token_N[start_R[r] : start_R[r + 1]].tolist())


@not_interpreted
def test_a_stage_that_disagrees_with_plain_torch_is_not_used(monkeypatch, caplog):
    class Wrong(PlainStyleStage):
        def __call__(self, logits_XV, step, slots):
            style_stats_RF = super().__call__(logits_XV, step, slots)
            logits_XV[3] += 0.1
            return style_stats_RF

    profiles = [random_profile(3, 64)]
    assert isinstance(get_style_stage("cpu", profiles), NumbaStyleStage)
    monkeypatch.setattr("dftserve.sampling.backends._preferred_stage", lambda device: Wrong)
    assert type(get_style_stage("cpu", profiles)) is PlainStyleStage
    assert "disagrees" in caplog.text


@not_interpreted
def test_texts_without_a_stage_are_refused():
    step, backend = step_of([Row([0])]), TorchBackend("cpu")
    with pytest.raises(ValueError, match="texts: got some, and no style stage"):
        transform_step(torch.zeros(1, 8), step, Slots(1, 1, "cpu"), backend)


@not_interpreted
@STAGES
def test_a_phrase_gets_its_human_rate_and_nothing_else_changes(stage):
    """Rates of a Markov chain after the stage, with one row for each pair of tokens."""
    chain = Chain()
    before = chain.rates(chain.p_UUV)
    profile = chain.profile(before[0])
    texts = [[u1, u2] for u1 in range(chain.V) for u2 in range(chain.V)]
    widest = Diversity(level=0.0, min_p=1e-9)
    logits_RV = torch.tensor(np.log(chain.p_UUV)).reshape(-1, chain.V).float()
    phrase_rate = {}
    for strength in (1.0, 0.5):
        rows = [Row(text, diversity=widest, strength=strength) for text in texts]
        after_RV, style_stats_RF = restyle(stage, [profile], rows, logits_RV)
        q_UUV = after_RV.double().softmax(dim=1).reshape(chain.p_UUV.shape).numpy()
        phrase_rate[strength], orphan, innocent = chain.rates(q_UUV)
        pairs_UU = chain.stationary(q_UUV)
        kl, _, held_back, _ = (pairs_UU.reshape(-1, 1) * style_stats_RF.numpy()).sum(axis=0)
        assert orphan == pytest.approx(before[1], rel=0.05)
        assert innocent == pytest.approx(before[2], rel=0.05)
        assert kl < 0.006
        avoided = before[0] - phrase_rate[strength]
        assert 1000 * held_back == pytest.approx(0.9 * avoided, rel=0.1)
    assert before[0] == pytest.approx(10 * chain.HUMAN, rel=0.1)
    assert 0.54 <= phrase_rate[1.0] <= 0.66
    assert phrase_rate[0.5] == pytest.approx((before[0] + chain.HUMAN) / 2, rel=0.1)


@pytest.mark.long
@not_interpreted
def test_the_triton_kernel_passes_the_same_tests_interpreted():
    assert "10 passed" in interpreted.run(__file__)
