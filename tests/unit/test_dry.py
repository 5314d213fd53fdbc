"""DRY: the penalties against a naive search in fp64, their effect on the rows, and the path from a
request to the runners."""

import itertools
import json
import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch.utils._python_dispatch import TorchDispatchMode

from dftserve import spec
from dftserve.sampling import Controls, Step, Texts, control_row, transform_step
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.sampling.dry import (
    Breakers,
    DryControls,
    SlotRepeats,
    TextRepeats,
    together,
)
from dftserve.sampling.dry import on_device as on_device_module
from dftserve.sampling.dry import stage as stage_module
from dftserve.sampling.dry.repeats import HISTORY, LONGEST_MATCH, MAX_PENALTY
from dftserve.sampling.staging import PinnedStaging
from dftserve.sampling.step import Penalties
from tests.cpu_time import without_garbage_collection
from tests.dry_reference import dry_reference, penalties_reference
from tests.reference import reference
from tests.rows import KINDS, make_rows

V = 40
BREAKERS = frozenset({3, 7})
BREAKS_V = np.array([v in BREAKERS for v in range(V)])
TEXTS = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.lists(st.integers(0, 1), min_size=1, max_size=200),
    st.lists(st.integers(4, 6), min_size=1, max_size=120),
)
NUMBERS = st.fixed_dictionaries(
    {
        "multiplier": st.floats(0.1, 5),
        "base": st.sampled_from([1.0, 1.02, 1.75, 4.0]),
        "allowed_length": st.integers(1, 6) | st.just(LONGEST_MATCH),
    }
)


def controls(breaks_V=BREAKS_V, **numbers) -> DryControls:
    given_numbers = {"multiplier": 0.8, "base": 1.75, "allowed_length": 2} | numbers
    return DryControls(**given_numbers, breaks_V=breaks_V)


def on_host(text, dry: DryControls) -> dict[int, float]:
    return as_dict(TextRepeats([], dry).after(text))


def as_dict(found) -> dict[int, float]:
    return dict(zip(*(each.tolist() for each in found), strict=True))


def on_device(texts, rows: list[DryControls | None], drafts=0) -> list[dict]:
    """Several rows at once; the last `drafts` tokens of each text are not yet in its buffer."""
    width = max(map(len, texts)) + 3
    tokens_SL = torch.full((len(texts), width), 5, dtype=torch.int32)
    for slot, text in enumerate(texts):
        tokens_SL[slot, : len(text) - drafts] = torch.tensor(text[: len(text) - drafts])
    row_R = [(s, d) for s in range(len(texts)) for d in range(drafts + 1)]
    at_R = torch.tensor([len(texts[s]) - 1 - drafts + d for s, d in row_R])
    input_R = torch.tensor([texts[s][at] for (s, _), at in zip(row_R, at_R, strict=True)])
    repeats = SlotRepeats(len(texts), "cpu")
    for slot, dry in enumerate(rows):
        if dry is not None:
            repeats.put(slot, dry)
    slots = np.flatnonzero(repeats.has(np.arange(len(texts))))
    parts = repeats.penalties(
        Texts(tokens_SL, torch.zeros(len(texts), dtype=torch.int32), at_R, input_R.int()),
        torch.tensor([s for s, _ in row_R]),
        torch.tensor([d for _, d in row_R], dtype=torch.int32),
        slots=slots,
        most_rows=min(len(slots) * (drafts + 1), len(row_R)),
        longest_text=max(len(texts[slot]) for slot in slots),
    )
    found = [{} for _ in row_R]
    for part in parts:
        each = zip(part.place_P.tolist(), part.token_PK, part.nats_PK, strict=True)
        for place, token_K, nats_K in each:
            for token, nats in zip(token_K.tolist(), nats_K.tolist(), strict=True):
                if nats > 0:
                    found[place][token] = max(found[place].get(token, 0), nats)
    return found


@settings(max_examples=150)
@given(text=TEXTS, numbers=NUMBERS, breaks=st.booleans())
def test_penalties_match_a_naive_search(text, numbers, breaks):
    dry = controls(BREAKS_V if breaks else np.zeros(1, bool), **numbers)
    expected = penalties_reference(text, breakers=BREAKERS if breaks else (), **numbers)
    assert on_host(text, dry) == pytest.approx(expected, rel=1e-5)
    assert on_device([text, [1, 2, 1]], [dry, None])[0] == pytest.approx(expected, rel=1e-4)


@settings(max_examples=60)
@given(
    text=TEXTS,
    numbers=NUMBERS,
    prompt=st.integers(0, 40),
    steps=st.lists(st.integers(-6, 20), max_size=12),
)
def test_penalties_follow_an_output_that_grows_and_shrinks(text, numbers, prompt, steps):
    """vLLM removes tokens from the engine's own list after a failed KV cache load."""
    text, output = text * 3, []
    prompt, rest = text[:prompt], text[prompt:]
    repeats = TextRepeats(prompt, controls(**numbers))
    for step in steps:
        if step < 0:
            del output[step:]
            rest = rest[::-1]  # The text continues with other tokens.
        else:
            output += rest[len(output) : len(output) + step]
        expected = penalties_reference(prompt + output, breakers=BREAKERS, **numbers)
        assert as_dict(repeats.after(output)) == pytest.approx(expected, rel=1e-5)


def test_only_the_last_history_tokens_count():
    """Each step's penalties are those of the whole text's last `HISTORY` tokens."""
    random = np.random.default_rng(0)
    block = random.integers(4, 9, 40).tolist()
    text = [*random.integers(4, 9, HISTORY + 660).tolist(), *block, *block[:-1]]
    dry = controls(allowed_length=5, base=1.1)
    grown = TextRepeats(text[:5], dry)
    numbers = {"multiplier": 0.8, "base": 1.1, "allowed_length": 5}
    for end in (400, HISTORY - 1, HISTORY + 100, HISTORY + 101, len(text) - 1, len(text)):
        found = as_dict(grown.after(text[5:end]))
        expected = penalties_reference(text[:end], breakers=BREAKERS, **numbers)
        assert found == on_host(text[:end], dry) == pytest.approx(expected, rel=1e-5)
    # A match is too short if it begins before the last `HISTORY` tokens.
    edge = [4, 5, 6] + [8] * (HISTORY - 3) + [4, 5]
    assert on_host(edge, controls()) == {}


def test_a_text_of_one_repeated_token_takes_no_more_work(monkeypatch):
    """Counted in C calls, none of which handles more than the last `HISTORY` tokens."""

    def work(text):
        repeats = TextRepeats(text[:-1], controls(np.zeros(1, bool), base=1.01))
        repeats.after([])
        calls = 0

        def count(frame, event, arg):
            nonlocal calls
            calls += event == "c_call"

        with without_garbage_collection():
            sys.setprofile(count)
            try:
                assert len(repeats.after(text[-1:])[0]) == (text[-1] == text[-2])
            finally:
                sys.setprofile(None)
        return calls

    assert work([9] * 3000) == work(list(range(10, 3010))) == work([9] * 30)


def test_the_text_of_a_row_includes_the_drafts_before_it():
    text = [5, 6, 8, 9, 4, 5, 6, 8, 9]
    numbers = {"multiplier": 0.8, "base": 1.75, "allowed_length": 2}
    rows = on_device([text, text[::-1]], [controls(), controls()], drafts=2)
    expected = [
        penalties_reference(whole[: len(whole) - 2 + d], breakers=BREAKERS, **numbers)
        for whole in (text, text[::-1])
        for d in range(3)
    ]
    assert rows == [pytest.approx(each) for each in expected]
    assert any(expected)


def test_penalties_do_not_depend_on_the_split_of_a_step_into_parts(monkeypatch):
    random = np.random.default_rng(1)
    texts = [random.integers(4, 7, size).tolist() for size in (9, 30, 17, 30)]
    rows = [controls(), None, controls(multiplier=2.0), controls(np.zeros(1, bool))]
    whole = on_device(texts, rows, drafts=2)
    monkeypatch.setattr(on_device_module, "ELEMENTS", 2 * 30)
    assert on_device(texts, rows, drafts=2) == whole
    assert sum(map(bool, whole)) > 6


def test_each_row_has_its_own_breakers_and_rows_without_dry_no_penalties():
    text = [5, 6, 3, 5, 6]
    none, all_of_them = np.zeros(1, bool), np.ones(V, bool)
    rows = [controls(none), None, controls(all_of_them), controls(BREAKS_V)]
    assert on_device([text] * 4, rows) == [{3: pytest.approx(0.8)}, {}, {}, {}]


@pytest.mark.parametrize(
    "numbers",
    [
        {"multiplier": 5.0, "base": 4.0, "allowed_length": 1},
        {"multiplier": 0.01, "base": 1.0, "allowed_length": 64},
        {"multiplier": 0.01, "base": 1.02},
    ],
)
def test_penalties_are_bounded_and_constant_beyond_the_longest_match(numbers):
    dry = controls(np.zeros(1, bool), **numbers)
    assert on_host([6] * 500, dry)[6] <= MAX_PENALTY
    assert dry.penalty(dry.longest) == dry.penalty(LONGEST_MATCH)
    assert dry.longest == dry.allowed_length or dry.penalty(dry.longest - 1) < dry.penalty(
        LONGEST_MATCH
    )


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────

STOPS = frozenset({1, 2})


def transformed(row_V, diversity, nats, *, temperature=1.0, divisor=1.0, stops=STOPS):
    """Log-probabilities that a row is sampled from."""
    logits_XV = (torch.as_tensor(row_V).float() / divisor)[None].clone()
    row = control_row(diversity, temperature=temperature, logits_divisor=divisor, stop_ids=stops)
    token_PK, nats_PK = together(
        [(np.array(list(nats), np.int64), np.array(list(nats.values()), np.float32))]
    )
    zero_R = torch.zeros(1, dtype=torch.int64)
    given_penalties = (Penalties(torch.tensor(token_PK), torch.tensor(nats_PK), zero_R),)
    step = Step(Controls.stack([row]), zero_R, zero_R, zero_R.int(), penalties=given_penalties)
    backend = TorchBackend()
    transform_step(logits_XV, step, backend.create_slots(1, 1), backend)
    return torch.log_softmax(logits_XV[0].double() * divisor / temperature, 0).numpy()


@settings(max_examples=80)
@given(
    kind=st.sampled_from(sorted(set(KINDS) - {"far apart"})),
    seed=st.integers(0, 10**6),
    level=st.floats(0.05, 1.0),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    divided=st.booleans(),
)
def test_the_law_is_applied_to_the_penalised_row(kind, seed, level, temperature, divided):
    logits_V = make_rows([kind], 64, seed)[0].double().numpy()
    order = np.argsort(-logits_V)
    nats = {int(order[0]): 7.0, int(order[2]): 0.5, 1: 3.0, 63: 100.0}
    log_guard = math.log(0.05) + math.log(0.4) * level

    def margin_of_guard(weights_V) -> float:
        """The smallest distance of a token from the guard that decides how far stops move."""
        content_N = np.delete(weights_V, sorted(STOPS))
        content_N = content_N[np.isfinite(content_N)]
        if not len(content_N):
            return math.inf
        tops = (content_N.max(), weights_V[np.isfinite(weights_V)].max())
        return min(np.abs(content_N - top - log_guard).min() for top in tops)

    row_V = dry_reference(
        logits_V, nats, temperature=temperature, log_guard=log_guard, stop_ids=STOPS
    )
    expected = reference(row_V, temperature=temperature, level=level, stop_ids=STOPS)
    got_V = transformed(
        logits_V,
        spec.parse(level),
        nats,
        temperature=temperature,
        divisor=temperature if divided else 1.0,
    )
    # Logits near 1e4 have steps of .001 in float32: the penalised one, the row that the law writes,
    # and its division by the temperature are each rounded.
    step = np.finfo(np.float32).eps * np.abs(logits_V[np.isfinite(logits_V)]).max()
    margins = (expected.margin, margin_of_guard(logits_V), margin_of_guard(row_V))
    if min(margins) < 1e-3 + 2 * step:
        return
    likely_V = expected.log_p_V > -20
    tolerance = 5e-3 + 4 * step / temperature
    assert np.abs(got_V[likely_V] - expected.log_p_V[likely_V]).max() < tolerance
    assert (np.isinf(got_V) >= np.isinf(logits_V)).all()


@pytest.mark.parametrize(
    "diversity",
    [
        {"level": 0.5},
        {"law": "guard", "min_p": 0.1},
        {"law": "xtc", "xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"law": "top_n_sigma", "n_sigma": 2.0},
        {"dry_multiplier": 1.0},
    ],
)
def test_dry_does_not_change_the_probabilities_of_stop_tokens(diversity):
    """The looping token is far ahead of the stop tokens: its probability goes to other content."""
    logits_V = np.full(64, -3.0)
    logits_V[[10, 11, 12, 1, 2]] = [9.0, 6.0, 5.9, 5.5, 4.0]
    without_V = transformed(logits_V, spec.parse(diversity), {})
    with_V = transformed(logits_V, spec.parse(diversity), {10: 12.0, 1: 50.0})
    assert with_V[[1, 2]] == pytest.approx(without_V[[1, 2]], abs=1e-4)
    assert with_V[10] < without_V[10] - 5


def test_dry_without_a_law_only_subtracts_the_penalties():
    logits_V = make_rows(["few"], 64, 5)[0].numpy()
    got_V = transformed(logits_V, spec.parse({"dry_multiplier": 1}), {9: 2.0}, stops=frozenset())
    expected_V = torch.tensor(logits_V).double()
    expected_V[9] -= 2.0
    assert got_V == pytest.approx(torch.log_softmax(expected_V, 0).numpy(), abs=1e-4)


def test_rows_without_effective_penalties_and_invalid_rows_keep_their_bits():
    """Penalties of zero, a row with NaN, and a token id outside the vocabulary."""
    from dftserve.sampling.dry import penalise

    rows_XV = make_rows(["gaussian"] * 3, 64, 3)
    rows_XV[1, 5] = torch.nan
    before_XV = rows_XV.clone()
    row = control_row(spec.parse(0.5), temperature=1.0, logits_divisor=1.0, stop_ids=STOPS)
    place_R = torch.arange(3)
    found = Penalties(
        torch.tensor([[0, 9], [9, 9], [0, 99]]),
        torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 5.0]]),
        place_R,
    )
    step = Step(Controls.stack([row] * 3), place_R, place_R, place_R.int(), penalties=(found,))
    penalise(rows_XV, step, found, TorchBackend().constants)
    assert torch.equal(rows_XV.view(torch.int32), before_XV.view(torch.int32))


@pytest.mark.parametrize(
    "diversity",
    [
        {"level": 0.5},
        {"dry_multiplier": 1},
        {"law": "guard", "min_p": 0.01},
        {"law": "top_n_sigma", "n_sigma": 1.0},
    ],
)
def test_the_sparse_rewrite_of_a_cpu_matches_the_dense_one_of_a_device(monkeypatch, diversity):
    """Rows of all kinds, one with NaN; penalties for the most likely token given twice, for a stop
    token and for an id outside the vocabulary."""
    wide = 1 << 14
    kinds = sorted(KINDS)
    rows_RV = make_rows(kinds, wide, 4)
    rows_RV[0, 17] = torch.nan
    place_R = torch.arange(len(kinds))
    top_R = rows_RV[:, 3:].nan_to_num(-1e9).argmax(dim=1) + 3
    token_RK = torch.stack([top_R, top_R, *[torch.full_like(top_R, t) for t in (1, 9, wide)]], 1)
    nats_RK = torch.tensor([[1.0, 4.0, 50.0, 2.0, 3.0]]).repeat(len(kinds), 1)
    row = control_row(spec.parse(diversity), temperature=0.8, logits_divisor=0.8, stop_ids=STOPS)
    step = Step(Controls.stack([row] * len(kinds)), place_R, place_R, place_R.int())
    found = Penalties(token_RK, nats_RK, place_R)
    by_few_RV, whole_RV = rows_RV.clone(), rows_RV.clone()
    stage_module.penalise(by_few_RV, step, found, TorchBackend().constants)
    monkeypatch.setattr(stage_module, "_is_on_host", lambda logits_XV: False)
    stage_module.penalise(whole_RV, step, found, TorchBackend().constants)
    assert torch.allclose(by_few_RV, whole_RV, atol=2e-5, equal_nan=True)
    assert (by_few_RV != rows_RV).sum() > len(kinds)


def test_temporary_tensors_on_a_cpu_do_not_grow_with_the_vocabulary():
    wide, place_R = 1 << 14, torch.arange(3)
    rows_RV = torch.randn(3, wide, generator=torch.Generator().manual_seed(0)) * 5
    row = control_row(spec.parse(0.5), temperature=0.8, logits_divisor=0.8, stop_ids=STOPS)
    step = Step(Controls.stack([row] * 3), place_R, place_R, place_R.int())
    found = Penalties(torch.full((3, 1), 9), torch.ones(3, 1), place_R)
    with Largest() as largest:
        stage_module.penalise(rows_RV, step, found, TorchBackend().constants)
    assert largest.elements < wide // 20


# ── Breakers ─────────────────────────────────────────────────────────────────────────────────────

WORDS = ["\n", "\n\n", ":", "):", " Char", "lotte", "a", "é", "<end>"]


def breakers() -> Breakers:
    pieces = [None if word == "<end>" else word.encode() for word in WORDS]
    return Breakers(pieces, lambda text: [4, 5] if text == "Charlotte" else [])


@pytest.mark.parametrize(
    ("texts", "broken"),
    [
        (("\n",), {"\n", "\n\n", "<end>"}),
        ((":",), {":", "):", "<end>"}),
        (("é", "\n\n"), {"é", "\n\n", "<end>"}),
        (("Charlotte",), {"lotte", "<end>"}),
        (("not there",), {"<end>"}),
        ((), set()),
    ],
)
def test_breaker_tokens_are_those_whose_text_contains_a_breaker(texts, broken):
    found_V = breakers().tokens(texts)
    assert {WORDS[v] for v in np.flatnonzero(found_V)} == broken


def test_each_breaker_text_is_searched_once_whatever_the_order(monkeypatch):
    found = breakers()
    searched = []
    containing = found._containing

    def recording(text):
        searched.append(text)
        return containing(text)

    monkeypatch.setattr(found, "_containing", recording)
    letters = ("\n", ":", "a", "Charlotte")
    masks = [found.tokens(order) for order in itertools.permutations(letters)]
    assert all(mask is masks[0] for mask in masks)
    found.tokens(("a", "b"))
    found.tokens(("b", ":", "\n"))
    assert sorted(searched) == sorted(text.encode() for text in (*letters, "b"))


def test_only_new_breaker_sets_and_changed_slots_are_sent_to_the_device(monkeypatch):
    """Also after slots were cleared: each request finds its own set, not the former one of a
    reused row."""
    staging = PinnedStaging("cpu")
    sent = []
    send = staging.to_device

    def recording(values):
        sent.append(values.nbytes)
        return send(values)

    monkeypatch.setattr(staging, "to_device", recording)
    wide = 8 * 1000
    masks = [np.arange(wide) == v for v in range(12)]
    repeats = SlotRepeats(9, "cpu", staging)

    def step():
        """The number of bytes sent."""
        sent.clear()
        sets = repeats._on_device()
        rows_S = sets.numbers_SC[:, on_device_module.SET].long()
        for slot in np.flatnonzero(repeats.has(np.arange(9))):
            token_W = torch.arange(wide)[None]
            broken_W = on_device_module._breaks(token_W, sets.breaks_BX, rows_S[slot : slot + 1])[0]
            assert torch.equal(broken_W, torch.from_numpy(mask_of_slot[slot]))
        return sum(sent)

    mask_of_slot = {}
    for slot in range(8):
        mask_of_slot[slot] = masks[slot]
        repeats.put(slot, controls(masks[slot]))
    assert 8 * 1000 <= step() < 9 * 1000
    assert step() == 0
    mask_of_slot[8] = masks[3]
    repeats.put(8, controls(masks[3]))
    assert 0 < step() < 200
    for slot in (1, 3, 5):
        repeats.clear(slot)
    mask_of_slot[1], mask_of_slot[3] = masks[10], masks[5]
    repeats.put(1, controls(masks[10]))
    repeats.put(3, controls(masks[5]))
    assert 1000 <= step() < 1500


def test_breakers_of_a_real_tokenizer():
    characters = {"Ċ": 0, "Ġthe": 1, "a": 2, "b": 3, ":": 4}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    found = Breakers.from_tokenizer(tokenizer)
    assert np.flatnonzero(found.tokens(("\n", ":"))).tolist() == [0, 4]
    assert np.flatnonzero(found.tokens(("ab",))).tolist() == [3]


# ── The request ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "parameter", "message"),
    [
        ({"dry_multipler": 0.8}, "diversity.dry_multipler", "did you mean 'dry_multiplier'"),
        ({"dry_base": 2}, "diversity.dry_multiplier", "got nothing"),
        ({"dry_multiplier": 5.1}, "diversity.dry_multiplier", "from 0 to 5"),
        ({"dry_multiplier": 1, "dry_base": 0.9}, "diversity.dry_base", "from 1 to 4"),
        (
            {"dry_multiplier": 1, "dry_allowed_length": 1.5},
            "diversity.dry_allowed_length",
            "a whole number from 1 to 64",
        ),
        (
            {"dry_multiplier": 1, "dry_sequence_breakers": "\n"},
            "diversity.dry_sequence_breakers",
            "a list of at most 32",
        ),
        (
            {"dry_multiplier": 1, "dry_sequence_breakers": [str(n) for n in range(33)]},
            "diversity.dry_sequence_breakers",
            "a list of at most 32",
        ),
        (
            {"dry_multiplier": 1, "dry_sequence_breakers": ["x" * 65]},
            "diversity.dry_sequence_breakers",
            "1 to 64 characters",
        ),
        ({"law": "words", "dry_multiplier": 1}, "diversity.level", "needs it"),
    ],
)
def test_wrong_values_are_refused(value, parameter, message):
    with pytest.raises(spec.DiversityError, match=message) as refused:
        spec.parse(value)
    assert refused.value.parameter == parameter


@pytest.mark.parametrize(
    "value",
    [
        {"dry_multiplier": 0.8},
        {"law": "budget", "target_entropy": 1.5, "dry_multiplier": 2, "dry_sequence_breakers": []},
        {"level": 0.3, "dry_multiplier": 1, "dry_base": 1, "dry_allowed_length": 64},
    ],
)
def test_the_object_form_round_trips(value):
    parsed = spec.parse(value)
    assert spec.parse_json(json.dumps(parsed.as_dict())) == parsed
    assert not parsed.is_off
    assert parsed.dry is not None


def test_a_multiplier_of_0_is_off():
    assert spec.parse({"dry_multiplier": 0}).is_off
    assert spec.parse({"level": 0.5, "dry_multiplier": 0}) == spec.parse(0.5)


# ── Engines ──────────────────────────────────────────────────────────────────────────────────────

ASKED = {"dry_multiplier": 2.0, "dry_sequence_breakers": []}
TEXT = [9, 10, 11, 12, 9, 10]


def logits() -> torch.Tensor:
    return torch.linspace(0, -4, 2 * 50).view(2, 50).clone()


def sampling_params(diversity=None):
    from vllm import SamplingParams

    carried = {"diversity": diversity, "diversity_id": "a"} if diversity else None
    return SamplingParams(temperature=0.5, extra_args=carried)


def check(rows_RV: torch.Tensor, divisor: float) -> None:
    """Token 11 of the first row lost 2 nats; the second row is unchanged."""
    expected_V = logits()[0] / divisor
    expected_V[11] -= 2.0 / divisor
    for row_V, wanted_V in zip(rows_RV, (expected_V, logits()[1] / divisor), strict=True):
        actual_V, wanted_V = torch.log_softmax(row_V, 0), torch.log_softmax(wanted_V, 0)
        assert torch.allclose(actual_V, wanted_V, atol=1e-4)


def test_v1_reads_the_prompt_and_the_output():
    from dftserve_vllm.v1 import V1Processor
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    from tests.vllm_config import config

    processor = V1Processor(config(), torch.device("cpu"), False)
    output = []
    added = [
        (0, sampling_params(ASKED), TEXT[:3], output),
        (1, sampling_params(), TEXT[:3], output),
    ]
    processor.update_state(BatchUpdate(2, removed=[], added=added, moved=[]))
    processor.apply(logits() / 0.5)  # Nothing repeats yet.
    output += TEXT[3:]
    rows_RV = logits() / 0.5
    processor.apply(rows_RV)
    check(rows_RV, 0.5)
    assert torch.equal(rows_RV[1], logits()[1] / 0.5)
    processor.update_state(BatchUpdate(1, removed=[0], added=[], moved=[]))
    assert not processor._repeats._by_slot
    assert processor.state.faults == 0


class V2:
    """Four slots of an engine, whose texts are in `tokens_SL`."""

    def __init__(self, drafts=0, length=6):
        from dftserve_vllm.v2 import V2Processor

        self.drafts = drafts
        self.tokens_SL = torch.zeros(4, length + 8, dtype=torch.int32)
        known = SimpleNamespace(np=np.full(4, 3), gpu=torch.full((4,), 3))
        states = SimpleNamespace(
            max_num_reqs=4,
            device=torch.device("cpu"),
            prefill_len=known,
            prompt_len=known,
            all_token_ids=SimpleNamespace(gpu=self.tokens_SL),
        )
        speculative = SimpleNamespace(num_speculative_tokens=drafts) if drafts else None
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=4), speculative_config=speculative
        )
        self.processor = V2Processor(config, states)

    def join(self, **diversities):
        for slot, diversity in diversities.items():
            self.processor.add_request(int(slot[1:]), sampling_params(diversity))
        self.processor.apply_staged_writes()

    def step(self, slots, rows_of, texts, rows_RV, watch=nullcontext):
        """`rows_of`: the number of rows of each request; all but its first are drafts from `texts`.
        Returns the context manager that `watch` makes, entered for the step only."""
        slot_R = torch.from_numpy(np.repeat(slots, rows_of))
        offset_R = torch.cat([torch.arange(rows) for rows in rows_of])
        ends = np.array([len(texts[slot]) for slot in slots])
        pos_R = torch.from_numpy(np.repeat(ends - rows_of, rows_of)) + offset_R
        for slot, rows in zip(slots, rows_of, strict=True):
            certain = texts[slot][: len(texts[slot]) - rows + 1]
            self.tokens_SL[slot, : len(certain)] = torch.tensor(certain)
        inputs = [texts[s][at] for s, at in zip(slot_R.tolist(), pos_R.tolist(), strict=True)]
        context = SimpleNamespace(
            idx_mapping_np=np.array(slots),
            expanded_idx_mapping=slot_R,
            expanded_local_pos=offset_R,
            pos=pos_R,
            input_ids=torch.tensor(inputs, dtype=torch.int32),
            seq_lens_upper_bound_np=np.pad(ends, (0, 3)),  # As for a larger CUDA graph.
        )
        with watch() as watching:
            self.processor.apply(rows_RV, context)
        assert self.processor.state.faults == 0
        return watching


def test_v2_reads_the_text_on_the_device():
    engine = V2()
    engine.join(s2=ASKED, s0=None)
    rows_RV = logits()
    engine.step([2, 0], [1, 1], {2: TEXT, 0: TEXT}, rows_RV)
    check(rows_RV * 2, 0.5)
    assert torch.equal(rows_RV[1], logits()[1])
    engine.join(s2=None)
    assert not engine.processor._repeats.has(np.array([2])).any()


def test_v2_rows_include_the_drafts_before_them():
    """Requests of one to three rows in mixed order; two have DRY, one of them with drafts. Each row
    loses what the naive search finds after its own text."""
    engine = V2(drafts=2)
    law = {"level": 0.5}
    engine.join(s0=law, s1=ASKED, s2=None, s3=ASKED)
    texts = {0: TEXT, 1: [*TEXT, 11, 12], 2: TEXT, 3: [5, 5, 5, 6, 5, 5]}
    slots, rows_of = [2, 1, 0, 3], [1, 3, 2, 1]
    before_RV = torch.linspace(0, -4, 7 * 50).view(7, 50)
    rows_RV = before_RV.clone()
    engine.step(slots, rows_of, texts, rows_RV)
    numbers = {"multiplier": 2.0, "base": 1.75, "allowed_length": 2}
    ends = {1: texts[1][:6], 2: texts[1][:7], 3: texts[1], 6: texts[3]}
    lost = {row: penalties_reference(text, **numbers) for row, text in ends.items()}
    assert all(lost.values())
    for row, nats in lost.items():
        expected_V = before_RV[row].clone()
        for token, each in nats.items():
            expected_V[token] -= each
        actual_V = torch.log_softmax(rows_RV[row] * 2, 0)
        assert torch.allclose(actual_V, torch.log_softmax(expected_V * 2, 0), atol=1e-4)
    assert torch.equal(rows_RV[0], before_RV[0])


class Largest(TorchDispatchMode):
    """The size in elements of the largest tensor that torch allocates while entered; views and
    in-place results do not count."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {memory_of(each) for each in args if isinstance(each, torch.Tensor)}
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(each, torch.Tensor) and memory_of(each) not in given:
                self.elements = max(self.elements, each.numel())
        return found


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr()


LONG = 6000


def largest_of_a_step(**diversities):
    """The size in elements of the largest tensor of a step with three drafts, one short text and
    three long ones; the rows have 50 logits each."""
    engine = V2(drafts=3, length=LONG)
    engine.join(**diversities)
    texts = {0: [7] * LONG, 1: TEXT * 4, 2: [7] * LONG, 3: [7] * LONG}
    rows_RV = torch.linspace(0, -4, 16 * 50).view(16, 50).clone()
    return engine.step([0, 1, 2, 3], [4, 4, 4, 4], texts, rows_RV, Largest).elements


def test_a_request_costs_only_its_own_rows_and_text():
    assert largest_of_a_step(s1=ASKED) < LONG


def test_no_tensor_of_a_step_is_larger_than_a_part(monkeypatch):
    monkeypatch.setattr(on_device_module, "ELEMENTS", 2 * LONG)
    monkeypatch.setattr(stage_module, "ELEMENTS", 2 * 50)
    assert LONG < largest_of_a_step(s0=ASKED, s1=ASKED, s2=ASKED, s3=ASKED) <= 2 * LONG


@pytest.mark.parametrize("parts", [1, 3])
def test_rows_are_rewritten_in_parts(monkeypatch, parts):
    """No tensor that the stage makes of six long rows is larger than a part."""
    wide, rows = 1 << 12, 6
    monkeypatch.setattr(stage_module, "ELEMENTS", wide * rows // parts)
    monkeypatch.setattr(stage_module, "_is_on_host", lambda logits_XV: False)
    rows_RV = torch.randn(rows, wide, generator=torch.Generator().manual_seed(0))
    place_R = torch.arange(rows)
    row = control_row(spec.parse(0.5), temperature=1.0, logits_divisor=1.0, stop_ids=STOPS)
    found = Penalties(torch.full((rows, 1), 9), torch.full((rows, 1), 2.0), place_R)
    step = Step(Controls.stack([row] * rows), place_R, place_R, place_R.int())
    whole_RV = rows_RV.clone()
    for part in found.split(1):
        stage_module.penalise(whole_RV, step, part, TorchBackend().constants)
    with Largest() as largest:
        stage_module.penalise(rows_RV, step, found, TorchBackend().constants)
    assert largest.elements <= wide * rows // parts
    assert torch.equal(rows_RV, whole_RV)


def test_transformers_rows_read_their_own_text():
    from dftserve.hf import DiversityProcessor

    processor = DiversityProcessor(ASKED, temperature=0.5)
    ids_RL = torch.tensor([TEXT, [9, 10, 11, 12, 11, 10]])
    check(processor(ids_RL, logits()) * 2, 0.5)
    with pytest.raises(ValueError, match="tokenizer"):
        DiversityProcessor({"dry_multiplier": 1})
