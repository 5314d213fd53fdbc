"""The CPU kernels against plain torch, where their own structure could fail: chunks, runs of
rows, reused buffers. test_transform.py tests the law itself on this backend."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from dftserve.sampling import Controls, control_row, get_backend, transform
from dftserve.sampling.backends.numba import CHUNK, NumbaBackend, _step, _sums, _transform
from dftserve.sampling.transform import transform as plain
from dftserve.spec import parse
from tests.rows import KINDS, make_rows

LAWS = (
    {"level": 0.5},
    {"level": 1.0, "min_p": 0.001},
    {"law": "dynatemp", "dynatemp_range": 0.9, "level": 0.7},
)
STOPS = (frozenset(), frozenset({0}), frozenset({1, 5, 9}), frozenset(range(0, 400, 3)))


def controls_of(rows: int, seed: int = 0) -> Controls:
    """Laws, temperatures and stop tokens in turn; every third row is divided by its temperature."""
    made = []
    for r in range(seed, seed + rows):
        temperature = 0.4 + 0.2 * (r % 5)
        divided = temperature if r % 3 == 0 else 1.0
        row = control_row(
            parse(LAWS[r % 3]),
            temperature=temperature,
            logits_divisor=divided,
            stop_ids=STOPS[r // 3 % len(STOPS)],
        )
        made.append(row)
    return Controls.stack(made)


def assert_agree(got_XV, expected_XV, got, expected):
    assert torch.equal(got_XV == -torch.inf, expected_XV == -torch.inf)
    torch.testing.assert_close(got_XV, expected_XV, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert torch.equal(got.valid_R, expected.valid_R)
    for value_R, expected_R in zip(got.values(), expected.values(), strict=True):
        valid_R = expected.valid_R
        torch.testing.assert_close(value_R[valid_R], expected_R[valid_R], rtol=1e-4, atol=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([*sorted(KINDS), "nan", "nothing"]), min_size=1, max_size=12),
    st.sampled_from([2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 17, 1999]),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_the_kernels_equal_plain_torch(kinds, vocabulary, seed, data):
    """Rows of every kind, some invalid, in any order and selection."""
    known = [kind if kind in KINDS else "peaky" for kind in kinds]
    logits_XV = make_rows(known, vocabulary, seed)
    for x, kind in enumerate(kinds):
        if kind == "nan":
            logits_XV[x, seed % vocabulary] = torch.nan
        elif kind == "nothing":
            logits_XV[x] = -torch.inf
    order = data.draw(st.permutations(range(len(kinds))))
    rows = order[: data.draw(st.integers(1, len(kinds)))]
    rows_R = None if data.draw(st.booleans()) else torch.tensor(rows)
    controls = controls_of(len(kinds) if rows_R is None else len(rows), seed % 12)
    got_XV, expected_XV = logits_XV.clone(), logits_XV.clone()
    got = NumbaBackend()(got_XV, controls, rows_R)
    expected = plain(expected_XV, controls, rows_R)
    assert_agree(got_XV, expected_XV, got, expected)
    untouched = [x for x in range(len(kinds)) if rows_R is not None and x not in rows]
    untouched += [x for x, kind in enumerate(kinds) if kind not in KINDS]
    for x in untouched:
        bits, before = got_XV[x].view(torch.int32), logits_XV[x].view(torch.int32)
        assert torch.equal(bits, before)


@pytest.mark.parametrize("vocabulary", [50_257, 131_072])
def test_large_vocabularies(vocabulary):
    kinds = ["few", "flat", "zipf", "gaussian", "grammar", "bf16"]
    logits_XV = make_rows(kinds, vocabulary, seed=3)
    expected_XV = logits_XV.clone()
    controls = controls_of(len(kinds))
    got = NumbaBackend()(logits_XV, controls)
    assert_agree(logits_XV, expected_XV, got, plain(expected_XV, controls))


def test_a_row_with_many_stop_tokens_among_others():
    vocabulary = 131_072
    many = frozenset(np.random.default_rng(0).permutation(vocabulary)[:30_000].tolist())
    stop_sets = [frozenset({2}), many, frozenset()]
    rows = [
        control_row(parse(0.5), temperature=0.8, logits_divisor=1.0, stop_ids=stops)
        for stops in stop_sets
    ]
    logits_XV = make_rows(["zipf", "gaussian", "few"], vocabulary, seed=3)
    expected_XV = logits_XV.clone()
    controls = Controls.stack(rows)
    got = NumbaBackend()(logits_XV, controls)
    assert_agree(logits_XV, expected_XV, got, plain(expected_XV, controls))


def test_a_row_reads_its_own_stop_tokens_only():
    """Values after the first -1 have no effect; a row does not pay for the widest one."""
    logits_XV = make_rows(["few"] * 3, 300, seed=3)
    other_XV = logits_XV.clone()
    controls = controls_of(3)
    stops_RE = torch.full((3, 8), -1)
    stops_RE[0, 0], stops_RE[1, :2] = 7, torch.tensor([3, 9])
    NumbaBackend()(logits_XV, Controls(controls.numbers_RF, stops_RE))
    other_RE = stops_RE.clone()
    other_RE[0, 2:], other_RE[1, 3:], other_RE[2, 1:] = 11, 12, 13
    NumbaBackend()(other_XV, Controls(controls.numbers_RF, other_RE))
    assert torch.equal(logits_XV, other_XV)


def test_buffers_of_one_call_do_not_affect_the_next():
    """Batches of different sizes, vocabularies and controls through one backend."""
    backend = NumbaBackend()
    for seed, (rows, vocabulary) in enumerate([(3, 700), (1, 64), (8, 1000), (3, 700), (2, 129)]):
        logits_XV = make_rows([sorted(KINDS)[r] for r in range(rows)], vocabulary, seed)
        expected_XV = logits_XV.clone()
        controls = controls_of(rows, seed)
        got = backend(logits_XV, controls)
        assert_agree(logits_XV, expected_XV, got, plain(expected_XV, controls))


def test_calls_in_inference_mode_and_outside_of_it():
    backend, controls = NumbaBackend(), controls_of(2)
    with torch.inference_mode():
        backend(torch.randn(2, 300), controls)
    backend(torch.randn(2, 300), controls)


def test_a_stop_token_does_not_overtake_the_content():
    """The content is one nat above many tokens, a stop token close to it: heat makes them tie."""
    logits_XV = torch.zeros(2, 200)
    logits_XV[:, 7], logits_XV[0, 3], logits_XV[1, 3] = 1.0, 0.95, 1.05
    row = control_row(parse(1.0), temperature=1.0, logits_divisor=1.0, stop_ids=frozenset({3}))
    controls = Controls.stack([row] * 2)
    expected_XV = logits_XV.clone()
    got, expected = NumbaBackend()(logits_XV, controls), plain(expected_XV, controls)
    assert_agree(logits_XV, expected_XV, got, expected)
    assert got.temperature_R[0] < 1.5 < got.temperature_R[1]
    assert logits_XV[0, 7] == logits_XV[0].max()
    assert logits_XV[1, 3] == logits_XV[1].max()


@pytest.mark.parametrize("backend", [NumbaBackend(), plain], ids=["fast", "plain"])
def test_content_that_ties_with_a_stop_token_below_the_top_token(backend):
    """Barely heated, so that the tie holds; the top token is a stop token."""
    logits_RV = torch.zeros(1, 200)
    logits_RV[0, [3, 7, 9]] = torch.tensor([1.5, 1.0, 1.0])
    row = control_row(parse(1e-6), temperature=1.0, logits_divisor=1.0, stop_ids=frozenset({3, 9}))
    before_RV = torch.log_softmax(logits_RV, dim=1)
    backend(logits_RV, Controls.stack([row]), None)
    torch.testing.assert_close(logits_RV, before_RV, rtol=1e-5, atol=1e-5)


def test_the_exponential_is_within_two_ulps_and_zero_far_below():
    """Every pattern of the upper 16 bits of a negative float."""
    bits = torch.arange(0x8000, 0xFF80, dtype=torch.int64) << 16
    weights_K = (bits - 2**32).to(torch.int32).view(torch.float32).numpy()
    shares_K = np.empty_like(weights_K)
    _sums(weights_K, shares_K)
    exact_K = np.exp(weights_K.astype(np.float64))
    is_near_K = weights_K > -87
    ulps_K = np.abs(shares_K - exact_K)[is_near_K] / np.spacing(shares_K[is_near_K])
    assert ulps_K.max() <= 2
    assert (shares_K[~is_near_K] == 0).all()


@pytest.mark.parametrize("rows_R", [None, torch.tensor([0, 1, 2, 4, 6, 7])], ids=["all", "some"])
def test_a_steady_step_allocates_nothing_that_grows_with_the_vocabulary(rows_R):
    """numpy's memory by tracemalloc, torch's by its profiler: both count every byte."""
    vocabulary = 131_072
    logits_XV = make_rows(["few"] * 8, vocabulary, seed=0)
    source_XV = logits_XV.clone()
    controls = controls_of(8 if rows_R is None else len(rows_R))
    backend = get_backend("cpu")

    def step():
        logits_XV.copy_(source_XV)
        transform(logits_XV, controls, rows_R, backend)

    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    by_torch = sum(max(event.self_cpu_memory_usage, 0) for event in profiled.events())
    tracemalloc.start()
    try:
        step()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(10):
            step()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    one_row = 4 * vocabulary
    assert by_torch + peak - before < one_row / 4
    assert after - before < 4096


@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_a_row_out_of_range_is_refused_and_nothing_is_written(row):
    """The kernels check no other index."""
    logits_XV = torch.randn(3, 200)
    before_XV = logits_XV.clone()
    with pytest.raises(IndexError, match="outside the rows of the logits"):
        NumbaBackend()(logits_XV, controls_of(2), torch.tensor([0, row]))
    with pytest.raises(ValueError, match="number differs"):
        NumbaBackend()(logits_XV, controls_of(2), torch.tensor([0]))
    assert torch.equal(logits_XV, before_XV)


@pytest.mark.parametrize(
    "rows_R",
    [torch.tensor([True, False, True]), torch.tensor([0.0, 1.0, 2.0]), torch.zeros(1, 3).long()],
    ids=["mask", "float", "matrix"],
)
def test_rows_that_are_not_a_list_of_int64_are_refused(rows_R):
    with pytest.raises(ValueError, match="accepted: a list of int64"):
        transform(torch.zeros(3, 8), controls_of(3), rows_R)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_controls_for_another_number_of_rows_are_refused(rows):
    with pytest.raises(ValueError, match=f"rows: got 4 and {rows} rows of controls"):
        transform(torch.zeros(4, 8), controls_of(rows))


def test_buffers_that_grow_with_the_vocabulary_are_allocated_once():
    """For batches of 8 rows, of 3, and with more stop tokens."""
    backend = NumbaBackend()
    buffers = []
    for rows, seed in ((8, 0), (3, 5), (8, 2)):
        backend(torch.randn(rows, 300), controls_of(rows, seed))
        buffers.append(backend._scratch[2])
    assert buffers[0] is buffers[1] is buffers[2]


def test_nothing_is_compiled_after_the_first_call():
    """Compiling takes seconds, so later calls must have the types of the first."""
    backend = NumbaBackend()
    for rows_R in (None, torch.tensor([0]), torch.arange(0, 4, 2), torch.arange(8)[::4]):
        rows = 4 if rows_R is None else len(rows_R)
        controls = controls_of(rows)
        for width in (300, 333):
            logits_XV = torch.randn(8 if rows_R is not None else 4, width)[:, :300]
            backend(logits_XV, controls, rows_R)
            backend(logits_XV, controls.select(torch.arange(rows)), rows_R)
    assert len(_transform.signatures) == 1


def test_the_kernels_contain_no_string_code():
    """Such as numba's message about arrays of different lengths: every start would compile it."""
    get_backend("cpu")
    for kernel in (_transform, _step):
        assert kernel.signatures
        assert not [code for code in kernel.inspect_llvm().values() if "unicode" in code]


@pytest.mark.parametrize(
    "logits_XV",
    [torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8), torch.zeros(2, 16)[:, ::2]],
    ids=["float64", "one dimension", "strided"],
)
def test_logits_of_another_type_or_layout_are_refused(logits_XV):
    with pytest.raises(ValueError, match="accepted: a float32 matrix whose rows"):
        transform(logits_XV, controls_of(2))


@pytest.mark.parametrize("backend", [NumbaBackend(), plain], ids=["fast", "plain"])
def test_a_stop_token_that_ties_with_the_content_keeps_the_tie(backend):
    """However the temperatures round: 2,000 rows, each with its own."""
    rows = 2000
    draw = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(rows, 64, generator=draw)
    logits_RV[:, 7] = logits_RV[:, 46] = logits_RV.amax(dim=1) + 0.5
    temperatures_R = 0.2 + 1.8 * torch.rand(rows, generator=draw)
    control_rows = [
        control_row(
            parse({"law": "dynatemp", "dynatemp_range": 0.5, "level": 0.2}),
            temperature=t,
            logits_divisor=1.0,
            stop_ids=frozenset({7}),
        )
        for t in temperatures_R.tolist()
    ]
    statistics = backend(logits_RV, Controls.stack(control_rows), None)
    heated_R = statistics.temperature_R >= 0.9999 * temperatures_R
    assert heated_R.sum() > rows / 4
    assert torch.equal(logits_RV[heated_R, 7], logits_RV[heated_R, 46])
    assert (logits_RV[:, 46] == logits_RV.amax(dim=1)).all()
