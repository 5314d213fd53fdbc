"""Rows of controls: their width, their columns and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.sampling import Controls, StyleControls, control_row
from dftserve.sampling.controls import NUMBERS, stop_width
from dftserve.sampling.staging import PinnedStaging
from dftserve.spec import parse


def row_of(stops, level=0.5):
    return control_row(parse(level), temperature=0.7, logits_divisor=1.0, stop_ids=frozenset(stops))


@settings(deadline=None)
@given(st.lists(st.integers(0, 600), max_size=8))
def test_the_width_follows_the_rows_in_use(counts):
    rows = [row_of(range(count)) for count in counts]
    longest = max([*counts, 1])
    assert longest <= stop_width(rows) < 2 * longest
    assert stop_width(rows).bit_count() == 1
    controls = Controls.stack(rows)
    assert controls.stop_ids_RE.shape == (len(rows), stop_width(rows))
    for stops_E, count in zip(controls.stop_ids_RE.tolist(), counts, strict=True):
        assert stops_E == [*range(count), *[-1] * (len(stops_E) - count)]


def test_the_width_shrinks_when_the_row_with_many_leaves():
    rows = [row_of({2}), row_of(range(30_000)), row_of({2, 5})]
    assert [stop_width(rows), stop_width([rows[0], rows[2]])] == [32_768, 2]


def test_negative_ids_are_left_out():
    """A negative id would hide those after it."""
    assert row_of({-7, 4, -1, 2}).stop_ids == (2, 4)


def test_columns_have_the_values_that_they_are_named_after():
    diversity = {"law": "dynatemp", "dynatemp_range": 0.25, "dynatemp_exponent": 0.5, "level": 0.75}
    row = control_row(
        parse({**diversity, "min_p": 0.125}),
        temperature=1.5,
        logits_divisor=2.0,
        stop_ids=frozenset(),
    )
    controls = Controls.stack([row, row])
    expected = {
        "law": 2.0,
        "temperature": 1.5,
        "logits_divisor": 2.0,
        "level": 0.75,
        "log_min_p": np.log(0.125),
        "max_temperature": np.inf,
        "dynatemp_range": 0.25,
        "dynatemp_exponent": 0.5,
        "target_entropy": 0.0,
        "n_sigma": 0.0,
        "log_xtc_threshold": 0.0,
        "xtc_probability": 0.0,
        "draw_key_high": 0.0,
        "draw_key_low": 0.0,
        "style": -1.0,
        "style_strength": 0.0,
        "style_max_kl": 0.0,
        "style_log_guard": np.log(0.125),
    }
    assert tuple(expected) == NUMBERS
    for name, value in expected.items():
        assert getattr(controls, f"{name}_R").tolist() == pytest.approx([value] * 2)


def test_a_style_s_guard_is_applied_once_and_before_the_style():
    """It is the guard of the law; for `budget`, whose level varies, it is the widest."""
    style = StyleControls(profile=2, strength=0.5, max_kl=0.05)
    wide, narrow = np.log(0.02), np.log(0.05)
    budget = {"law": "budget", "target_entropy": 1.0}
    cases = [
        ({"level": 0.0}, narrow),
        (1.0, wide),
        (budget, wide),
        ({**budget, "min_p": 0.3}, -1.2),
    ]
    for diversity, log_guard in cases:
        options = {"temperature": 1.0, "logits_divisor": 1.0, "stop_ids": frozenset()}
        controls = Controls.stack([control_row(parse(diversity), style=style, **options)])
        assert controls.log_min_p_R.tolist() == [-np.inf]
        assert controls.style_log_guard_R.item() == pytest.approx(log_guard, abs=5e-3)
        assert controls.style_R.tolist() == [2]


def test_another_level_leaves_the_original_controls_unchanged():
    controls = Controls.stack([row_of({1}), row_of({2})])
    steered = controls.with_level(torch.tensor([0.1, 0.2]))
    assert steered.level_R.tolist() == pytest.approx([0.1, 0.2])
    assert controls.level_R.tolist() == [0.5, 0.5]
    assert torch.equal(steered.temperature_R, controls.temperature_R)


def test_a_staging_sends_both_parts():
    sent = []

    class Staging(PinnedStaging):
        def to_device(self, values):
            sent.append(values.dtype)
            return super().to_device(values)

    Controls.stack([row_of({1})], staging=Staging("cpu"))
    assert sent == [np.float32, np.int64]


@pytest.mark.parametrize(
    ("numbers", "stops"),
    [
        (torch.zeros(2, len(NUMBERS)), torch.zeros(3, 1, dtype=torch.int64)),
        (torch.zeros(2, len(NUMBERS) - 1), torch.zeros(2, 1, dtype=torch.int64)),
        (torch.zeros(2, len(NUMBERS)).double(), torch.zeros(2, 1, dtype=torch.int64)),
        (torch.zeros(2, len(NUMBERS)), torch.zeros(2, 1)),
        (torch.zeros(2, len(NUMBERS)), torch.zeros(2, dtype=torch.int64)),
    ],
    ids=["rows", "columns", "float64", "float stops", "no matrix"],
)
def test_controls_of_another_form_are_refused(numbers, stops):
    with pytest.raises(ValueError, match=rf"accepted: float32 \[rows, {len(NUMBERS)}\] and int64"):
        Controls.of(numbers, stops)
