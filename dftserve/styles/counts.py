"""Finds and tests the phrases that a model writes more often than people do.

    found = over_used(model, human, Choice(), known=read_lines(phrases))

Candidates are all runs of 2 to 6 words without punctuation inside, and a list of known phrases. A
text counts once in the tests, however often it contains a phrase, so that one text's refrain is not
taken for a habit. Phrases are ranked by the G statistic. Its χ² approximation is poor at counts of
about five, so p comes from the exact conditional test: the probability that a binomial draw of the
n occurrences, with the model's share of the words, has at least as many in the model's texts. False
discoveries are controlled by Benjamini and Hochberg's procedure over all eligible runs that are
frequent enough in both sides together, a criterion that does not depend on what is tested. Known
phrases are a family of tests of their own.

Left out are names (capitalised inside a sentence), runs with a digit, short runs of common words,
topics (written under few prompts, mostly under one, or repeatedly in a text), echoes of the prompt,
and runs that one of their words explains. Of a run and a longer run that contains it, the longer
one is chosen if it explains most of the shorter one's occurrences, otherwise the shorter one. Of
two runs that mostly overlap, the one with the larger G is chosen.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import xlogy

from dftserve.evaluate.metrics.stylometry import FUNCTION_WORDS
from dftserve.evaluate.text.tokenize import spans
from dftserve.evaluate.text.windows import Sample
from dftserve.styles.profile import LONGEST_PHRASE

Gram = tuple[str, ...]

SIZES = range(2, 7)
PER = 1000
"""Rates are per so many words."""
PRIOR = 2.0
"""Pseudo-occurrences, at the rate of both sides together, that each side's rate is shrunk with."""
CAPITAL = 0.5
"""A word that is capitalised in more than this share of its occurrences inside sentences is a
name."""
REFRAIN = 2.0
"""A phrase with more occurrences than this, on average over the texts that contain it, is a
topic."""
ECHO = 1 / 3
"""A phrase is an echo if in more than this share of its texts the prompt contains one of its
content words."""
COMMON = 0.25
"""Per 1,000 words of the corpus. Content words at least as frequent do not make a run of two or
three words a phrase ("to make a"). The tilt handles their frequency, and that of a word after an
article or a preposition ("the universe")."""
OWN, BY_WORD = 0.25, 0.75
"""A run is left to the tilt if it has less than the share OWN of the occurrences of one of its
words and that word's λ is at least BY_WORD of the run's: the word is over-used in any context."""
SENTENCE_ENDS = frozenset(".!?:\"'*“”—…([#-")
_FUNCTION = frozenset(FUNCTION_WORDS)


@dataclass(frozen=True)
class Choice:
    """Which phrases count as over-used."""

    false_discoveries: float = 0.05
    """Accepted share of false ones among the phrases that pass the test."""
    least_texts: int = 4
    """Minimum number of the model's texts with the phrase."""
    least_prompts: int = 3
    most_of_one_prompt: float = 0.5
    """Maximum share, of the model's texts with the phrase, that answer one prompt."""
    least_ratio: float = 1.5
    """Minimum e^λ, after shrinking."""
    explained: float = 0.75
    """Share of a phrase's occurrences that another phrase must explain to replace it."""
    most: int = 2000
    """Maximum number of phrases."""

    @property
    def least_log_ratio(self) -> float:
        return math.log(self.least_ratio)

    def __post_init__(self) -> None:
        for name, least, most in (
            ("false_discoveries", 0, 1),
            ("most_of_one_prompt", 0, 1),
            ("explained", 0, 1),
            ("least_texts", 1, 10**9),
            ("least_prompts", 1, 10**9),
            ("least_ratio", 1, 22026),
            ("most", 1, 100_000),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name}: got {value}; accepted: {least} to {most:,}.")


@dataclass(frozen=True)
class Tally:
    """The counts of a phrase in the texts of both sides."""

    text: str
    """The form in which the model writes it most often inside a sentence."""
    log_ratio: float
    """λ, after shrinking."""
    model_count: int
    human_count: int
    model_texts: int
    """Texts with the phrase."""
    human_texts: int
    prompts: int
    """Number of prompts of the model's texts with the phrase."""
    p: float
    g: float
    known: bool
    """Whether it comes from the list of known phrases."""


class Side:
    """The texts of one side as runs of words."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = tuple(samples)
        self.prompts = [
            sample.prompt or sample.source or f"text {n}" for n, sample in enumerate(samples)
        ]
        """The prompt of each text; its source or number where it has none."""
        self.spans = [spans(sample.text) for sample in self.samples]
        self.runs = [
            [list(run) for is_word, run in groupby(items, lambda s: s[0][0].isalnum()) if is_word]
            for items in self.spans
        ]
        self.words = sum(len(run) for runs in self.runs for run in runs)

    @cached_property
    def counts(self) -> Counter[str]:
        """The number of occurrences of each word and punctuation mark."""
        return Counter(word for items in self.spans for word, _, _ in items)

    @cached_property
    def groups(self) -> list[int]:
        """For each text, the number of its prompt, from 0."""
        number = {prompt: n for n, prompt in enumerate(dict.fromkeys(self.prompts))}
        return [number[prompt] for prompt in self.prompts]

    def grams(self, text: int, size: int) -> Iterator[tuple[Gram, int, int]]:
        """(gram, start, end) of each run of `size` words in a text."""
        for run in self.runs[text]:
            words = [word for word, _, _ in run]
            for at in range(len(run) - size + 1):
                yield tuple(words[at : at + size]), run[at][1], run[at + size - 1][2]

    @cached_property
    def prompt_words(self) -> list[frozenset[str]]:
        """For each text, the words of its prompt, without a final "s"."""
        return [
            frozenset(word.rstrip("s") for word, _, _ in spans(sample.prompt))
            for sample in self.samples
        ]


def over_used(model: Side, human: Side, choice: Choice, known: Iterable[str] = ()) -> list[Tally]:
    """The over-used phrases, those with the largest λ·√count first.

    Raises:
        ValueError: a side has no words.
    """
    for name, side in (("the model's answers", model), ("the corpus", human)):
        if not side.words:
            raise ValueError(f"{name}: got no words; accepted: English prose.")
    candidates = _mined(model, human, choice)
    candidates |= _known(model, human, choice, known, taken=set(candidates))
    chosen = _without_overlaps(_without_parts(candidates, choice.explained), choice.explained)
    return sorted(chosen, key=_weight, reverse=True)[: choice.most]


def g_statistic(
    a_N: ArrayLike, a_words: float, b_N: ArrayLike, b_words: float
) -> NDArray[np.float64]:
    """2·Σ O·ln(O/E) of each table [[a, a_words − a], [b, b_words − b]] (Dunning 1993)."""
    a_N, b_N = np.asarray(a_N, float), np.asarray(b_N, float)
    table = np.array([[a_N, a_words - a_N], [b_N, b_words - b_N]])
    expected = table.sum(0, keepdims=True) * table.sum(1, keepdims=True) / table.sum((0, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = xlogy(table, table) - xlogy(table, expected)
    return np.maximum(2 * terms.sum((0, 1)), 0)


def p_value(a_N: ArrayLike, a_words: float, b_N: ArrayLike, b_words: float) -> NDArray[np.float64]:
    """The probability that `a` or more of the a + b occurrences are on the first side if both sides
    write the phrase at the same rate."""
    a_N, b_N = np.asarray(a_N), np.asarray(b_N)
    return stats.binom.sf(a_N - 1, a_N + b_N, a_words / (a_words + b_words))


def discoveries(p_N: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """Which p are discoveries, at an expected share of false ones of at most `share` (Benjamini and
    Hochberg 1995)."""
    return stats.false_discovery_control(p_N) <= share


def shrunk_log_ratio(a: float, a_words: float, b: float, b_words: float) -> float:
    """ln of the ratio of two rates, each shrunk toward the common rate by `PRIOR` occurrences."""
    if not a + b:
        return 0.0
    prior_words = PRIOR * (a_words + b_words) / (a + b)
    rates = [(n + PRIOR) / (words + prior_words) for n, words in ((a, a_words), (b, b_words))]
    return float(np.log(rates[0] / rates[1]))


def _weight(tally: Tally) -> tuple[float, str]:
    return tally.log_ratio * tally.model_count**0.5, tally.text


# ── Runs of words ────────────────────────────────────────────────────────────────────────────────


Place = tuple[int, int, int]
"""(text, start, end): a text's number, and character positions in it."""


@dataclass(frozen=True)
class _Candidate:
    """A phrase and its occurrences in the model's texts."""

    tally: Tally
    places: Sequence[Place]


@dataclass
class _Uses:
    """The texts that contain a gram, each with its number of occurrences."""

    model: Counter[int] = field(default_factory=Counter)
    human: Counter[int] = field(default_factory=Counter)

    @property
    def texts(self) -> int:
        return len(self.model) + len(self.human)


def _mined(model: Side, human: Side, choice: Choice) -> dict[Gram, _Candidate]:
    uses = _frequent(model, human, choice.least_texts)
    known_names, common = names(model, human), _common(human)
    # Filtered before the tests, so that fewer of them need correction.
    grams = [gram for gram in uses if _is_eligible(gram, known_names, common)]
    if not grams:
        return {}
    p_G, g_G = _tested([uses[gram] for gram in grams], model, human)
    passes_G = discoveries(p_G, choice.false_discoveries)
    tested = {
        grams[n]: (p_G[n], g_G[n])
        for n in np.flatnonzero(passes_G).tolist()
        if _is_habit(grams[n], uses[grams[n]].model, model, choice)
    }
    places = _places(model, tested)
    candidates = {
        gram: _found(gram, places[gram], uses[gram], model, human, *tested[gram], known=False)
        for gram in tested
    }
    return {
        gram: one
        for gram, one in candidates.items()
        if one.tally.log_ratio >= choice.least_log_ratio
        and not _is_explained_by_word(gram, one.tally, model, human)
    }


def _is_explained_by_word(gram: Gram, tally: Tally, model: Side, human: Side) -> bool:
    """Whether a run is over-used because of one of its words, which mostly occurs elsewhere."""
    for word in _content(gram):
        counts = model.counts[word], human.counts[word]
        log_ratio = shrunk_log_ratio(counts[0], model.words, counts[1], human.words)
        if tally.model_count < OWN * counts[0] and log_ratio >= BY_WORD * tally.log_ratio:
            return True
    return False


def _tested(
    uses: Sequence[_Uses], model: Side, human: Side
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p and G of each gram, from its numbers of texts and each side's number of words."""
    texts_2G = np.array([(len(use.model), len(use.human)) for use in uses]).T
    sides = texts_2G[0], model.words, texts_2G[1], human.words
    return p_value(*sides), g_statistic(*sides)


def _frequent(model: Side, human: Side, least_texts: int) -> dict[Gram, _Uses]:
    """Grams that occur in enough texts of both sides together. Each size is built from the next
    shorter one."""
    frequent: dict[Gram, _Uses] = {}
    shorter: set[Gram] = set()
    for size in SIZES:
        uses: defaultdict[Gram, _Uses] = defaultdict(_Uses)
        for is_model, side in ((True, model), (False, human)):
            for text in range(len(side.samples)):
                for gram, _, _ in side.grams(text, size):
                    # A gram is at most as frequent as its parts.
                    if size == SIZES[0] or (gram[:-1] in shorter and gram[1:] in shorter):
                        (uses[gram].model if is_model else uses[gram].human)[text] += 1
        often = {
            gram: use
            for gram, use in uses.items()
            if len(use.model) + len(use.human) >= least_texts
        }
        shorter = set(often)
        frequent |= often
    return frequent


def _is_eligible(gram: Gram, known_names: frozenset[str], common: frozenset[str]) -> bool:
    """Whether a run may be a phrase: no names, no digits, content words if it is short, and no
    more characters than a profile accepts, which a model's endless word has."""
    if len(" ".join(gram)) > LONGEST_PHRASE:
        return False
    if any(word in known_names or any(map(str.isdigit, word)) for word in gram):
        return False
    content = _content(gram)
    if len(gram) > 3:
        return True
    if any("'" in word for word in gram):  # "I'm not sure"
        return bool(content)
    if len(gram) == 2 and gram[0] in _FUNCTION:
        return False
    return any(word not in common for word in content)


def _content(gram: Gram) -> list[str]:
    return [word for word in gram if word not in _FUNCTION and "'" not in word]


def _is_habit(gram: Gram, uses: Counter[int], model: Side, choice: Choice) -> bool:
    """Whether the model uses the gram under many prompts, rather than as a topic or an echo."""
    prompts = Counter(model.prompts[text] for text in uses)
    texts = len(uses)
    if texts < choice.least_texts or len(prompts) < choice.least_prompts:
        return False
    if max(prompts.values()) > choice.most_of_one_prompt * texts:
        return False
    if uses.total() > REFRAIN * texts:
        return False
    content = [word.rstrip("s") for word in _content(gram)]
    echoes = sum(any(word in model.prompt_words[text] for word in content) for text in uses)
    return echoes <= ECHO * texts


def names(*sides: Side) -> frozenset[str]:
    """Words that are mostly capitalised inside sentences."""
    capital: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    for side in sides:
        for sample, items in zip(side.samples, side.spans, strict=True):
            for (before, _, end), (word, start, _) in pairwise(items):
                if before in SENTENCE_ENDS or "\n" in sample.text[end:start]:
                    continue
                inside[word] += 1
                capital[word] += sample.text[start].isupper()
    return frozenset(
        word
        for word, count in capital.items()
        if count > CAPITAL * inside[word] and word != "i" and not word.startswith("i'")
    )


def _common(human: Side) -> frozenset[str]:
    """Words that are frequent in the corpus."""
    return frozenset(word for word, n in human.counts.items() if 1000 * n >= COMMON * human.words)


def _places(model: Side, grams: Container[Gram]) -> dict[Gram, list[Place]]:
    places: defaultdict[Gram, list[Place]] = defaultdict(list)
    for text in range(len(model.samples)):
        for size in SIZES:
            for gram, start, end in model.grams(text, size):
                if gram in grams:
                    places[gram].append((text, start, end))
    return places


def _surface(gram: Gram, places: Sequence[Place], model: Side) -> str:
    """The most frequent form in the model's texts, preferably from inside a sentence."""
    forms = Counter(
        " ".join(model.samples[text].text[start:end].replace("’", "'").split())
        for text, start, end in places
    )
    is_i = gram[0] == "i" or gram[0].startswith("i'")
    inside = {form: n for form, n in forms.items() if form[0].islower() or is_i}
    best = max(sorted(inside or forms), key=lambda form: forms[form])
    return best if inside else best[0].lower() + best[1:]


def _found(
    gram: Gram,
    places: Sequence[Place],
    uses: _Uses,
    model: Side,
    human: Side,
    p: Any,
    g: Any,
    *,
    known: bool,
) -> _Candidate:
    counts = uses.model.total(), uses.human.total()
    tally = Tally(
        text=_surface(gram, places, model),
        log_ratio=shrunk_log_ratio(counts[0], model.words, counts[1], human.words),
        model_count=counts[0],
        human_count=counts[1],
        model_texts=len(uses.model),
        human_texts=len(uses.human),
        prompts=len({model.prompts[text] for text in uses.model}),
        p=float(p),
        g=float(g),
        known=known,
    )
    return _Candidate(tally, places)


# ── Known phrases ────────────────────────────────────────────────────────────────────────────────

LONGEST_KNOWN = 8
"""In words and punctuation marks."""
LEAST_KNOWN = 2
"""Minimum number of the model's texts, and of its prompts, for a known phrase; lower than for mined
ones, as it is known to be a phrase."""


def _known(
    model: Side, human: Side, choice: Choice, phrases: Iterable[str], taken: set[Gram]
) -> dict[Gram, _Candidate]:
    wanted = {tuple(word for word, _, _ in spans(phrase)) for phrase in phrases} - taken - {()}
    uses: defaultdict[Gram, _Uses] = defaultdict(_Uses)
    places: defaultdict[Gram, list[Place]] = defaultdict(list)
    for text, items in enumerate(model.spans):
        for gram, start, end in _occurrences(items, wanted):
            uses[gram].model[text] += 1
            places[gram].append((text, start, end))
    for text, items in enumerate(human.spans):
        for gram, _, _ in _occurrences(items, uses.keys()):
            uses[gram].human[text] += 1
    grams = sorted(uses)
    if not grams:
        return {}
    p_K, g_K = _tested([uses[gram] for gram in grams], model, human)
    candidates = {}
    for n in np.flatnonzero(discoveries(p_K, choice.false_discoveries)).tolist():
        gram = grams[n]
        one = _found(gram, places[gram], uses[gram], model, human, p_K[n], g_K[n], known=True)
        enough = min(one.tally.model_texts, one.tally.prompts) >= LEAST_KNOWN
        if enough and one.tally.log_ratio >= choice.least_log_ratio:
            candidates[gram] = one
    return candidates


def _occurrences(
    items: Sequence[tuple[str, int, int]], phrases: Container[Gram]
) -> Iterator[tuple[Gram, int, int]]:
    """(phrase, start, end) of each occurrence in a text's words and punctuation marks."""
    words = tuple(word for word, _, _ in items)
    for at in range(len(words)):
        for size in range(1, min(LONGEST_KNOWN, len(words) - at) + 1):
            if (gram := words[at : at + size]) in phrases:
                yield gram, items[at][1], items[at + size - 1][2]


# ── Redundant phrases ────────────────────────────────────────────────────────────────────────────


def _without_parts(candidates: Mapping[Gram, _Candidate], explained: float) -> list[_Candidate]:
    """Keep one of any two phrases of which one contains the other."""
    left = dict(candidates)
    # From the longest down, so that a part can only be dropped for a phrase that is kept.
    for gram in sorted(candidates, key=lambda gram: (-len(gram), gram)):
        if gram not in left:
            continue
        parts = [part for part in _parts(gram) if part in left]
        texts = left[gram].tally.model_texts
        if any(texts < explained * left[part].tally.model_texts for part in parts):
            del left[gram]
        else:
            for part in parts:
                del left[part]
    return list(left.values())


def _parts(gram: Gram) -> set[Gram]:
    return {
        gram[at : at + size] for size in range(1, len(gram)) for at in range(len(gram) - size + 1)
    }


def _without_overlaps(candidates: Sequence[_Candidate], explained: float) -> Iterator[Tally]:
    """Drop phrases most of whose occurrences overlap those of a phrase with a larger G."""
    occupied: set[tuple[int, int]] = set()
    for one in sorted(candidates, key=lambda f: (-f.tally.g, f.tally.text)):
        characters = [{(text, at) for at in range(a, b)} for text, a, b in one.places]
        shared = sum(bool(each & occupied) for each in characters)
        if shared < explained * len(characters):
            occupied.update(*characters)
            yield one.tally
