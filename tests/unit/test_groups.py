"""Texts of a group are drawn by arithmetic codes: each exactly, all of them evenly spread."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from dftserve.sampling import Controls, Step, control_row
from dftserve.sampling.group import GroupCodes, GroupRow, first_code, stage
from dftserve.spec import parse
from tests.group_reference import cut_reference, drawn_reference, first_code_reference

V, BITS = 24, 40.0
FALSE_ALARM = 1e-6
CPU = torch.device("cpu")
CONTROLS = Controls.stack(
    [control_row(parse(0.5), temperature=1.0, logits_divisor=1.0, stop_ids=frozenset())]
)


def step_of(slots, position, offsets=None, known=None):
    slot_R = torch.tensor(slots)
    offset_R = torch.tensor(offsets or [0] * len(slots), dtype=torch.int32)
    known_S = None if known is None else torch.tensor(known, dtype=torch.int32)
    return Step(CONTROLS, slot_R, position + offset_R.long(), offset_R, known_S=known_S)


def row_of(code, **fields):
    return GroupRow(code=float(code), **({"scale": 1.0, "bits": BITS} | fields))


def open_group(codes, **fields):
    group = GroupCodes(len(codes), 1, CPU)
    for slot, code in enumerate(codes):
        group.open(slot, row_of(code, **fields))
    return group


def draw(group, log_p_RV, step):
    """The drawn tokens; -1 for rows that keep their bits."""
    rows_RV = torch.as_tensor(log_p_RV).float().clone()
    before_RV = rows_RV.clone()
    group.draw(rows_RV, step, int(group.draws(step.slot_R.numpy()).sum()))
    tokens = []
    for before_V, after_V in zip(before_RV, rows_RV, strict=True):
        if torch.equal(before_V.nan_to_num(), after_V.nan_to_num()):
            tokens.append(-1)
            continue
        (token,) = torch.isfinite(after_V).nonzero().flatten().tolist()
        assert after_V[token] == 0
        assert torch.isfinite(before_V[token])
        tokens.append(token)
    return tokens


def log_rows(rows, seed=0, forbidden=0.3):
    """Random rows in which no two tokens are equally likely; some tokens are forbidden."""
    source = np.random.default_rng(seed)
    log_p_RV = source.normal(scale=2.0, size=(rows, V)).astype(np.float32)
    return np.where(source.random((rows, V)) < forbidden, -np.inf, log_p_RV)


def probabilities(log_p_V):
    p_V = np.exp(log_p_V.astype(float) - log_p_V.max())
    return p_V / p_V.sum()


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize(
    "cuts", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.7}]
)
def test_tokens_match_the_reference(monkeypatch, cuts, whole_rows):
    if whole_rows:  # As on a device, where the number of survivors is unknown to the host.
        tokens_V = torch.arange(V)
        monkeypatch.setattr(
            stage,
            "survivors",
            lambda rows, row_N: (rows[row_N].double(), tokens_V.expand(len(row_N), -1)),
        )
    codes = [first_code("some", index, 40) for index in range(40)]
    assert codes == [first_code_reference("some", index, 40) for index in range(40)]
    group = open_group(codes, **cuts)
    seen = set()
    for position in range(4):
        log_p_RV = log_rows(len(codes), seed=position)
        drawn = draw(group, log_p_RV, step_of(range(len(codes)), position))
        for row, log_p_V in enumerate(log_p_RV):
            cut_V = cut_reference(probabilities(log_p_V), **cuts)
            token, codes[row] = drawn_reference(cut_V, codes[row])
            assert drawn[row] == token, (position, row)
        seen |= set(drawn)
    assert len(seen) > 5


def test_a_row_is_scaled_before_the_draw():
    """On the V2 runner the engine divides by the temperature after the draw."""
    log_p_V = log_rows(1)[0]
    for code in np.linspace(0, 1, 9)[:-1]:
        token, _ = drawn_reference(probabilities(log_p_V / 0.5), code)
        group = GroupCodes(1, 1, CPU)
        group.open(0, row_of(code, scale=2.0))
        assert draw(group, log_p_V[None], step_of([0], 0)) == [token]


def test_the_joint_distribution_of_two_steps_is_exact():
    """Of M evenly spread codes, an interval of width w contains M·w, give or take one."""
    count = 4096
    first_V = probabilities(log_rows(1, seed=1)[0])
    then_VV = np.stack([probabilities(row_V) for row_V in log_rows(V, seed=2)])
    group = open_group((np.arange(count) + 0.37) / count)
    with np.errstate(divide="ignore"):
        rows_RV = np.log(np.tile(first_V, (count, 1)))
        first = draw(group, rows_RV, step_of(range(count), 0))
        second = draw(group, np.log(then_VV)[first], step_of(range(count), 1))
    found_VV = np.zeros((V, V))
    np.add.at(found_VV, (first, second), 1)
    assert np.abs(found_VV - count * first_V[:, None] * then_VV).max() <= 2


@pytest.mark.parametrize("index", range(4))
def test_each_text_has_the_marginal_distribution(index):
    """Over the names of groups; the chance of a false alarm is 1e-6 (the names are fixed)."""
    names, p_V = 4000, probabilities(log_rows(1, seed=3, forbidden=0.5)[0])
    p_V = np.where(p_V > 2e-3, p_V, 0.0)
    p_V /= p_V.sum()
    group = open_group([first_code(f"name {name}", index, 4) for name in range(names)])
    with np.errstate(divide="ignore"):
        drawn = draw(group, np.log(np.tile(p_V, (names, 1))), step_of(range(names), 0))
    found_V = np.bincount(drawn, minlength=V)
    kept_V = p_V > 0
    statistic = (((found_V - names * p_V) ** 2)[kept_V] / (names * p_V[kept_V])).sum()
    assert found_V[~kept_V].sum() == 0
    assert statistic < chi2.isf(FALSE_ALARM, kept_V.sum() - 1)


@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_a_group_is_stratified(size):
    """Each token gets n·p of n texts, rounded down or up, also after an opening that all share."""
    open_V = probabilities(log_rows(1, seed=size)[0])
    for name, opening in itertools.product(range(20), (0, 3)):
        group = open_group([first_code(f"{name}", index, size) for index in range(size)])
        with np.errstate(divide="ignore"):
            for position in range(opening):
                sure_RV = np.tile(np.log(np.eye(V)[5]), (size, 1))
                assert draw(group, sure_RV + 3.0, step_of(range(size), position)) == [5] * size
            rows_RV = np.log(np.tile(open_V, (size, 1)))
            drawn = draw(group, rows_RV, step_of(range(size), opening))
        found_V = np.bincount(drawn, minlength=V)
        assert (found_V >= np.floor(size * open_V - 1e-6)).all()
        assert (found_V <= np.ceil(size * open_V + 1e-6)).all()


def test_a_group_draws_each_of_as_many_equal_tokens_once():
    for name in range(50):
        group = open_group([first_code(f"{name}", index, V) for index in range(V)])
        drawn = draw(group, np.zeros((V, V)), step_of(range(V), 0))
        assert sorted(drawn) == list(range(V))


def test_drafts_are_drawn_in_sequence_and_count_when_accepted():
    """Steps of three rows, of which one, two or three are accepted, equal steps of one row."""
    rows_RV = log_rows(20, seed=5)
    plain = open_group([0.7])
    expected = [draw(plain, rows_RV[None, t], step_of([0], t))[0] for t in range(20)]
    group = GroupCodes(2, 3, CPU)
    group.open(1, row_of(0.7))
    at, step = 0, 0
    while at + 3 <= 20 and expected[at] >= 0:
        # Between rows of a slot without a group.
        between_RV = np.concatenate((rows_RV[:2], rows_RV[at : at + 3], rows_RV[:1]))
        given = step_of([0, 0, 1, 1, 1, 0], at, [0, 1, 0, 1, 2, 0])
        assert draw(group, between_RV, given) == [-1, -1, *expected[at : at + 3], -1]
        at, step = at + 1 + step % 3, step + 1
    assert step > 5


def test_draws_do_not_depend_on_the_split_of_a_step_into_parts(monkeypatch):
    rows_RV = log_rows(12, seed=6)
    offsets, slots = [0, 1, 2] * 4, [slot for slot in range(4) for _ in range(3)]
    found = []
    for elements in (1 << 22, V * 5, 1):
        monkeypatch.setattr(stage, "ELEMENTS", elements)
        group = GroupCodes(4, 3, CPU)
        for slot in range(4):
            group.open(slot, row_of(first_code("a", slot, 4)))
        found.append([draw(group, rows_RV, step_of(slots, at, offsets)) for at in (0, 2, 3)])
    assert found[0] == found[1] == found[2]


def test_a_chunk_of_a_prompt_does_not_change_the_code():
    rows_RV = log_rows(3, seed=7)
    plain = open_group([0.4])
    expected = [draw(plain, rows_RV[t : t + 1], step_of([0], 9 + t))[0] for t in range(2)]
    group = open_group([0.4])
    for position in (3, 7):  # Within the ten known tokens.
        draw(group, rows_RV[2:], step_of([0], position, known=[10]))
    got = [draw(group, rows_RV[t : t + 1], step_of([0], 9 + t, known=[10]))[0] for t in range(2)]
    assert got == expected


def test_a_preempted_text_continues_as_without_preemption():
    """In another slot, whether or not the last step's token was accepted before."""
    rows_RV = log_rows(8, seed=8)
    whole = open_group([0.3])
    expected = [draw(whole, rows_RV[t : t + 1], step_of([0], t))[0] for t in range(8)]
    for produced in (4, 5):
        group = open_group([0.3, 0.9])
        for t in range(5):
            draw(group, rows_RV[t : t + 1], step_of([0], t))
        preempted = group.snapshot().read(0)
        group.close(0)
        group.open(1, row_of(0.3), preempted, produced)
        got = [draw(group, rows_RV[t : t + 1], step_of([1], t))[0] for t in range(produced, 8)]
        assert got == expected[produced:]


def test_a_text_whose_code_is_lost_is_left_to_the_engine():
    group = GroupCodes(1, 1, CPU)
    group.open(0, row_of(0.3), None, produced=3)
    assert draw(group, log_rows(1), step_of([0], 3)) == [-1]


def test_the_engine_samples_once_the_bits_are_used():
    """Of 2⁸ equal tokens each takes eight bits."""
    for bits in (3.0, 8.0, 17.0):
        group = open_group([0.123, 0.456], bits=bits)
        flat_RV = np.zeros((2, 256))
        for position in range(5):
            drawn = draw(group, flat_RV, step_of([0, 1], position))
            assert (drawn == [-1, -1]) == (8 * position >= bits), (bits, position)
        group.open(1, row_of(0.5))  # Another request starts in the slot.
        assert draw(group, flat_RV, step_of([0, 1], 0)) == [-1, 128]


@pytest.mark.parametrize("delay", [0, 2, 5])
def test_a_text_whose_bits_are_used_is_no_longer_processed(monkeypatch, delay):
    """Once a copy of a step's states arrives, `delay` steps after its request; a request that took
    the slot in the meantime is still drawn."""
    steps = 0

    def is_there(copy):
        first_polls.setdefault(id(copy), (copy, steps))
        return steps - first_polls[id(copy)][1] >= delay

    first_polls = {}
    monkeypatch.setattr(stage.HostCopy, "is_there", is_there)
    group = open_group([0.1, 0.2, 0.3], bits=8.0)
    group.open(2, row_of(0.3, bits=1000.0))
    flat_RV = np.zeros((3, 256))
    seen = []
    for steps in range(3 * delay + 5):
        draw(group, flat_RV, step_of(range(3), steps))
        if steps == delay:
            group.open(1, row_of(0.4, bits=8.0 * (steps + 100)), produced=0)
        seen.append(group.draws(np.arange(3)).tolist())
    assert seen[0] == [True] * 3
    assert seen[-1] == [False, True, True]
    assert all(slot_1 and slot_2 for _, slot_1, slot_2 in seen)


def test_a_text_that_resumes_with_its_bits_used_is_not_processed():
    for preempted in (None, np.array([3, 0, 0, 1, 0, 1, 0, 0.5, 9.0, 0.5, 9.0])):
        group = GroupCodes(1, 1, CPU)
        group.open(0, row_of(0.3, bits=8.0), preempted, produced=3)
        assert not group.draws(np.array([0])).any()


@settings(max_examples=60, deadline=None)
@given(
    rows_per_request=st.integers(1, 5),
    bits=st.integers(1, 6),
    steps=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=8),
    later=st.integers(0, 12),
)
def test_a_text_resumes_with_the_bits_that_it_has_used(rows_per_request, bits, steps, later):
    """However many drafts each step had and accepted, how many tokens the engine's sampler has
    added since, and how often the text was preempted meanwhile. Each token takes one bit."""
    group = GroupCodes(1, rows_per_request, CPU)
    group.open(0, row_of(0.3, bits=float(bits)))
    produced, preempted = 0, None
    for staged, accepted in steps:
        if produced >= bits:
            break
        rows = min(staged, rows_per_request)
        draw(group, np.zeros((rows, 2)), step_of([0] * rows, produced, [*range(rows)]))
        preempted = group.snapshot().read(0)
        produced += min(accepted, rows)
    for resumed_at in (produced, produced + later) if produced >= bits else (produced,):
        group.open(0, row_of(0.3, bits=float(bits)), preempted, resumed_at)
        assert group.draws(np.array([0])).item() == (produced < bits)


def test_all_texts_differ_before_the_engine_samples():
    """After log₂ n bits; so the number of distinct answers is the maximum, Σ min(1, n·p)."""
    for size, name in itertools.product((3, 8, 16), range(12)):
        codes = [first_code(f"{name}", index, size) for index in range(size)]
        group = open_group(codes, bits=np.log2(size))
        texts, left_to_engine = [()] * size, set()
        for position in range(40):
            rows_RV = np.stack([log_rows(1, seed=hash(text) % 2**32)[0] for text in texts])
            drawn = draw(group, rows_RV, step_of(range(size), position))
            left_to_engine |= {index for index, token in enumerate(drawn) if token < 0}
            texts = [(*text, token) for text, token in zip(texts, drawn, strict=True)]
            if len(left_to_engine) == size:
                break
        assert len(left_to_engine) == size
        beginnings = [tuple(token for token in text if token >= 0) for text in texts]
        assert len(set(beginnings)) == size


def test_rows_without_a_group_and_invalid_rows_keep_their_bits():
    group = open_group([0.5, 0.5, 0.5, 0.5])
    group.close(3)
    rows_RV = log_rows(4)
    rows_RV[0, 3], rows_RV[1, :], rows_RV[2, 4] = np.nan, -np.inf, np.inf
    assert draw(group, rows_RV, step_of(range(4), 0)) == [-1] * 4
    # The tokens that the engine drew there left the codes unchanged.
    assert draw(group, log_rows(4), step_of(range(4), 1)) == [
        *[drawn_reference(probabilities(row_V), 0.5)[0] for row_V in log_rows(4)[:3]],
        -1,
    ]
