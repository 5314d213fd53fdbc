"""The laws that cut as known samplers do and do not heat: against fp64, and what they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.sampling import Controls, control_row, get_backend, transform
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.spec import parse
from tests.reference import cut_reference
from tests.rows import KINDS, make_rows

LOG_PROBABILITY = 2e-4
NATS = 1e-3
BACKENDS = pytest.mark.parametrize("kind", [TorchBackend, get_backend], ids=["plain", "fast"])


@st.composite
def laws(draw):
    """A diversity object of a law that does not heat."""
    return {"law": "guard", "min_p": draw(st.floats(0.001, 0.9))}


@st.composite
def batches(draw, max_rows=6):
    """Rows of every kind, and each one's diversity, temperature and stop tokens."""
    vocabulary = draw(st.sampled_from([2, 3, 17, 64, 257, 1024]))
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=max_rows))
    stops = st.frozensets(st.integers(0, 20), max_size=3)
    asked = [(draw(laws()), draw(st.floats(0.2, 2.0)), draw(stops)) for _ in kinds]
    return make_rows(kinds, vocabulary, draw(st.integers(0, 2**32 - 1))), asked


def controls_of(asked, *, divide=False):
    rows = [
        control_row(
            parse(diversity), temperature=t, logits_divisor=t if divide else 1.0, stop_ids=stops
        )
        for diversity, t, stops in asked
    ]
    return Controls.stack(rows)


@BACKENDS
@settings(max_examples=150, deadline=None)
@given(batches(), st.booleans())
def test_what_is_sampled_is_the_law_in_fp64(kind, batch, divide):
    logits_RV, asked = batch
    T_R1 = torch.tensor([t for _, t, _ in asked], dtype=torch.float64)[:, None]
    divisor_R1 = T_R1 if divide else torch.ones_like(T_R1)
    rows_RV = (logits_RV.double() / divisor_R1).float()
    arrived_RV = rows_RV.double() * divisor_R1
    statistics = transform(rows_RV, controls_of(asked, divide=divide), None, kind("cpu"))
    for r, (diversity, t, stops) in enumerate(asked):
        said = cut_reference(arrived_RV[r].numpy(), temperature=t, stop_ids=stops, **diversity)
        largest = arrived_RV[r].abs().nan_to_num(0, 0, 0).max().item()
        if said.margin < max(1e-4, np.spacing(np.float32(largest))):
            continue
        got_V = torch.log_softmax(rows_RV[r].double() / (1.0 if divide else t), dim=0).numpy()
        assert (np.isinf(got_V) == np.isinf(said.log_p_V)).all()
        likely_V = said.log_p_V > -30
        np.testing.assert_allclose(got_V[likely_V], said.log_p_V[likely_V], atol=LOG_PROBABILITY)
        assert statistics.entropy_before_R[r] == pytest.approx(said.entropy_before, abs=NATS)
        assert statistics.entropy_after_R[r] == pytest.approx(said.entropy_after, abs=NATS)
        assert statistics.temperature_R[r] == pytest.approx(t, rel=1e-6)


@BACKENDS
@settings(max_examples=100, deadline=None)
@given(batches(), st.floats(0.2, 2.0))
def test_what_is_kept_does_not_depend_on_the_temperature(kind, batch, other):
    logits_RV, asked = batch
    after_RV, other_RV = logits_RV.clone(), logits_RV.clone()
    transform(after_RV, controls_of(asked), None, kind("cpu"))
    transform(other_RV, controls_of([(d, other, s) for d, _, s in asked]), None, kind("cpu"))
    assert torch.equal(after_RV == -torch.inf, other_RV == -torch.inf)
