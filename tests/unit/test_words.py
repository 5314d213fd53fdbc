"""The law `words` on rows of every kind: agreement with fp64, and its properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.sampling import Controls, TokenClasses, control_row, get_backend, transform
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.sampling.controls import LawConstants
from dftserve.spec import parse
from tests.reference import words_reference
from tests.rows import KINDS, make_rows

LOG_PROBABILITY = 2e-4
NATS = 1e-3


HOTTEST = {"law": "words", "level": 1.0, "min_p": 1e-3}, 1.0, frozenset()


def random_classes(vocabulary: int, seed: int) -> TokenClasses:
    """Random classes and states; the last eighth of the vocabulary has none."""
    source = np.random.default_rng(seed)
    known = max(vocabulary - vocabulary // 8, 1)
    by_state = source.integers(0, 3, (4, known))
    packed_V = sum(part << (2 * index) for index, part in enumerate(by_state))
    return TokenClasses(packed_V.astype(np.uint8))


def class_after(classes: TokenClasses, last: int, vocabulary: int) -> np.ndarray:
    """uint8 [V], from the definition of the byte."""
    known = len(classes.packed_V)
    state = classes.packed_V[last] >> 6 if 0 <= last < known else 0
    class_V = np.zeros(vocabulary, np.uint8)
    class_V[:known] = [(byte >> (2 * state)) & 3 for byte in classes.packed_V[:vocabulary].tolist()]
    return class_V


@st.composite
def requests(draw):
    """A diversity object, a temperature, a few stop tokens."""
    diversity = {"law": "words", "level": draw(st.floats(0.01, 1.0))}
    if draw(st.booleans()):
        diversity["max_temperature"] = draw(st.floats(0.5, 6.0))
    if draw(st.booleans()):
        diversity["min_p"] = draw(st.floats(0.001, 0.5))
    return diversity, draw(st.floats(0.2, 2.0)), draw(st.frozensets(st.integers(0, 20), max_size=3))


@st.composite
def batches(draw, max_rows=6):
    seed = draw(st.integers(0, 2**32 - 1))
    vocabulary = draw(st.sampled_from([2, 3, 17, 64, 257, 1024]))
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=max_rows))
    requested = [draw(requests()) for _ in kinds]
    last = [draw(st.integers(-1, vocabulary + 2)) for _ in kinds]
    return make_rows(kinds, vocabulary, seed), requested, last, random_classes(vocabulary, seed)


def controls_of(requested, last, *, divide=False):
    rows = [
        control_row(
            parse(diversity), temperature=t, logits_divisor=t if divide else 1.0, stop_ids=stops
        )
        for diversity, t, stops in requested
    ]
    return Controls.stack(rows).after(torch.tensor(last))


BACKENDS = pytest.mark.parametrize("kind", [TorchBackend, get_backend], ids=["plain", "fast"])


@BACKENDS
@settings(max_examples=150, deadline=None)
@given(batches(), st.booleans())
def test_the_sampled_distribution_is_the_law_in_fp64(kind, batch, divide):
    logits_RV, requested, last, classes = batch
    T_R1 = torch.tensor([t for _, t, _ in requested], dtype=torch.float64)[:, None]
    divisor_R1 = T_R1 if divide else torch.ones_like(T_R1)
    rows_RV = (logits_RV.double() / divisor_R1).float()
    arrived_RV = rows_RV.double() * divisor_R1
    backend = kind("cpu", token_classes=classes)
    statistics = transform(rows_RV, controls_of(requested, last, divide=divide), None, backend)
    for r, (diversity, t, stops) in enumerate(requested):
        class_V = class_after(classes, last[r], logits_RV.shape[1])
        arguments = {name: value for name, value in diversity.items() if name != "law"}
        law = words_reference(
            arrived_RV[r].numpy(), class_V, temperature=t, stop_ids=stops, **arguments
        )
        largest = arrived_RV[r].abs().nan_to_num(0, 0, 0).max().item()
        if law.margin < max(1e-4, np.spacing(np.float32(largest))):
            continue
        got_V = torch.log_softmax(rows_RV[r].double() / (1.0 if divide else t), dim=0).numpy()
        assert (np.isinf(got_V) == np.isinf(law.log_p_V)).all()
        likely_V = law.log_p_V > -30
        np.testing.assert_allclose(got_V[likely_V], law.log_p_V[likely_V], atol=LOG_PROBABILITY)
        assert statistics.entropy_before_R[r] == pytest.approx(law.entropy_before, abs=NATS)
        assert statistics.entropy_after_R[r] == pytest.approx(law.entropy_after, abs=NATS)
        assert statistics.temperature_R[r] == pytest.approx(law.temperature, rel=NATS)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_class_masses_stop_tokens_infinities_and_argmaxes_are_kept(batch):
    logits_RV, requested, last, classes = batch
    after_RV = logits_RV.clone()
    backend = get_backend("cpu", token_classes=classes)
    transform(after_RV, controls_of(requested, last), None, backend)
    assert not after_RV.isnan().any()
    assert (after_RV[logits_RV == -torch.inf] == -torch.inf).all()
    for r, (_, t, stops) in enumerate(requested):
        class_V = torch.from_numpy(class_after(classes, last[r], logits_RV.shape[1])).long()
        stops = [i for i in stops if i < len(class_V) and logits_RV[r, i] > -torch.inf]
        class_V[stops] = 3
        kept_V = after_RV[r] > -torch.inf
        assert kept_V[stops].all(), "a stop token was cut"
        before_V = torch.softmax((logits_RV[r].double() / t).masked_fill(~kept_V, -torch.inf), 0)
        after_V = torch.softmax(after_RV[r].double() / t, dim=0)
        none_C = torch.zeros(4, dtype=torch.float64)
        mass_C = none_C.index_add(0, class_V, before_V)
        torch.testing.assert_close(
            none_C.index_add(0, class_V, after_V), mass_C, atol=2e-5, rtol=1e-3
        )
        torch.testing.assert_close(after_V[stops], before_V[stops], atol=2e-5, rtol=1e-3)
        for c in range(3):
            of_class = torch.nonzero((class_V == c) & kept_V)[:, 0]
            if len(of_class):
                best = of_class[logits_RV[r, of_class].argmax()]
                assert after_RV[r, best] == after_RV[r, of_class].max()


@settings(max_examples=100, deadline=None)
@given(batches(max_rows=3), st.lists(st.floats(0.001, 1.0), min_size=2, max_size=6))
def test_entropy_among_starts_does_not_fall_as_the_level_rises(batch, levels):
    logits_RV, requested, last, classes = batch
    backend = get_backend("cpu", token_classes=classes)
    entropies = []
    for level in sorted(levels):
        diversity = {"law": "words", "level": level}
        after_RV = logits_RV.clone()
        controls = controls_of([(diversity, t, stops) for _, t, stops in requested], last)
        transform(after_RV, controls, None, backend)
        entropies.append(_entropy_of_starts(after_RV, requested, last, classes))
    rises_R = torch.stack(entropies).diff(dim=0)
    assert (rises_R >= -1e-4).all(), rises_R.min()


def _entropy_of_starts(after_RV, requested, last, classes):
    entropies = []
    for r, (_, t, stops) in enumerate(requested):
        is_start_V = torch.from_numpy(class_after(classes, last[r], after_RV.shape[1]) == 1)
        is_start_V[[i for i in stops if i < len(is_start_V)]] = False
        weight_V = (after_RV[r].double() / t)[is_start_V]
        is_any = len(weight_V) and weight_V.max() > -torch.inf
        p_V = torch.softmax(weight_V, 0) if is_any else torch.zeros(1)
        entropies.append(torch.special.entr(p_V).sum().double())
    return torch.stack(entropies)


def test_word_starts_are_heated_and_word_insides_are_cooled():
    """At level 1: word starts at T 3, insides of words at .7, the rest unchanged."""
    logits_V = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    classes = TokenClasses(np.array([1, 1, 2, 2, 0, 0], np.uint8))
    logits_RV = logits_V[None].clone()
    controls = controls_of(
        [({"law": "words", "level": 1.0, "min_p": 1e-3}, 1.0, frozenset())], [-1]
    )
    transform(logits_RV, controls, None, get_backend("cpu", token_classes=classes))
    p = logits_RV[0].softmax(0)
    ratios = [float(p[i] / p[i + 1]) for i in (0, 2, 4)]
    assert ratios == pytest.approx([math.exp(1 / 3), math.exp(1 / 0.7), math.exp(1.0)], rel=1e-4)


@BACKENDS
def test_constants_reach_the_law(kind):
    constants = LawConstants(word_start_rise=1.0, word_inside_fall=0.5)
    logits_RV = torch.tensor([[2.0, 1.0, 2.0, 1.0]])
    classes = TokenClasses(np.array([1, 1, 2, 2], np.uint8))
    controls = controls_of(
        [({"law": "words", "level": 1.0, "min_p": 1e-3}, 1.0, frozenset())], [-1]
    )
    transform(logits_RV, controls, None, kind("cpu", constants, classes))
    p = logits_RV[0].softmax(0)
    ratios = [float(p[i] / p[i + 1]) for i in (0, 2)]
    assert ratios == pytest.approx([math.exp(1 / 2), math.exp(1 / 0.5)], rel=1e-4)


@BACKENDS
def test_rows_of_other_laws_keep_their_bits_in_a_mixed_batch(kind):
    logits_RV = make_rows(["gaussian", "few", "zipf"], 300, seed=1)
    backend = kind("cpu", token_classes=random_classes(300, 0))
    gated = ({"level": 0.7}, 0.8, frozenset({3}))
    words = ({"law": "words", "level": 0.7}, 0.8, frozenset({3}))
    alone_RV, mixed_RV = logits_RV.clone(), logits_RV.clone()
    transform(alone_RV, controls_of([gated] * 3, [1, 2, 3]), None, backend)
    transform(mixed_RV, controls_of([gated, words, gated], [1, 2, 3]), None, backend)
    assert torch.equal(mixed_RV[::2], alone_RV[::2])
    assert not torch.equal(mixed_RV[1], alone_RV[1])


def test_last_tokens_without_token_classes_are_refused():
    with pytest.raises(ValueError, match="a backend without token classes"):
        transform(
            torch.zeros(1, 8), controls_of([({"law": "words", "level": 1}, 1.0, frozenset())], [1])
        )
