"""Texts of one meaning: do they say what they were asked to, and how varied is their wording?

    name[Blue Spice], eatType[coffee shop], area[city centre]      a meaning of three slots

Slots are found by patterns (the idea of Dušek et al., arXiv 1911.03905; the patterns are our own).
Values that people use interchangeably count as one: `cheap` and `less than £20`, `high` and `5 out
of 5`. Names are matched literally, and patterns are not searched for inside them. The patterns are
in English and for the E2E restaurants (Novikova et al., arXiv 1706.09254); a slot or value without
a pattern is matched literally.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from dftserve.evaluate.metrics.intervals import Estimate, over_units, sum_by_group
from dftserve.evaluate.metrics.overlap import PATTERN, ngram_overlap
from dftserve.evaluate.metrics.sds import LEAST_OVERLAP
from dftserve.evaluate.text.tokenize import normalise, tokens
from dftserve.evaluate.text.windows import LEAST_TEXTS

_SLOT = re.compile(r"\s*([^\[\],]+?)\s*\[([^\[\]]*)\]\s*")
NAMED = ("name", "near")
"""Slots whose values are names of places."""

SAME = {
    "priceRange": {
        "cheap": "low",
        "less than £20": "low",
        "moderate": "middle",
        "£20-25": "middle",
        "high": "high",
        "more than £30": "high",
    },
    "customer rating": {
        "1 out of 5": "low",
        "low": "low",
        "3 out of 5": "middle",
        "average": "middle",
        "5 out of 5": "high",
        "high": "high",
    },
}
"""Values that count as one. Values of other slots stand for themselves."""

_RATED = (
    r"(?:rat(?:ed?|ings?)|reviews?|reviewed|scores?d?|stars?|satisfaction|feedback|ranked|quality|"
    r"recommended|customers?|reputation|service)"
)
_OF_5 = r"\s?-?(?:stars? )?-?(?:out of|out|of|ou of|our of|/)\s?-?(?:a possible )?(?:5|five)\b"
_COSTS = r"(?:pric(?:es?|ed|ing|y)|costs?|range|budget)"
_LINK = r"(?:\s(?:is|are|was|of|at|in|to|from|the|a|an|its|their|it|being|has|have|be|very|quite|"
_LINK += r"and|only|just|price|customers?|rating|rated|ratings|range|with|by|as|receives?|on)){0,4}"


def _rated(degree: str, number: str) -> str:
    return (
        rf"\b(?:{number}){_OF_5}|\b(?:{number})[- ]?stars?\b|\bstar rating of (?:{number})\b|"
        rf"\b(?:{degree})(?:[- ][\w-]+){{0,2}}?[- ]{_RATED}\b|"
        rf"\b{_RATED}(?:\s?[-:,]\s?)?{_LINK}\s(?:{degree})\b"
    )


def _priced(degree: str) -> str:
    return (
        rf"\b(?:{degree})(?:[- ](?:to \w+|customer|average|food|menu))?[- ]{_COSTS}\b|"
        rf"\b{_COSTS}(?:\s?[-:,]\s?)?{_LINK}\s(?:{degree})\b"
    )


_FAMILY = r"(?:famil(?:y|ies)|kids?|child(?:ren)?(?:'s|s)?|youngsters|all ages|toddlers?)"
_DENIED = r"(?:not?|non|n't|never|without|isn't|doesn't|aren't|don't|un|lacks|cannot|nor|off)"
PATTERNS = {
    "eatType": {
        "coffee shop": r"\bcoffee|\bcaf[eé]s?\b|\bcaffe",
        "pub": r"\bpubs?\b|\bbars?\b|\btaverns?\b|\binn\b|\bale ?house",
        "restaurant": r"\brest[au]+rants?\b|\beater(?:y|ies)\b|\bdiners?\b|\bbistros?\b|"
        r"\bdining\b|\bplace to (?:eat|dine)\b|\bsteakhouse\b|\brestaraunt\b",
    },
    "food": {
        "Chinese": r"\bchinese\b|\bchina\b",
        "English": r"\benglish\b|\bbritish\b|\bengland\b|\bfish (?:and|&|n) chips\b",
        "Fast food": r"\bfast[- ]?foods?\b|\bburgers?\b|\bfries\b",
        "French": r"\bfrench\b|\bfrance\b",
        "Indian": r"\bindian?\b|\bcurr(?:y|ies)\b",
        "Italian": r"\bitalian?\b|\bpastas?\b|\bpizzas?\b|\bspaghetti\b",
        "Japanese": r"\bjapan(?:ese)?\b|\bsushi\b",
    },
    "priceRange": {
        "low": _priced(r"low(?:er|est)?|cheap(?:er|est|ly)?|less|small|good|reasonable|under")
        + r"|\bcheap(?:er|ly|est)?\b|\b(?:less|lower) th[ae]n (?:£ ?)?20|\baffordabl[ey]\b|"
        r"\binexpensive(?:ly)?\b|\bnot expensive\b|\bbargain\b|"
        r"\b(?:under|below|up to) (?:£ ?)?20|\blow[- ]?(?:end|budget|cost)|"
        r"\bless that £ ?20|\b20 (?:pounds|euros?) or less",
        "middle": _priced(
            r"moderate(?:ly)?|mid(?:dle)?|medium|average|mid-?range|reasonabl[ey]|fair(?:ly)?|"
            r"modest(?:ly)?|decent(?:ly)?"
        )
        + r"|\bmoderate(?:ly)?(?: \w+)?[- ](?:pric|expens)|"
        r"\b20 ?(?:-|to|and|—|through) ?(?:£ ?)?25|"
        r"\bmid-?(?:priced?|range|cost|level)|\bmoderately\b|\baffordabl[ey]\b|"
        r"\b(?:medium|moderate) (?:range|cost|expense)",
        "high": _priced(
            r"high(?:er|est|ly)?|expensive(?:ly)?|upper|steep|more|premium|above|over|hefty|large"
        )
        + r"|(?<!not )(?<!in)\bexpensive(?:ly)?\b|\bpric[e]?y\b|\bcostly\b|"
        r"\bupscale\b|\bup-?market\b|\bhigh[- ]?end\b|\bhigh-?class\b|"
        r"\b(?:more th[ae]n|over|above|upwards of|exceeding|starting at|at least) (?:£ ?)?30|"
        r"£ ?30 (?:and|or) (?:up|more|over|above)|£ ?30\+|\b30 (?:pounds )?(?:plus|or more)",
    },
    "customer rating": {
        "low": _rated(
            r"low(?:er|est|ly)?|poor(?:ly)?|bad(?:ly)?|terrible|negative|unsatisfactory|"
            r"not (?:very |so )?(?:good|high|great|well)|unfavou?rable|worst|"
            r"disappointing|mediocre",
            r"1|one|single",
        )
        + r"|\b(?:lowly|low|poorly|badly)[- ](?:customer )?(?:rated|rating)|\bnot (?:highly|well)",
        "middle": _rated(
            r"average(?:ly)?|moderate(?:ly)?|mediocre|decent|ok(?:ay)?|medium|fair|mid(?:dle)?|"
            r"middling|satisfactory|reasonabl[ey]",
            r"3|three",
        ),
        "high": _rated(
            r"high(?:er|est|ly)?|excellent|great|good|well|top|perfect|positive(?:ly)?|best|"
            r"outstanding|superb|very well|favou?rable|fantastic|loved|amazing|exceptional",
            r"5|five",
        )
        + r"|\b(?:highly|well|top|high)[- ](?:customer )?rat(?:ed|ing)|"
        r"\bhighly recommended|"
        r"\bwell[- ]?(?:reviewed|liked|received)\b|\bpopular\b|\b(?:customers|people) love",
    },
    "area": {
        "riverside": r"\briver\b|\briver[- ]?sides?\b|\bwater(?:side|front)\b|\bby the water\b|"
        r"\briver[- ]?(?:bank|front)s?\b|\brivers\b",
        "city centre": r"\b(?:city|town|urban)[- ]?'?s?[- ]?cent(?:er|re|ral)s?\b|\bdowntown\b|"
        r"\b(?:in|of|within|at|inner|around|near|close to|to) the (?:city|cent(?:er|re)|town)\b|"
        r"\bcent(?:re|er) of\b|\bcentral|\bcent(?:re|er)\b|\binner[- ]city\b|"
        r"\bcentrally|\bcity\b(?! of)",
    },
    "familyFriendly": {
        "no": rf"\b{_DENIED}(?:[- ][\w'-]+){{0,6}}?[- ]{_FAMILY}|\b(?:non|un|no)-?{_FAMILY}|"
        rf"n't(?:[- ][\w'-]+){{0,6}}?[- ]{_FAMILY}|"
        rf"\b{_FAMILY}(?:[- ][\w'-]+){{0,4}}?[- ](?:unfriendly|unsuitable|(?:not|n't|isn't|aren't|"
        rf"no|forbidden|prohibited|banned|inappropriate|discouraged)\b)|"
        rf"\b{_FAMILY}[- ]un|\badults?\b|\bgrown[- ]?ups?\b|\bchild-?free\b|\bmature\b",
        "yes": rf"\b{_FAMILY}",
    },
}
"""The pattern of each value in normalised text, ignoring case. If both of `familyFriendly` match,
the value is `no`."""
_COMPILED = {
    slot: {value: re.compile(pattern, re.IGNORECASE) for value, pattern in values.items()}
    for slot, values in PATTERNS.items()
}
_GENERIC = {"eatType": {"restaurant"}}
"""Values whose words people use for any place, so that they do not count as added."""


@dataclass(frozen=True)
class Errors:
    """How many slots of a meaning a text got wrong."""

    slots: int
    missing: int
    """Not mentioned."""
    wrong: int
    """Mentioned with another value."""
    added: int
    """Mentioned, but not in the meaning. An added place nearby is not detected."""

    @property
    def rate(self) -> float:
        """(missing + wrong + added) / slots (Wen et al., arXiv 1508.01745)."""
        return (self.missing + self.wrong + self.added) / self.slots


def parse(meaning: str) -> dict[str, str]:
    """The slots of a meaning and their values.

    Raises:
        ValueError: not of the form `slot[value], slot[value]`, or a slot twice.
    """
    slots = _SLOT.findall(meaning)
    if not slots or re.sub(r"[\s,]", "", _SLOT.sub("", meaning)) or len(dict(slots)) < len(slots):
        raise ValueError(
            f"meaning: got {meaning!r:.120}; accepted: slot[value], slot[value] …, each slot once."
        )
    return dict(slots)


def errors(text: str, meaning: Mapping[str, str]) -> Errors:
    """The errors of a text, given its parsed meaning."""
    text = _plain(text)
    named = {slot: _name(meaning[slot]).search(text) for slot in NAMED if slot in meaning}
    for slot in named:
        text = _name(meaning[slot]).sub(" # ", text)
    missing = sum(match is None for match in named.values())
    wrong = added = 0
    for slot, value in meaning.items():
        if slot not in NAMED and not _says(text, slot, value):
            otherwise = bool(_values(text, slot))
            wrong, missing = wrong + otherwise, missing + (not otherwise)
    for slot in PATTERNS.keys() - meaning.keys():
        added += bool(_values(text, slot) - _GENERIC.get(slot, set()))
    return Errors(len(meaning), missing, wrong, added)


def error_rate(
    texts: Sequence[str], meanings: Sequence[Mapping[str, str]], groups: Sequence[str] = ()
) -> Estimate:
    """The slot error rate: errors of all texts / slots of all their meanings. The interval
    resamples texts, or groups (`intervals.sum_by_group`).

    Raises:
        ValueError: no texts, or not as many meanings or groups as texts.
    """
    pairs = zip(texts, meanings, strict=True)
    counts = [astuple(errors(text, meaning)) for text, meaning in pairs]
    counts_T4 = np.array(counts, float).reshape(-1, 4)

    def rate(weights_T: NDArray, counts_T4: NDArray) -> float:
        slots, *wrong = weights_T @ counts_T4
        return sum(wrong) / slots

    return over_units(sum_by_group(counts_T4, groups), rate)


def wording(
    texts: Mapping[str, Sequence[str]], human: Mapping[str, Sequence[str]], size: int = LEAST_TEXTS
) -> Estimate:
    """P = ln o / ln o_human: 1 if the texts of a meaning are as varied as people's, 0 for copies.
    o is the share of phrases that two texts have in common, averaged over the pairs of each prompt,
    then over prompts, which the interval resamples.

    Args:
        texts, human: texts by prompt; prompts with fewer than `size` on a side are left out. A text
            of fewer than six tokens has no pattern to vary and counts as a copy.

    Raises:
        ValueError: a size below 2, no prompt with enough texts, or human texts that are all copies.
    """
    if size < 2:
        raise ValueError(f"size: got {size}; accepted: at least 2.")
    prompts = [p for p in texts if len(texts[p]) >= size and len(human.get(p, ())) >= size]
    if not prompts:
        raise ValueError(
            f"texts: no prompt has {size} of them and as many human ones; accepted: at least one."
        )
    shared_P2 = np.array([(_shared(texts[p]), _shared(human[p])) for p in prompts])
    if shared_P2[:, 1].mean() >= 1:
        raise ValueError("human texts: got copies only; accepted: different wordings.")
    return over_units(shared_P2, _ratio)


def _plain(text: str) -> str:
    """Normalised, without accents, so that Café is Cafe."""
    parts = unicodedata.normalize("NFD", normalise(text))
    return "".join(c for c in parts if not unicodedata.combining(c))


def _name(name: str) -> re.Pattern[str]:
    """A name with or without its article."""
    bare = re.sub(r"^the\s+", "", _plain(name), flags=re.IGNORECASE)
    return re.compile(rf"\b(?:the\s+)?{re.escape(bare)}(?!\w)", re.IGNORECASE)


def _says(text: str, slot: str, value: str) -> bool:
    value = SAME.get(slot, {}).get(value, value)
    if value in PATTERNS.get(slot, {}):
        return value in _values(text, slot)
    return bool(_name(value).search(text))


def _values(text: str, slot: str) -> set[str]:
    """The values of a slot that a text mentions."""
    values = {value for value, pattern in _COMPILED.get(slot, {}).items() if pattern.search(text)}
    return {"no"} if slot == "familyFriendly" and "no" in values else values


def _shared(texts: Sequence[str]) -> float:
    """The mean o over pairs of the texts."""
    tokenized = [tokens(normalise(text)) for text in texts]
    shared_TT = ngram_overlap(tokenized)
    short_T = np.array([len(text) < PATTERN for text in tokenized])
    shared_TT[short_T, :] = shared_TT[:, short_T] = 1.0
    return float(shared_TT[~np.eye(len(texts), dtype=bool)].mean())


def _ratio(weights_P: NDArray, shared_P2: NDArray) -> float:
    o, o_human = np.maximum(weights_P @ shared_P2 / weights_P.sum(), LEAST_OVERLAP)
    return abs(float(np.log(o))) / abs(float(np.log(o_human)))
