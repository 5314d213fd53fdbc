"""The statistics of each token, from an engine's reports of its steps."""

from dftserve_vllm.request_context import PromptContext, RequestContext, Trace, current
from hypothesis import given
from hypothesis import strategies as st

from dftserve.sampling.slots import AFTER, BEFORE, CHANGED, COLUMNS, COUNT, TEMPERATURE
from dftserve.spec import MOST_TRACED, parse

ROWS = 3
"""Rows of a request in a step: two draft tokens, and the token after them."""
statistics = st.floats(0, 10, width=32)


@st.composite
def steps(draw):
    """A step: the row of `Snapshot.rows`, or None if it was lost; the number of tokens that it
    produced; and the statistics of each of these, None where it has none."""
    produced = draw(st.integers(0, ROWS))
    waiting = [[0.0] * COLUMNS for _ in range(ROWS)]
    expected = []
    for row_F in waiting:
        values = draw(st.tuples(statistics, statistics, statistics, statistics))
        row_F[COUNT] = float(draw(st.booleans()))
        row_F[BEFORE], row_F[AFTER], row_F[TEMPERATURE], row_F[CHANGED] = values
        expected.append([round(value, 4) for value in values] if row_F[COUNT] else [None] * 4)
    sums = draw(st.lists(statistics, min_size=1 + COLUMNS, max_size=1 + COLUMNS))
    if draw(st.booleans()):
        return None, produced, [[None] * 4] * produced
    return [*sums, *(value for row_F in waiting for value in row_F)], produced, expected[:produced]


@given(st.lists(steps(), max_size=8), st.integers(1, 12))
def test_each_token_has_the_statistics_of_its_row(drawn, most):
    trace = Trace(most)
    for row_X, produced, _ in drawn:
        trace.add(row_X, produced)
    expected = [each for _, _, rows in drawn for each in rows][:most]
    assert [list(each) for each in zip(*trace.columns.values(), strict=True)] == expected


@given(st.integers(1, 5000))
def test_a_requests_trace_is_bounded_for_any_number_of_choices(count):
    prompt = PromptContext(parse({"level": 1, "trace": True}), count)
    bounds = [choice.trace.most for choice in prompt.choices if choice.trace is not None]
    assert len(bounds) == count
    assert min(bounds) >= 1
    assert sum(bounds) <= max(MOST_TRACED, count)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=60))
def test_prompts_of_one_request_share_the_trace_bound(prompts):
    context = RequestContext()
    token = current.set(context)
    context.trace_budget.left = bound = 100
    try:
        opened = [PromptContext(parse({"level": 1, "trace": True}), count) for _, count in prompts]
    finally:
        current.reset(token)
    for prompt, (tokens, _) in zip(opened, prompts, strict=True):
        for choice in prompt.choices:
            choice.trace.add(None, tokens)
    traced = sum(len(c.trace.columns["changed"]) for prompt in opened for c in prompt.choices)
    assert traced == min(bound, sum(tokens * count for tokens, count in prompts))


def test_nothing_is_traced_unless_it_is_requested():
    assert all(choice.trace is None for choice in PromptContext(parse(1), 3).choices)
