"""Small profiles from phrases of token ids, built directly from the automaton's definition."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ToyProfile:
    """As `style.ProfileArrays`."""

    phrases: tuple[tuple[int, ...], ...]
    states: tuple[tuple[int, ...], ...]
    """The prefixes of the phrases; the first is the empty one, the root."""
    log_factor_A: np.ndarray
    vocabulary: int
    root_next_V: np.ndarray
    root_log_factor_V: np.ndarray
    row_start_A: np.ndarray
    row_token_N: np.ndarray
    row_next_N: np.ndarray
    row_log_factor_N: np.ndarray
    unigram_V: np.ndarray
    bigram_context_C: np.ndarray
    bigram_start_C: np.ndarray
    bigram_token_M: np.ndarray
    bigram_delta_M: np.ndarray
    delta_VV: np.ndarray
    """δ(v|u) at [u, v], written out."""

    def state(self, text) -> int:
        """The longest suffix of the text that is a prefix of a phrase."""
        endings = (tuple(text[start:]) for start in range(len(text) + 1))
        return next(self.states.index(ending) for ending in endings if ending in self.states)

    def factors(self, text) -> np.ndarray:
        """F of each token after the text."""
        text = list(text)
        after = [self.state([*text, v]) for v in range(self.vocabulary)]
        return np.exp(self.log_factor_A[after].astype(np.float64))


def toy_profile(phrases, log_factors, vocabulary, unigram_V=None, bigrams=None) -> ToyProfile:
    """`log_factors`: by prefix of a phrase, 0 for others. `bigrams`: δ by context and token."""
    beginnings = {phrase[:n] for phrase in phrases for n in range(1, len(phrase) + 1)}
    states = ((), *sorted(beginnings))
    log_factor_A = np.array([log_factors.get(state, 0.0) for state in states], np.float32)

    def following(state, token) -> int:
        text = (*state, token)
        return next(
            states.index(text[start:]) for start in range(len(text) + 1) if text[start:] in states
        )

    root_next_V = np.array([following((), v) for v in range(vocabulary)], np.int32)
    rows = [
        [(v, n) for v in range(vocabulary) if (n := following(state, v)) != root_next_V[v]]
        for state in states
    ]
    entries = np.array([entry for row in rows for entry in row], np.int32).reshape(-1, 2)
    unigram_V = np.zeros(vocabulary) if unigram_V is None else unigram_V
    delta_VV = np.tile(np.asarray(unigram_V, np.float32), (vocabulary, 1))
    bigrams = bigrams or {}
    for context, row in bigrams.items():
        for token, delta in row.items():
            delta_VV[context, token] = delta
    contexts = sorted(bigrams)
    pairs = [pair for context in contexts for pair in sorted(bigrams[context].items())]
    return ToyProfile(
        phrases=tuple(phrases),
        states=states,
        log_factor_A=log_factor_A,
        vocabulary=vocabulary,
        root_next_V=root_next_V,
        root_log_factor_V=log_factor_A[root_next_V],
        row_start_A=np.cumsum([0, *map(len, rows)]).astype(np.int32),
        row_token_N=entries[:, 0].copy(),
        row_next_N=entries[:, 1].copy(),
        row_log_factor_N=log_factor_A[entries[:, 1]],
        unigram_V=np.asarray(unigram_V, np.float32),
        bigram_context_C=np.array(contexts, np.int32),
        bigram_start_C=np.cumsum([0, *(len(bigrams[c]) for c in contexts)]).astype(np.int32),
        bigram_token_M=np.array([token for token, _ in pairs], np.int32),
        bigram_delta_M=np.array([delta for _, delta in pairs], np.float32),
        delta_VV=delta_VV,
    )


def random_profile(seed: int, vocabulary: int, *, tilt: float = 2.0) -> ToyProfile:
    """Up to four overlapping phrases, factors of any size, δ for some tokens and pairs."""
    source = np.random.default_rng(seed)
    few = min(vocabulary, 4)
    phrases = tuple(
        tuple(source.integers(0, few, source.integers(1, 4)).tolist())
        for _ in range(source.integers(1, 5))
    )
    beginnings = {phrase[:n] for phrase in phrases for n in range(1, len(phrase) + 1)}
    log_factors = {each: -float(source.exponential(1.0)) for each in sorted(beginnings)}
    unigram_V = source.normal(0, tilt, vocabulary) * (source.random(vocabulary) < 0.5)
    bigrams = {
        int(context): {
            int(token): float(source.normal(0, tilt))
            for token in source.choice(vocabulary, min(vocabulary, 3), replace=False)
        }
        for context in source.choice(vocabulary, min(vocabulary, 3), replace=False)
    }
    return toy_profile(phrases, log_factors, vocabulary, unigram_V, bigrams)
