"""Phrases as an automaton over tokens (Aho and Corasick 1975), and the chance of their completion.

    automaton = build(patterns, vocabulary=len(tokenizer))
    found = completions(automaton, tokens)              where which phrase ends
    harms = count_harms(automaton, texts)               h_k(s), on the model's own answers

A pattern is one tokenisation of a phrase; a phrase has several (`dftserve.styles.spellings`). A
state is the longest end of a text that begins a pattern; 0, the root, is the empty one. Where the
text goes on otherwise than any pattern, the automaton falls back to the next shorter such end:
these links are followed when the automaton is built, so that a step is one look-up.

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
"""How many visits of a state what is known of its likes counts for."""


@dataclass(frozen=True)
class Pattern:
    """One tokenisation of a phrase."""

    phrase: int
    tokens: tuple[int, ...]
    done: tuple[int, ...]
    """Characters of the phrase that stand after each of the tokens; the last: all of them. States
    of one phrase that are equally far lend their counts to each other."""


@dataclass(frozen=True, eq=False)
class Automaton:
    """Rows as in `Profile`, and what each state is."""

    vocabulary: int
    root_next_V: NDArray[np.int32]
    row_start_A: NDArray[np.int32]
    row_token_N: NDArray[np.int32]
    row_next_N: NDArray[np.int32]
    depth_A: tuple[int, ...]
    """Tokens of a state."""
    ends_A: tuple[tuple[tuple[int, int], ...], ...]
    """Of each state, the phrases that are complete in it, each with the tokens of its longest
    pattern there."""
    within_A: tuple[tuple[tuple[int, int], ...], ...]
    """Of each state, the phrases that are begun or complete in it, rising, each with the
    characters of it that stand."""

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
    """The automaton of patterns.

    Raises:
        ProfileError: a pattern without tokens or with one beyond the vocabulary; too many states.
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
            # Two phrases' patterns share states; two of one phrase may, equally far.
            own_within[state][pattern.phrase] = done
        own_ends[state][pattern.phrase] = len(pattern.tokens)
    if len(children) > MOST_STATES:
        raise ProfileError(
            f"phrases: got {len(children):,} states of their tokens; accepted: at most "
            f"{MOST_STATES:,}. Give fewer phrases."
        )
    rows, ends, within = _linked(children, own_ends, own_within)
    return _packed(vocabulary, children[0], rows, depth, ends, within)


def _linked(
    children: list[dict[int, int]],
    own_ends: list[dict[int, int]],
    own_within: list[dict[int, int]],
) -> tuple[list[dict[int, int]], list[dict[int, int]], list[dict[int, int]]]:
    """Rows, ends and phrases of each state with those of the shorter ends of the same text."""
    rows: list[dict[int, int]] = [{} for _ in children]
    ends, within = list(own_ends), list(own_within)
    failure = [0] * len(children)
    waiting = deque(children[0].values())
    while waiting:
        state = waiting.popleft()
        shorter = failure[state]
        rows[state] = {**rows[shorter], **children[state]}
        # What a longer end says of a phrase goes before: it is further.
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
    """(phrase, first token's place, last token's place) of each occurrence, by its end. One that
    completes several patterns of a phrase at a place is one, of the longest."""
    return _ends_on(automaton, automaton.walk(tokens))


def _ends_on(automaton: Automaton, path: Sequence[int]) -> list[tuple[int, int, int]]:
    ends = automaton.ends_A
    return [
        (phrase, place + 1 - length, place)
        for place, state in enumerate(path)
        for phrase, length in ends[state]
    ]


def count_harms(automaton: Automaton, texts: Iterable[Sequence[int]]) -> Harms:
    """h_k(s) as counted on texts: of the visits of s, the share from which phrase k, as begun
    there, was completed.

    A state that was visited seldom leans, by `PRIOR_VISITS`, on all states in which the phrase
    stands equally far, and these, by one visit, on a chance of one half for each token that it
    still lacks. A state that completes a phrase has 1.

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
    lacking = _lacking(automaton)
    start, phrases, chances = [0], [], []
    for state, begun in enumerate(automaton.within_A):
        ended = dict(automaton.ends_A[state])
        for phrase, done in begun:
            hit, visited = pooled[phrase, done]
            alike = (hit + 0.5 ** lacking[phrase, done]) / (visited + 1)
            chance = (hits.get((state, phrase), 0) + PRIOR_VISITS * alike) / (
                visits_A[state] + PRIOR_VISITS
            )
            phrases.append(phrase)
            chances.append(1.0 if phrase in ended else chance)
        start.append(len(phrases))
    return Harms(
        np.array(start, np.int32), np.array(phrases, np.int32), np.array(chances, np.float32)
    )


def _lacking(automaton: Automaton) -> dict[tuple[int, int], int]:
    """For (phrase, characters that stand): how many steps of its states are still to come."""
    steps: defaultdict[int, set[int]] = defaultdict(set)
    for begun in automaton.within_A:
        for phrase, done in begun:
            steps[phrase].add(done)
    return {
        (phrase, done): len(all_done) - 1 - place
        for phrase, all_done in steps.items()
        for place, done in enumerate(sorted(all_done))
    }
