"""Combinators against their formulas in fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.targets.combine import Geomix, Mix, Temper
from dftserve.targets.document import Document
from dftserve.targets.served import ServedTeacher
from dftserve.targets.source import DenseSource

V, N = 11, 9
DOC = Document(np.arange(N, dtype=np.int32), np.arange(N) > 0)


class Fixed(DenseSource):
    """Random rows; some tokens are impossible, never token 0."""

    def __init__(self, seed, vocabulary=V, holes=0.3):
        generator = torch.Generator().manual_seed(seed)
        logits_TV = 3 * torch.randn(N - 1, vocabulary, generator=generator)
        hole_TV = torch.rand(N - 1, vocabulary, generator=generator) < holes
        hole_TV[:, 0] = False
        self.rows_TV = logits_TV.masked_fill(hole_TV, -torch.inf).log_softmax(1)
        self.vocabulary = vocabulary
        self.seed = seed

    def describe(self):
        return {"seed": self.seed}

    def read(self, documents):
        return [lambda start, stop: self.rows_TV[start:stop] for _ in documents]


def rows_of(source):
    return source.read([DOC])[0](0, N - 1)


seeds = st.lists(st.integers(0, 999), min_size=2, max_size=4)
weights = st.floats(0.05, 5.0)


@settings(max_examples=100, deadline=None)
@given(seeds, st.data())
def test_mix_and_geomix_equal_their_formulas(given_seeds, data):
    sources = [Fixed(seed) for seed in given_seeds]
    drawn = [data.draw(weights) for _ in sources]
    parts = [source.rows_TV.double().exp() for source in sources]
    mixed_TV = sum(w * part for w, part in zip(drawn, parts, strict=True)) / sum(drawn)
    torch.testing.assert_close(
        rows_of(Mix(sources, drawn)).double().exp(), mixed_TV, atol=1e-6, rtol=1e-5
    )
    product_TV = torch.stack([part**w for w, part in zip(drawn, parts, strict=True)]).prod(0)
    torch.testing.assert_close(
        rows_of(Geomix(sources, drawn)).double().exp(),
        product_TV / product_TV.sum(1, keepdim=True),
        atol=1e-6,
        rtol=1e-4,
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 999), st.floats(0.1, 4.0))
def test_temper_equals_its_formula_and_a_geomix_of_one_source(seed, power):
    source = Fixed(seed)
    expected_TV = source.rows_TV.double().exp() ** power
    result_TV = rows_of(Temper(source, power))
    torch.testing.assert_close(
        result_TV.double().exp(),
        expected_TV / expected_TV.sum(1, keepdim=True),
        atol=1e-6,
        rtol=1e-4,
    )
    twice_TV = rows_of(Geomix([source, source], [power / 2, power / 2]))
    torch.testing.assert_close(twice_TV, result_TV, atol=1e-4, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_combinations_nest_and_sum_to_one(given_seeds):
    sources = [Fixed(seed) for seed in given_seeds]
    source = Temper(Mix([Geomix(sources, [1.0] * len(sources)), sources[0]], [1, 2]), 0.7)
    assert float(rows_of(source).logsumexp(1).abs().max()) < 1e-5
    (targets,) = source.targets([DOC], k=3, draws=2, seeds=[0])
    assert len(targets) == N - 1


def test_a_mix_depends_only_on_proportions():
    sources = [Fixed(1), Fixed(2)]
    assert Mix(sources, [1, 3]).describe() == Mix(sources, [2, 6]).describe()
    assert Mix(sources, [1, 3]).describe() != Mix(sources[::-1], [1, 3]).describe()
    torch.testing.assert_close(rows_of(Mix(sources, [1, 3])), rows_of(Mix(sources, [2, 6])))


def test_invalid_combinations_are_refused():
    one, two = Fixed(1), Fixed(2)
    served = ServedTeacher("http://localhost:1", "m", vocabulary=V)
    for make, message in [
        (lambda: Mix([one], [1.0]), "two or more"),
        (lambda: Mix([one, Fixed(1, V + 1)], [1, 1]), "11, 12 tokens"),
        (lambda: Mix([one, served], [1, 1]), "lumped"),
        (lambda: Geomix([served, one], [1, 1]), "lumped"),
        (lambda: Temper(served, 0.5), "lumped"),
        (lambda: Mix([one, two], [1.0]), "2 numbers above 0"),
        (lambda: Mix([one, two], [1.0, 0.0]), "2 numbers above 0"),
        (lambda: Geomix([one, two], [1.0, -1.0]), "2 numbers above 0"),
        (lambda: Geomix([one, two], [1.0, float("nan")]), "2 numbers above 0"),
        (lambda: Temper(one, 0.0), "above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_a_product_without_a_possible_token_is_refused():
    one, two = Fixed(1), Fixed(2)
    one.rows_TV = torch.eye(N - 1, V).log()
    two.rows_TV = torch.eye(N - 1, V).roll(1, dims=1).log()
    with pytest.raises(ValueError, match="no token is possible"):
        rows_of(Geomix([one, two], [1, 1]))
