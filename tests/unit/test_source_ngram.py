"""The n-gram source, compared with a plain scan of the corpus without the document."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.targets import ngram
from dftserve.targets.document import Document
from dftserve.targets.ngram import Ngram
from dftserve.targets.source import DenseSource

V = 7


def document(tokens, trained=None):
    trained_N = np.ones(len(tokens), bool) if trained is None else np.array(trained, bool)
    trained_N[0] = False
    return Document(np.array(tokens, np.int32), trained_N)


@st.composite
def documents(draw):
    tokens = draw(st.lists(st.integers(0, V - 1), min_size=2, max_size=20))
    return document(tokens, [draw(st.integers(0, 4)) > 0 for _ in tokens])


corpora = st.lists(documents(), min_size=1, max_size=6).filter(
    lambda corpus: any(each.trained_N.any() for each in corpus)
)


def rows_of(source, doc):
    return source.read([doc])[0](0, len(doc.positions_T))


def scan_rows(corpus, doc, order, min_count):
    """The definition in plain Python: for each position, counts in the other documents."""
    text = doc.tokens_N.tolist()
    others = [
        (each.tokens_N.tolist(), each.trained_N.tolist())
        for each in corpus
        if each.tokens_N.tolist() != text
    ]
    rows = []
    for index in doc.positions_T.tolist():
        row = [1 / V] * V
        for length in range(order):
            if length > index:
                break
            context = text[index - length : index]
            follows = Counter(
                tokens[i]
                for tokens, trained in others
                for i in range(max(length, 1), len(tokens))
                if trained[i] and tokens[i - length : i] == context
            )
            if sum(follows.values()) < (min_count if length else 1):
                break
            whole = sum(follows.values()) + len(follows)
            row = [(follows[w] + len(follows) * row[w]) / whole for w in range(V)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, V)


@settings(max_examples=300, deadline=None)
@given(corpora, documents(), st.integers(1, 6), st.integers(1, 3))
def test_rows_equal_a_scan_without_the_document(corpus, stranger, order, min_count):
    source = Ngram(corpus, vocabulary=V, order=order, min_count=min_count)
    for doc in [*corpus, corpus[0], stranger]:
        expected_TV = scan_rows(corpus, doc, order, min_count)
        found_TV = rows_of(source, doc).double().exp()
        torch.testing.assert_close(found_TV, expected_TV, atol=1e-6, rtol=1e-5)
        labels_T1 = torch.from_numpy(doc.labels_T.astype(np.int64))[:, None]
        own_T = torch.from_numpy(source.token_logprobs([doc])[0]).exp()
        torch.testing.assert_close(own_T, expected_TV.gather(1, labels_T1)[:, 0])


@settings(max_examples=40, deadline=None)
@given(corpora, documents(), st.integers(1, 6), st.integers(1, 3))
def test_a_lower_order_has_the_rows_of_a_source_of_that_order(corpus, stranger, order, min_count):
    source = Ngram(corpus, vocabulary=V, order=6, min_count=min_count).at_order(order)
    own = Ngram(corpus, vocabulary=V, order=order, min_count=min_count)
    assert source.describe() == own.describe()
    for doc in [corpus[0], stranger]:
        torch.testing.assert_close(rows_of(source, doc), rows_of(own, doc))
    with pytest.raises(ValueError, match="order: got 4; accepted: from 1 to 3"):
        Ngram(corpus, vocabulary=V, order=3).at_order(4)


@settings(max_examples=60, deadline=None)
@given(corpora, documents(), st.integers(1, 6), st.integers(1, 3))
def test_matches_equal_a_scan_without_the_document(corpus, stranger, order, min_count):
    source = Ngram(corpus, vocabulary=V, order=order, min_count=min_count)
    for doc in [*corpus, stranger]:
        length_T, count_T = source.matches(doc)
        matches = list(zip(length_T.tolist(), count_T.tolist(), strict=True))
        assert matches == scan_matches(corpus, doc, order, min_count)


def scan_matches(corpus, doc, order, min_count):
    text, matches = doc.tokens_N.tolist(), []
    others = [each for each in corpus if each.tokens_N.tolist() != text]
    for index in doc.positions_T.tolist():
        longest = (0, 0)
        for length in range(1, min(order - 1, index) + 1):
            follows = sum(
                each.tokens_N.tolist()[i - length : i] == text[index - length : index]
                for each in others
                for i in each.positions_T.tolist()
                if i >= length
            )
            longest = (length, follows) if follows >= min_count else longest
        matches.append(longest)
    return matches


@settings(max_examples=100, deadline=None)
@given(corpora, documents())
def test_a_documents_own_text_does_not_influence_its_target(others, doc):
    """Its rows are the same without it and with two copies of it in the corpus."""
    others = [each for each in others if each.tokens_N.tolist() != doc.tokens_N.tolist()]
    if not any(each.trained_N.any() for each in others):
        return
    within = rows_of(Ngram([doc, *others, doc], vocabulary=V), doc)
    torch.testing.assert_close(within, rows_of(Ngram(others, vocabulary=V), doc))


@settings(max_examples=20, deadline=None)
@given(corpora, st.lists(st.sampled_from(["", "a", "b"]), min_size=7, max_size=7), documents())
def test_a_left_out_group_does_not_influence_the_targets_of_its_documents(corpus, groups, stranger):
    """Rows are the same without the group and copies of its texts in the corpus, and those of a
    document outside the corpus are too."""
    corpus = [replace(each, group=group) for each, group in zip(corpus, groups[1:], strict=False)]
    source = Ngram(corpus, vocabulary=V, min_count=1, leaves_out="group")
    for doc in [*corpus, replace(stranger, group=groups[0])]:
        same_group = [each for each in corpus if doc.group and each.group == doc.group]
        left_out = [each.tokens_N.tolist() for each in (doc, *same_group)]
        others = [each for each in corpus if each.tokens_N.tolist() not in left_out]
        if any(each.trained_N.any() for each in others):
            without = Ngram(others, vocabulary=V, min_count=1)
            for each in (source, source.at_order(3)):
                expected_source = without.at_order(each.order)
                torch.testing.assert_close(rows_of(each, doc), rows_of(expected_source, doc))
                for got, expected in zip(
                    each.matches(doc), expected_source.matches(doc), strict=True
                ):
                    np.testing.assert_array_equal(got, expected)
                own_T = each.token_logprobs([doc])[0]
                np.testing.assert_allclose(own_T, expected_source.token_logprobs([doc])[0])


def test_each_group_has_its_own_rows_if_there_are_more_than_are_cached(monkeypatch):
    monkeypatch.setattr(ngram, "KEPT", 1)
    random = np.random.default_rng(0)
    corpus = [replace(document(random.integers(0, V, 20)), group=f"{n % 3}") for n in range(6)]
    source = Ngram(corpus, vocabulary=V, leaves_out="group")
    for doc in [*corpus, *reversed(corpus)]:
        others = [each for each in corpus if each.group != doc.group]
        torch.testing.assert_close(rows_of(source, doc), rows_of(Ngram(others, vocabulary=V), doc))


@settings(max_examples=50, deadline=None)
@given(corpora, st.integers(0, 5), st.integers(0, 5))
def test_chunks_equal_the_whole(corpus, first, second):
    doc = corpus[0]
    start, stop = sorted(min(x, len(doc.positions_T)) for x in (first, second))
    source = Ngram(corpus, vocabulary=V)
    rows = source.read([doc])[0]
    torch.testing.assert_close(rows(start, stop), rows_of(source, doc)[start:stop])


def test_every_row_sums_to_one_and_is_positive():
    rng = np.random.default_rng(0)
    corpus = [document(rng.integers(0, V, 40)) for _ in range(5)]
    for doc in [*corpus, document(rng.integers(0, V, 40))]:
        logprobs_TV = rows_of(Ngram(corpus, vocabulary=V + 90), doc)
        assert logprobs_TV.dtype == torch.float32
        assert bool(logprobs_TV.isfinite().all())
        assert float(logprobs_TV.logsumexp(1).abs().max()) < 1e-5


def test_a_single_document_gives_uniform_rows():
    doc = document([1, 2, 3, 1, 2, 3])
    torch.testing.assert_close(
        rows_of(Ngram([doc, doc], vocabulary=V), doc), torch.full((5, V), -math.log(V))
    )


def test_descriptions_of_different_corpora_and_parameters_differ():
    one, two = [document([1, 2, 3])], [document([1, 2, 4])]
    sources = [
        Ngram(one, vocabulary=V),
        Ngram(two, vocabulary=V),
        Ngram(one, vocabulary=V, order=3),
        Ngram(one, vocabulary=V, min_count=1),
    ]
    assert len({str(each.describe()) for each in sources}) == 4
    assert Ngram(one, vocabulary=V).describe() == sources[0].describe()


def test_a_description_depends_on_the_groups_and_not_on_their_names():
    def described(*groups):
        tokens = ([1, 2, 3], [1, 2, 4])
        corpus = [replace(document(t), group=g) for t, g in zip(tokens, groups, strict=True)]
        return Ngram(corpus, vocabulary=V, leaves_out="group").describe()

    assert described("a", "a") == described("c", "c") != described("a", "b")


def test_invalid_arguments_are_refused():
    doc = document([1, 2, 3])
    for call, message in [
        (lambda: Ngram([], vocabulary=V), "no documents"),
        (lambda: Ngram([doc], vocabulary=3), "token 3"),
        (lambda: Ngram([doc], vocabulary=V, order=0), "order 0"),
        (lambda: Ngram([doc], vocabulary=V, min_count=0), "min_count 0"),
        (lambda: Ngram([document([1, 2], [0, 0])], vocabulary=V), "trained"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_work_is_a_few_sorts_and_the_entries_of_the_contexts(monkeypatch):
    """100k tokens, order 6: four sorts and one per level. A scan would read the whole text for each
    row and level."""
    rng = np.random.default_rng(0)
    tokens = (rng.zipf(1.2, 100_000) - 1).clip(max=4095)
    corpus = [document(part) for part in tokens.reshape(200, -1)]
    work: Counter[str] = Counter()

    def count_calls(module, name, size):
        original = getattr(module, name)

        def counting_call(*args, **kwargs):
            result = original(*args, **kwargs)
            work[name] += size(args, result)
            return result

        monkeypatch.setattr(module, name, counting_call)

    count_calls(np, "argsort", lambda args, _: len(args[0]))
    count_calls(np, "unique", lambda args, _: len(args[0]))
    source = Ngram(corpus, vocabulary=4096)
    text = 200 + 100_000
    assert work["argsort"] == 4 * text
    assert work["unique"] <= 5 * text
    count_calls(ngram, "_entries", lambda _, result: len(result[0]))
    for rows in source.read(corpus[:8]):
        rows(0, 499)
    per_row_and_level = work["_entries"] / (8 * 499 * 5)
    assert 1 < per_row_and_level < 0.01 * text


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 4), st.integers(1, 3), st.integers(1, V))
def test_targets_equal_those_of_the_dense_rows(corpus, order, min_count, k):
    """Up to float32 precision. Ties may be in another order, and the draws differ."""
    source = Ngram(corpus, vocabulary=V, order=order, min_count=min_count)
    documents = [doc for doc in corpus if len(doc.positions_T)]
    expected = DenseSource.targets(source, documents, k=k, draws=2, seeds=range(len(documents)))
    targets = source.targets(documents, k=k, draws=2, seeds=range(len(documents)))
    for doc, dense, sparse in zip(documents, expected, targets, strict=True):
        rows_TV = rows_of(source, doc).numpy()
        at_top_TK = np.take_along_axis(rows_TV, sparse.top_ids_TK, axis=1)
        np.testing.assert_allclose(at_top_TK, dense.top_logprobs_TK, atol=1e-4)
        assert all(len(set(ids)) == k for ids in sparse.top_ids_TK.tolist())
        for name in ("top_logprobs_TK", "token_logprob_T", "entropy_T"):
            np.testing.assert_allclose(getattr(sparse, name), getattr(dense, name), atol=1e-4)
        tails = np.exp(sparse.tail_logprob_T), np.exp(dense.tail_logprob_T)
        np.testing.assert_allclose(*tails, atol=1e-5)
        if k < V:
            is_top_TMK = sparse.tail_ids_TM[:, :, None] == sparse.top_ids_TK[:, None, :]
            assert not is_top_TMK.any()


def test_draws_follow_the_distribution_of_the_other_tokens():
    """χ² with at most V − 3 degrees of freedom in each row. The limit is six standard deviations
    above its mean: fewer than one false alarm in a million rows."""
    random = np.random.default_rng(3)
    corpus = [document(random.integers(0, V, 40)) for _ in range(4)]
    source, draws = Ngram(corpus, vocabulary=V, order=3, min_count=1), 20_000
    targets = source.targets(corpus[:1], k=2, draws=draws, seeds=[5])[0]
    rest_TV = np.exp(rows_of(source, corpus[0]).double().numpy())
    np.put_along_axis(rest_TV, targets.top_ids_TK, 0.0, axis=1)
    rest_TV /= rest_TV.sum(axis=1, keepdims=True)
    for ids_M, rest_V in zip(targets.tail_ids_TM, rest_TV, strict=True):
        seen_V, expected_V = np.bincount(ids_M, minlength=V), draws * rest_V
        possible_V = expected_V > 0
        degrees = int(possible_V.sum()) - 1
        chi = float(((seen_V - expected_V)[possible_V] ** 2 / expected_V[possible_V]).sum())
        assert chi < degrees + 6 * math.sqrt(2 * degrees) + 12


def test_no_row_is_made_dense(monkeypatch):
    corpus = [document([0, 1, 2, 3, 1, 2]), document([1, 2, 3, 4, 5, 6])]
    source = Ngram(corpus, vocabulary=V)
    monkeypatch.setattr(source, "_adds", None)
    assert len(source.targets(corpus, k=3, draws=3, seeds=[0, 1])[0]) == 5
