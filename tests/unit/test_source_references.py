"""References: their rows are the empirical conditional frequencies."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.targets import references
from dftserve.targets.document import Document
from dftserve.targets.references import References

V = 6


def answer(prompt, tokens, trained=None, group=""):
    trained_N = np.array([False] * len(prompt) + [True, *(trained or [True] * len(tokens))[1:]])
    return Document(np.array([*prompt, *tokens], np.int32), trained_N, group, has_prompt=True)


@st.composite
def groups(draw):
    """Answers to a few prompts; two at least to the first."""
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=5)
    prompts = draw(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=2), min_size=1))[:3]
    answers = [answer(prompts[0], draw(tokens)) for _ in range(2)]
    for prompt in prompts:
        answers += [answer(prompt, draw(tokens)) for _ in range(draw(st.integers(0, 5)))]
    return answers


@settings(max_examples=300, deadline=None)
@given(groups())
def test_rows_are_the_empirical_conditional_frequencies(answers):
    source = References(answers, vocabulary=V)
    for doc, rows in zip(answers, source.read(answers), strict=True):
        for row, index in enumerate(doc.positions_T.tolist()):
            before = doc.tokens_N[:index].tolist()
            following = [
                int(other.tokens_N[index])
                for other in answers
                if other.prompt == doc.prompt
                and len(other.tokens_N) > index
                and other.tokens_N[:index].tolist() == before
            ]
            expected_V = [following.count(token) / len(following) for token in range(V)]
            torch.testing.assert_close(rows(row, row + 1)[0].exp(), torch.tensor(expected_V))


@settings(max_examples=100, deadline=None)
@given(groups())
def test_rows_sum_to_one_and_chunks_equal_the_whole(answers):
    rows, count = (
        References(answers, vocabulary=V).read(answers[:1])[0],
        len(answers[0].positions_T),
    )
    assert float(rows(0, count).logsumexp(1).abs().max()) < 1e-6
    torch.testing.assert_close(torch.cat([rows(i, i + 1) for i in range(count)]), rows(0, count))


def test_frequencies_are_conditional_on_untrained_tokens_too():
    """In a conversation of two answers, the second depends on the first and on the question."""
    marks = [True, False, True]
    answers = [
        answer([5], [0, 1, 2], marks),
        answer([5], [0, 2, 1], marks),
        answer([5], [1, 1, 0], marks),
    ]
    rows_TV = References(answers, vocabulary=V).read(answers[:1])[0](0, 2).exp()
    torch.testing.assert_close(rows_TV[0, :3], torch.tensor([2 / 3, 1 / 3, 0.0]))
    torch.testing.assert_close(rows_TV[1, :3], torch.tensor([0.0, 0.0, 1.0]))


def test_a_plain_text_is_no_reference():
    """All texts, held-out ones included, begin with the same token, which is no prompt."""
    texts = [
        Document(np.array([3, *tokens], np.int32), np.arange(3) > 0) for tokens in ([0, 1], [2, 1])
    ]
    answers = [answer([3], [0, 1]), answer([3], [1, 1])]
    source = References([*texts, *answers], vocabulary=V)
    for text, rows in zip(texts, source.read(texts), strict=True):
        own_TV = torch.nn.functional.one_hot(torch.from_numpy(text.tokens_N[1:]).long(), V).float()
        torch.testing.assert_close(rows(0, 2).exp(), own_TV)
    first_V = source.read(answers[:1])[0](0, 1)[0].exp()
    assert first_V.tolist() == pytest.approx([0.5, 0.5, 0, 0, 0, 0])
    assert source.describe() == References(answers, vocabulary=V).describe()
    with pytest.raises(ValueError, match="no two to the same"):
        References(texts, vocabulary=V)


def test_answers_of_another_group_are_no_references_even_to_an_equal_prompt():
    """A group is either trained on or held out as a whole."""
    trained = [answer([5], [0, 1], group="a"), answer([5], [1, 1], group="a")]
    heldout = [answer([5], [2, 1], group="b")]
    first_V = References([*trained, *heldout], vocabulary=V).read(trained)[0](0, 1)[0].exp()
    assert first_V.tolist() == pytest.approx([0.5, 0.5, 0, 0, 0, 0])


def test_descriptions_of_different_answers_differ():
    one = [answer([5], [0, 1]), answer([5], [0, 2])]
    two = [answer([5], [0, 1]), answer([5], [0, 3])]
    assert (
        References(one, vocabulary=V).describe() == References(one[::-1], vocabulary=V).describe()
    )
    assert References(one, vocabulary=V).describe() != References(two, vocabulary=V).describe()


def test_invalid_answers_are_refused():
    answers = [answer([5], [0, 1]), answer([5], [0, 2])]
    with pytest.raises(ValueError, match="no two to the same"):
        References([answer([5], [0]), answer([4], [0])], vocabulary=V)
    with pytest.raises(ValueError, match="no two to the same"):
        References([], vocabulary=V)
    with pytest.raises(ValueError, match="token 5"):
        References(answers, vocabulary=5)
    source = References(answers, vocabulary=V)
    with pytest.raises(ValueError, match="2 first tokens of an answer are no reference's"):
        source.read([answer([5], [0, 3, 1])])
    with pytest.raises(ValueError, match="its prompt has 0"):
        source.read([answer([4], [0, 3, 1])])


def test_prefixes_are_held_only_of_prompts_that_are_read_and_have_two_answers(monkeypatch):
    """A single answer is its own distribution; of the others, the last few are held."""
    nodes = []

    class Counted(references.Node):
        def __init__(self):
            super().__init__()
            nodes.append(weakref.ref(self))

    monkeypatch.setattr(references, "Node", Counted)
    monkeypatch.setattr(references, "TRIES", 2)
    single = [answer([3, 3, n], [0, 1, 2] * 9, group=f"{n}") for n in range(50)]
    pairs = [answer([4, n], [0, 1, 2, n % 2], group=f"{n}") for n in range(5) for _ in range(2)]
    source = References([*single, *pairs], vocabulary=60)
    for doc, rows in zip(single, source.read(single), strict=True):
        assert rows(0, 27).argmax(dim=1).tolist() == doc.labels_T.tolist()
        assert rows(0, 27).amax(dim=1).tolist() == [0.0] * 27
    assert not nodes
    source.read(pairs)
    gc.collect()
    assert sum(each() is not None for each in nodes) == 2 * 5  # A root and four tokens of each.
    other = answer([3, 3, 0], [0, 2, 2], group="0")
    with pytest.raises(ValueError, match=r"the 2 first tokens .* \(its prompt has 1\)"):
        source.read([other])
