"""Phrases as an automaton over tokens (Aho and Corasick 1975), and the chance of their completion.

    automaton = build(patterns, vocabulary=len(tokenizer))
    found = completions(automaton, tokens)              where each phrase occurs
    harms = count_harms(automaton, texts)               h_k(s), on the model's own answers

A pattern is one tokenisation of a phrase; a phrase has several (`dftserve.styles.spellings`). A
state is the longest suffix of the text that is a prefix of a pattern; 0, the root, is the empty
suffix. Where the next token continues no pattern, the automaton falls back to the next shorter
such suffix. These failure links are resolved when the automaton is built, so that a step is one
look-up.

Shapes: V token ids, A states, N entries of their rows, H (state, phrase) pairs.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dftserve.styles.profile import MOST_STATES, Harms, ProfileError

PRIOR_VISITS = 2.0
"""Weight, in visits of a state, of the estimate pooled over similar states."""


@dataclass(frozen=True)
class Pattern:
    """One tokenisation of a phrase."""

    phrase: int
    tokens: tuple[int, ...]
    done: tuple[int, ...]
    """Characters of the phrase written after each token; after the last, all of them. States of
    one phrase with the same number of characters pool their counts."""


@dataclass(frozen=True, eq=False)
class Automaton:
    """Rows as in `Profile`, and a description of each state."""

    vocabulary: int
    root_next_V: NDArray[np.int32]
    row_start_A: NDArray[np.int32]
    row_token_N: NDArray[np.int32]
    row_next_N: NDArray[np.int32]
    depth_A: tuple[int, ...]
    """The number of tokens of each state."""
    ends_A: tuple[tuple[tuple[int, int], ...], ...]
    """For each state, the phrases that it completes, each with the length in tokens of its longest
    pattern there."""
    within_A: tuple[tuple[tuple[int, int], ...], ...]
    """For each state, the phrases that are begun or complete in it, in ascending order, each with
    the number of its characters written so far."""

    @property
    def states(self) -> int:
        return len(self.depth_A)

    def walk(self, tokens: Iterable[int]) -> list[int]:
        """The state after each token of a text, from the root."""
        rows = self._rows
        root, state, path = self.root_next_V, 0, []
        for token in tokens:
            state = rows[state].get(token, -1)
            if state < 0:
                state = int(root[token]) if token < self.vocabulary else 0
            path.append(state)
        return path

    @cached_property
    def _rows(self) -> list[dict[int, int]]:
        token, following = self.row_token_N.tolist(), self.row_next_N.tolist()
        return [
            dict(zip(token[a:b], following[a:b], strict=True))
            for a, b in pairwise(self.row_start_A.tolist())
        ]


def build(patterns: Sequence[Pattern], *, vocabulary: int) -> Automaton:
    """Build the automaton of the patterns.

    Raises:
        ProfileError: a pattern has no tokens or one outside the vocabulary, or there are too many
            states.
    """
    children: list[dict[int, int]] = [{}]
    own_ends: list[dict[int, int]] = [{}]
    own_within: list[dict[int, int]] = [{}]
    depth = [0]
    for pattern in patterns:
        _check(pattern, vocabulary)
        state = 0
        for token, done in zip(pattern.tokens, pattern.done, strict=True):
            if token not in children[state]:
                children[state][token] = len(children)
                children.append({})
                own_ends.append({})
                own_within.append({})
                depth.append(depth[state] + 1)
            state = children[state][token]
            # Patterns share states. Those of one phrase have the same `done` in a shared state.
            own_within[state][pattern.phrase] = done
        own_ends[state][pattern.phrase] = len(pattern.tokens)
    if len(children) > MOST_STATES:
        raise ProfileError(
            f"phrases: got {len(children):,} automaton states; accepted: at most "
            f"{MOST_STATES:,}. Give fewer phrases."
        )
    rows, ends, within = _linked(children, own_ends, own_within)
    return _packed(vocabulary, children[0], rows, depth, ends, within)


def _linked(
    children: list[dict[int, int]],
    own_ends: list[dict[int, int]],
    own_within: list[dict[int, int]],
) -> tuple[list[dict[int, int]], list[dict[int, int]], list[dict[int, int]]]:
    """Rows, ends and phrases of each state, including those of its shorter suffixes."""
    rows: list[dict[int, int]] = [{} for _ in children]
    ends, within = list(own_ends), list(own_within)
    failure = [0] * len(children)
    waiting = deque(children[0].values())
    while waiting:
        state = waiting.popleft()
        shorter = failure[state]
        rows[state] = {**rows[shorter], **children[state]}
        # A longer suffix is further into a phrase, so its entry replaces that of a shorter one.
        ends[state] = {**ends[shorter], **own_ends[state]}
        within[state] = {**within[shorter], **own_within[state]}
        for token, child in children[state].items():
            failure[child] = rows[shorter].get(token, children[0].get(token, 0))
            waiting.append(child)
    return rows, ends, within


def _packed(
    vocabulary: int,
    first: dict[int, int],
    rows: list[dict[int, int]],
    depth: list[int],
    ends: list[dict[int, int]],
    within: list[dict[int, int]],
) -> Automaton:
    root_next_V = np.zeros(vocabulary, np.int32)
    root_next_V[list(first)] = list(first.values())
    rows = [sorted(row.items()) for row in rows]  # type: ignore[misc]
    entries = [entry for row in rows for entry in row]
    token_N, next_N = np.array(entries, np.int32).reshape(-1, 2).T
    return Automaton(
        vocabulary=vocabulary,
        root_next_V=root_next_V,
        row_start_A=np.cumsum([0, *map(len, rows)], dtype=np.int32),
        row_token_N=np.ascontiguousarray(token_N),
        row_next_N=np.ascontiguousarray(next_N),
        depth_A=tuple(depth),
        ends_A=tuple(tuple(sorted(each.items())) for each in ends),
        within_A=tuple(tuple(sorted(each.items())) for each in within),
    )


def _check(pattern: Pattern, vocabulary: int) -> None:
    fits = all(0 <= token < vocabulary for token in pattern.tokens)
    if not (pattern.tokens and fits and len(pattern.done) == len(pattern.tokens)):
        raise ProfileError(
            f"pattern: got the tokens {list(pattern.tokens)[:8]}; accepted: one token or more, "
            f"each from 0 to {vocabulary - 1}. Is it the model's tokenizer?"
        )


# ── Counting ─────────────────────────────────────────────────────────────────────────────────────


def completions(automaton: Automaton, tokens: Sequence[int]) -> list[tuple[int, int, int]]:
    """(phrase, index of its first token, index of its last token) of each occurrence, sorted by
    end. Several patterns of a phrase that end in the same token are one occurrence, the longest."""
    return _ends_on(automaton, automaton.walk(tokens))


def _ends_on(automaton: Automaton, path: Sequence[int]) -> list[tuple[int, int, int]]:
    ends = automaton.ends_A
    return [
        (phrase, place + 1 - length, place)
        for place, state in enumerate(path)
        for phrase, length in ends[state]
    ]


def count_harms(automaton: Automaton, texts: Iterable[Sequence[int]]) -> Harms:
    """h_k(s) as counted on texts: the share of visits of state s after which phrase k, as begun
    there, was completed.

    The estimate of a state is shrunk, with a weight of `PRIOR_VISITS`, toward the pooled estimate
    of all states that are equally far into the phrase; that one is shrunk, with a weight of one
    visit, toward a chance of one half for each token still missing. A state that completes a
    phrase has 1.

    Args:
        texts: token ids of the model's own answers.
    """
    visits_A = np.zeros(automaton.states, np.int64)
    hits: defaultdict[tuple[int, int], int] = defaultdict(int)
    for tokens in texts:
        path = automaton.walk(tokens)
        np.add.at(visits_A, path, 1)
        covered = {
            (place, phrase)
            for phrase, first, last in _ends_on(automaton, path)
            for place in range(first, last + 1)
        }
        for place, phrase in covered:
            hits[path[place], phrase] += 1
    return _shrunk(automaton, visits_A.tolist(), hits)


def _shrunk(
    automaton: Automaton, visits_A: Sequence[int], hits: defaultdict[tuple[int, int], int]
) -> Harms:
    pooled: defaultdict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    for state, begun in enumerate(automaton.within_A):
        for phrase, done in begun:
            pool = pooled[phrase, done]
            pool[0] += hits.get((state, phrase), 0)
            pool[1] += visits_A[state]
    missing = _missing_steps(automaton)
    start, phrases, chances = [0], [], []
    for state, begun in enumerate(automaton.within_A):
        ended = dict(automaton.ends_A[state])
        for phrase, done in begun:
            hit, visited = pooled[phrase, done]
            prior = (hit + 0.5 ** missing[phrase, done]) / (visited + 1)
            chance = (hits.get((state, phrase), 0) + PRIOR_VISITS * prior) / (
                visits_A[state] + PRIOR_VISITS
            )
            phrases.append(phrase)
            chances.append(1.0 if phrase in ended else chance)
        start.append(len(phrases))
    return Harms(
        np.array(start, np.int32), np.array(phrases, np.int32), np.array(chances, np.float32)
    )


def _missing_steps(automaton: Automaton) -> dict[tuple[int, int], int]:
    """For each (phrase, characters written): how many steps are left until it is complete."""
    steps: defaultdict[int, set[int]] = defaultdict(set)
    for begun in automaton.within_A:
        for phrase, done in begun:
            steps[phrase].add(done)
    return {
        (phrase, done): len(all_done) - 1 - place
        for phrase, all_done in steps.items()
        for place, done in enumerate(sorted(all_done))
    }
