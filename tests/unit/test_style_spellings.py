"""The tokenizations of a phrase, and how many of its occurrences the automaton finds in texts."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dftserve.styles.automaton import build
from dftserve.styles.spellings import Finder, compare, encode, spell

MERGED = ["Ġa", "Ġtestament", "Ġto", "Ġof", '"A', "o!", "a", "to"]
"""Tokens in addition to single bytes; `"A` and `o!` contain a mark as well as letters."""


@pytest.fixture(scope="module")
def tokenizer():
    """BPE over bytes without a pre-tokenizer that separates words from marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(letters)}
    merges = []
    for token in MERGED:
        for end in range(2, len(token) + 1):
            if token[:end] not in vocabulary:
                vocabulary[token[:end]] = len(vocabulary)
                merges.append((token[: end - 1], token[end - 1]))
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


PHRASES = ["a testament to", "don't"]
TEXTS = [
    "It was a testament to her. A testament to him.",
    '"A testament to us," he said.\nA testament to them',
    "they don't; they don’t; Don't they?",
    "a testament to!",
    "no testament to it, a testament, to that",
]


def patterns_and_automaton(tokenizer, seen=()):
    patterns = spell(tokenizer, PHRASES, seen=seen)
    return patterns, build(patterns, vocabulary=len(tokenizer))


def test_every_spelling_is_found(tokenizer):
    _, automaton = patterns_and_automaton(tokenizer)
    found = compare(automaton, Finder(PHRASES), TEXTS, encode(tokenizer, TEXTS))
    assert (found.searched, found.matched, found.both) == (8, 8, 8)
    assert found.recall == found.precision == 1


def test_a_token_that_also_contains_a_mark_belongs_to_the_phrase(tokenizer):
    patterns, _ = patterns_and_automaton(tokenizer)
    written = {tokenizer.decode(pattern.tokens) for pattern in patterns if pattern.phrase == 0}
    assert {'"A testament to', " a testament to", "A testament to"} <= written
    assert all(pattern.done[-1] == len(PHRASES[pattern.phrase]) for pattern in patterns)
    assert all(list(p.done) == sorted(p.done) for p in patterns)


def test_other_spellings_are_counted_as_missed_unless_texts_with_them_are_given(tokenizer):
    text = "they say A TESTAMENT TO that"
    for seen, recall in (((), 0.0), ((text,), 1.0)):
        _, automaton = patterns_and_automaton(tokenizer, seen)
        found = compare(automaton, Finder(PHRASES), [text], encode(tokenizer, [text]))
        assert found.recall == recall
    _, automaton = patterns_and_automaton(tokenizer)
    found = compare(automaton, Finder(PHRASES), [text], encode(tokenizer, [text]))
    assert found.missed == {"A TESTAMENT TO": 1}


def test_the_search_matches_whole_words():
    finder = Finder(PHRASES)
    assert list(finder.found("Panama testament to")) == []
    assert list(finder.found("a testament together")) == []
    assert list(finder.found("a  testament\nto")) == [(0, 0, 15)]


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ValueError, match=r"got int, which does not report the offsets"):
        encode(3, ["text"])


def test_a_phrase_that_begins_another_is_found_alone_and_in_the_other(tokenizer):
    phrases = ["a testament", "a testament to"]
    automaton = build(spell(tokenizer, phrases), vocabulary=len(tokenizer))
    texts = ["so a testament to her", "so a testament, too"]
    found = compare(automaton, Finder(phrases), texts, encode(tokenizer, texts))
    assert (found.searched, found.matched, found.both) == (3, 3, 3)


FOREIGN = {
    "French": ("à la lumière de", "Il vit, À la lumière de la lune, et à la lumière d'un feu."),
    "Russian": ("в тени", "Он жил в тени. В тени — тепло; в тениста нет."),
    "Greek": ("στη σκιά", "Ζει στη σκιά. Στη σκιά!"),
    "Korean": ("그림자 속에서", "그는 그림자 속에서 산다."),
    "Chinese": ("光影 交错", "光影 交错，很美。"),
}


@pytest.mark.parametrize(("phrase", "text"), FOREIGN.values(), ids=list(FOREIGN))
def test_phrases_of_languages_with_spaces_between_words_are_found(tokenizer, phrase, text):
    automaton = build(spell(tokenizer, [phrase]), vocabulary=len(tokenizer))
    found = compare(automaton, Finder([phrase]), [text], encode(tokenizer, [text]))
    assert found.searched >= 1
    assert found.recall == 1
