"""How a phrase is tokenised, and what of it the automaton finds in texts."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dftserve.styles.automaton import build
from dftserve.styles.spellings import Finder, compare, encode, spell

MERGED = ["Ġa", "Ġtestament", "Ġto", "Ġof", '"A', "o!", "a", "to"]
"""Tokens beside single bytes; `"A` and `o!` hold more than a word."""


@pytest.fixture(scope="module")
def tokenizer():
    """BPE over bytes whose words are not split from marks, as no pre-tokenizer does it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(letters)}
    merges = []
    for token in MERGED:
        for end in range(2, len(token) + 1):
            if token[:end] not in vocabulary:
                vocabulary[token[:end]] = len(vocabulary)
                merges.append((token[: end - 1], token[end - 1]))
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


PHRASES = ["a testament to", "don't"]
TEXTS = [
    "It was a testament to her. A testament to him.",
    '"A testament to us," he said.\nA testament to them',
    "they don't; they don’t; Don't they?",
    "a testament to!",
    "no testament to it, a testament, to that",
]


def made(tokenizer, seen=()):
    patterns = spell(tokenizer, PHRASES, seen=seen)
    return patterns, build(patterns, vocabulary=len(tokenizer))


def test_every_way_of_writing_is_found(tokenizer):
    _, automaton = made(tokenizer)
    found = compare(automaton, Finder(PHRASES), TEXTS, encode(tokenizer, TEXTS))
    assert (found.searched, found.matched, found.both) == (8, 8, 8)
    assert found.recall == found.precision == 1


def test_a_token_that_holds_a_mark_too_belongs_to_the_phrase(tokenizer):
    patterns, _ = made(tokenizer)
    written = {tokenizer.decode(pattern.tokens) for pattern in patterns if pattern.phrase == 0}
    assert {'"A testament to', " a testament to", "A testament to"} <= written
    assert all(pattern.done[-1] == len(PHRASES[pattern.phrase]) for pattern in patterns)
    assert all(list(p.done) == sorted(p.done) for p in patterns)


def test_what_no_surrounding_shows_is_counted_as_missed_and_seen_in_texts(tokenizer):
    text = "they say A TESTAMENT TO that"
    for seen, recall in (((), 0.0), ((text,), 1.0)):
        _, automaton = made(tokenizer, seen)
        found = compare(automaton, Finder(PHRASES), [text], encode(tokenizer, [text]))
        assert found.recall == recall
    _, automaton = made(tokenizer)
    found = compare(automaton, Finder(PHRASES), [text], encode(tokenizer, [text]))
    assert found.missed == {"A TESTAMENT TO": 1}


def test_the_search_is_for_words_and_not_for_letters():
    finder = Finder(PHRASES)
    assert list(finder.found("Panama testament to")) == []
    assert list(finder.found("a testament together")) == []
    assert list(finder.found("a  testament\nto")) == [(0, 0, 15)]


def test_a_tokenizer_without_places_is_refused():
    with pytest.raises(ValueError, match=r"got int, which does not report the offsets"):
        encode(3, ["text"])


def test_a_phrase_that_begins_another_is_found_alone_and_within_it(tokenizer):
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
def test_other_languages_are_found_where_blanks_part_their_words(tokenizer, phrase, text):
    automaton = build(spell(tokenizer, [phrase]), vocabulary=len(tokenizer))
    found = compare(automaton, Finder([phrase]), [text], encode(tokenizer, [text]))
    assert found.searched >= 1
    assert found.recall == 1
