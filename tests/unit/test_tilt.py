"""The tilt: its phrase rates after the fit, and its rows against the formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dftserve.targets.document import Document
from dftserve.targets.served import ServedTeacher
from dftserve.targets.source import DenseSource
from dftserve.targets.tilt import Tilt, count, phrases_of

V = 5
PHRASES = {"single": [(4,)], "pair": [(0, 1), (2, 0, 1)], "triple": [(1, 2, 3)]}


class Uniform(DenseSource):
    vocabulary = V

    def describe(self):
        return {"kind": "uniform"}

    def read(self, documents):
        return [lambda start, stop: torch.full((stop - start, V), -math.log(V)) for _ in documents]


def texts(number, chances, seed=0, length=60):
    rng = np.random.default_rng(seed)
    marks_N = np.arange(length) > 0
    drawn = rng.choice(V, (number, length), p=chances).astype(np.int32)
    return [Document(tokens_N, marks_N) for tokens_N in drawn]


def tilted(**kw):
    human, samples = texts(300, [0.15, 0.2, 0.2, 0.2, 0.25], 1), texts(2000, [0.2] * 5)
    return Tilt(Uniform(), PHRASES, human=human, samples=samples, **kw), human, samples


def count_by_scan(document, phrases):
    """Count in plain Python: trained positions at which one of the phrases ends."""
    tokens = document.tokens_N.tolist()
    return sum(
        bool(document.trained_N[end])
        and any(
            tokens[max(0, end + 1 - len(phrase)) : end + 1] == list(phrase) for phrase in phrases
        )
        for end in range(len(tokens))
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, V - 1), min_size=2, max_size=30))
def test_counts_equal_those_of_a_plain_scan(tokens):
    document = Document(np.array(tokens, np.int32), np.arange(len(tokens)) > 0)
    for phrases in PHRASES.values():
        assert count(document, phrases) == count_by_scan(document, phrases)


def test_the_weighted_samples_have_the_human_phrase_rates():
    source, human, samples = tilted()
    weight_S = np.array(
        [
            math.exp(
                sum(
                    source.fit.strengths[name]
                    * (
                        count_by_scan(each, phrases)
                        - source.fit.human_rates[name] / 1000 * len(each.positions_T)
                    )
                    for name, phrases in PHRASES.items()
                )
            )
            for each in samples
        ]
    )
    for name, phrases in PHRASES.items():
        human_rate = 1000 * sum(count_by_scan(each, phrases) for each in human) / (59 * len(human))
        counts_S = np.array([count_by_scan(each, phrases) for each in samples])
        weighted_rate = 1000 * (weight_S @ counts_S) / (59 * weight_S.sum())
        assert source.fit.human_rates[name] == pytest.approx(human_rate, rel=1e-5)
        assert weighted_rate == pytest.approx(human_rate, rel=1e-3)
        assert source.fit.tilted_rates[name] == pytest.approx(human_rate, rel=1e-3)
    effective = weight_S.sum() ** 2 / (weight_S**2).sum()
    assert source.effective_samples == pytest.approx(effective, rel=1e-3)
    assert source.describe()["effective_samples"] == source.effective_samples


def test_rows_are_tilted_where_a_phrase_would_be_completed():
    source, human, _ = tilted()
    document = human[0]
    tokens = document.tokens_N.tolist()
    rows = source.read([document])[0]
    expected = []
    for position in document.positions_T.tolist():
        weight = [
            math.exp(
                sum(
                    source.fit.strengths[name]
                    for name, phrases in PHRASES.items()
                    if any(
                        [*tokens[:position], token][max(0, position + 1 - len(phrase)) :]
                        == list(phrase)
                        for phrase in phrases
                    )
                )
            )
            for token in range(V)
        ]
        expected.append([each / sum(weight) for each in weight])
    total = len(expected)
    torch.testing.assert_close(rows(0, total).exp(), torch.tensor(expected), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rows(7, 20), rows(0, total)[7:20])
    assert float(rows(0, total).logsumexp(1).abs().max()) < 1e-5


def test_equal_rates_give_no_tilt():
    samples = texts(200, [0.2] * 5)
    source = Tilt(Uniform(), PHRASES, human=samples, samples=samples)
    assert all(abs(strength) < 1e-4 for strength in source.fit.strengths.values())
    assert source.effective_samples == pytest.approx(200)


def test_strengths_stay_within_their_limit():
    source, _, _ = tilted(largest=0.05)
    assert max(map(abs, source.fit.strengths.values())) <= 0.05


def test_a_fit_with_few_effective_samples_warns_and_with_one_is_refused():
    human, samples = texts(50, [0.1, 0.1, 0.1, 0.1, 0.6], 1), texts(100, [0.2] * 5)
    with pytest.warns(UserWarning, match="are effective, under 10%"):
        Tilt(Uniform(), {"four": [(4,)]}, human=human, samples=samples, largest=0.6)
    with pytest.raises(ValueError, match="are effective; accepted: 2 or more"):
        Tilt(Uniform(), {"four": [(4,)]}, human=human, samples=samples)


def test_a_phrase_in_no_sample_gets_strength_0():
    human, samples = texts(50, [0.2] * 5, 1), texts(50, [0.25] * 4 + [0.0])
    with pytest.warns(UserWarning, match="no sample holds 'four'"):
        source = Tilt(Uniform(), {"four": [(4,)]}, human=human, samples=samples)
    assert source.fit.strengths == {"four": 0.0}
    assert source.fit.unseen == ("four",)


def test_invalid_arguments_are_refused():
    some = texts(5, [0.2] * 5)
    nothing = [Document(np.zeros(3, np.int32), np.zeros(3, bool))]
    served = ServedTeacher("http://localhost:1", "m", vocabulary=V)
    for base, phrases, human, samples, message in [
        (served, PHRASES, some, some, "lumped"),
        (Uniform(), {}, some, some, "no phrases"),
        (Uniform(), {"a": []}, some, some, "phrase 'a'"),
        (Uniform(), {"a": [()]}, some, some, "phrase 'a'"),
        (Uniform(), {"a": [(V,)]}, some, some, "phrase 'a'"),
        (Uniform(), PHRASES, nothing, some, "human: got 1 documents"),
        (Uniform(), PHRASES, some, [], "samples: got 0 documents"),
    ]:
        with pytest.raises(ValueError, match=message):
            Tilt(base, phrases, human=human, samples=samples)


def test_phrases_are_tokenised_with_and_without_a_space_before():
    pieces = {"a": 0, "b": 1, "Ġa": 2, "Ġb": 3}
    core = Tokenizer(models.BPE(vocab={**pieces, "Ġ": 4}, merges=[("Ġ", "a"), ("Ġ", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert phrases_of(tokenizer, ["a b", " a"]) == {
        "a b": [(0, 3), (2, 3)],
        " a": [(2,), (4, 2)],
    }
