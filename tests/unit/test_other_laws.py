"""bench/other_laws.py: each law against its published formula, in float64 or by hand."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
other_laws = importlib.import_module("other_laws")

ROWS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40).map(torch.tensor)


def probabilities(logits_V):
    z_V = logits_V.double().numpy()
    share_V = np.exp(z_V - z_V.max())
    return share_V / share_V.sum()


@given(ROWS, st.sampled_from([0.8, 1.2]), st.sampled_from([0.0, 0.1, 0.5]))
def test_edt_divides_by_its_temperature(row_V, base, theta):
    p_V = probabilities(row_V)
    entropy = -(p_V * np.log(p_V)).sum()
    expected_V = row_V.double() / max(base * 0.8 ** (theta / entropy), 0.01)
    found_V = other_laws.edt(base=base, theta=theta)([], row_V)
    torch.testing.assert_close(found_V.double(), expected_V, rtol=1e-3, atol=1e-3)


@given(ROWS, st.sampled_from([1.0, 2.0]))
def test_p_less_keeps_tokens_at_least_as_likely_as_a_collision(row_V, temperature):
    p_V = probabilities(row_V / temperature)
    found_V = other_laws.p_less(temperature=temperature)([], row_V)
    is_clear_V = np.abs(p_V - (p_V**2).sum()) > 1e-6  # Not decided by rounding.
    assert (found_V.isfinite().numpy() == (p_V >= (p_V**2).sum()))[is_clear_V].all()
    assert bool(found_V[row_V.argmax()].isfinite())


@given(ROWS, st.sampled_from([0.3, 0.7]))
def test_top_h_keeps_the_likeliest_token_and_at_most_its_share_of_entropy(row_V, alpha):
    p_V = probabilities(row_V)
    kept_V = other_laws.top_h(alpha=alpha, temperature=1.0)([], row_V).isfinite().numpy()
    assert kept_V[p_V.argmax()] or p_V.max() - p_V[kept_V].min() < 1e-6
    terms_V = -p_V * np.log(p_V)
    if kept_V.sum() > 1:
        assert terms_V[kept_V].sum() <= alpha * terms_V.sum() + 1e-5


def test_mirostat_cuts_more_after_a_surprise_and_less_without_one():
    row_V = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]))
    law = other_laws.mirostat(tau=1.0, temperature=1.0)
    first_V = law([], row_V)
    assert first_V.isfinite().tolist() == [True, True, False, False, False]  # μ = 2 bits.
    # Among the kept tokens the second has 1/3: μ = 2 - .1 · (log2 3 - 1), below its 2 bits.
    assert law([1], row_V).isfinite().tolist() == [True, False, False, False, False]
    # Only the first is kept, with no surprise: μ rises by .1 a token, past 2 and later past 3.
    tokens = [1, 0]
    for _ in range(12):
        kept_V = law(list(tokens), row_V).isfinite()
        tokens.append(0)
    assert kept_V.tolist()[:2] == [True, True]


def test_mirostat_keeps_the_mean_surprise_at_its_target():
    """In 4,000 draws from a fixed row, the mean of the last 3,000 is within .1 bits of 2, which is
    five standard errors or more."""
    generator = torch.Generator().manual_seed(0)
    row_V = torch.randn(1000, generator=generator) * 2
    law = other_laws.mirostat(tau=2.0, temperature=1.0)
    tokens, surprises = [], []
    for _ in range(4000):
        kept_V = law(tokens[-1:], row_V).softmax(-1)
        token = int(torch.multinomial(kept_V, 1, generator=generator))
        tokens.append(token)
        surprises.append(-math.log2(float(kept_V[token])))
    assert abs(np.mean(surprises[1000:]) - 2.0) < 0.1


def test_mirostat_requires_the_last_token():
    law = other_laws.mirostat(tau=1.0, temperature=1.0)
    with pytest.raises(RuntimeError, match="last token"):
        law([-1], torch.zeros(4))
