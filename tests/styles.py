"""Small style profiles for tests."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from dftserve.fingerprints import template_fingerprint, tokenizer_fingerprint
from dftserve.stories.grammar import generate
from dftserve.styles.automaton import Automaton, Pattern, build, count_harms
from dftserve.styles.profile import Harms, Phrase, Profile, Stored

PRINT = "a" * 64


def pattern(phrase: int, *tokens: int) -> Pattern:
    """A pattern whose tokens are all one character long."""
    return Pattern(phrase, tokens, tuple(range(1, len(tokens) + 1)))


PATTERNS = (pattern(0, 1, 2, 3), pattern(0, 4, 2, 3), pattern(1, 2, 5))


def stored(
    patterns=PATTERNS,
    *,
    log_ratio_P=(1.5, 0.5),
    vocabulary=8,
    texts=((1, 2, 3, 0, 1, 2, 5, 4, 2, 3),),
    **values,
) -> Stored:
    """A profile of patterns, with a tilt of two tokens and two bigrams."""
    automaton = build(patterns, vocabulary=vocabulary)
    harms = count_harms(automaton, texts)
    return Stored(
        profile=profile(automaton, harms, log_ratio_P, **values),
        harms=harms,
        counts={"words": 10},
        settings={"samples": 1},
        versions={"dftserve": "0"},
    )


def profile(automaton: Automaton, harms: Harms, log_ratio_P, **values) -> Profile:
    factor_A = harms.log_factors(np.array(log_ratio_P))
    unigram_V = np.zeros(automaton.vocabulary, np.float32)
    unigram_V[[1, 3]] = 0.5, -0.25
    made = Profile(
        name="small",
        vocabulary=automaton.vocabulary,
        tokenizer_fingerprint=PRINT,
        template_fingerprint=None,
        model="m",
        phrases=tuple(Phrase(f"phrase {k}", x, 2.0, 0.5) for k, x in enumerate(log_ratio_P)),
        root_next_V=automaton.root_next_V,
        root_log_factor_V=factor_A[automaton.root_next_V],
        row_start_A=automaton.row_start_A,
        row_token_N=automaton.row_token_N,
        row_next_N=automaton.row_next_N,
        row_log_factor_N=factor_A[automaton.row_next_N],
        unigram_V=unigram_V,
        bigram_context_C=np.array([0, 3], np.int32),
        bigram_start_C=np.array([0, 1, 2], np.int32),
        bigram_token_M=np.array([1, 0], np.int32),
        bigram_delta_M=np.array([1.0, -1.0], np.float32),
    )
    return replace(made, **values)


def of_stories(model_folder: Path) -> Stored:
    """The profile `habits` of the stories' model: frequent phrases of its stories, and a tilt of
    fifty tokens and a few pairs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    source = random.Random(0)
    texts = [tuple(tokenizer.encode(generate(source).text)) for _ in range(60)]
    runs = Counter(text[n : n + 3] for text in texts for n in range(len(text) - 2))
    frequent = [run for run, _ in runs.most_common(40)][::10]
    patterns = [pattern(number, *run) for number, run in enumerate(frequent)]
    vocabulary = len(tokenizer)
    made = stored(patterns, log_ratio_P=(2.0, 1.0, 0.5, 3.0), vocabulary=vocabulary, texts=texts)
    unigram_V = np.zeros(vocabulary, np.float32)
    tokens = [token for token, _ in Counter(t for text in texts for t in text).most_common(50)]
    unigram_V[tokens] = [source.uniform(-1.5, 1.5) for _ in tokens]
    followers = sorted({(text[n], text[n + 1]) for text in texts[:2] for n in range(20)})
    contexts = sorted({context for context, _ in followers})
    profile_ = replace(
        made.profile,
        name="habits",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        template_fingerprint=template_fingerprint(tokenizer),
        unigram_V=unigram_V,
        bigram_context_C=np.array(contexts, np.int32),
        bigram_start_C=np.searchsorted([c for c, _ in followers], [*contexts, np.inf]).astype(
            np.int32
        ),
        bigram_token_M=np.array([token for _, token in followers], np.int32),
        bigram_delta_M=np.array([source.uniform(-2, 2) for _ in followers], np.float32),
    )
    return replace(made, profile=profile_)
