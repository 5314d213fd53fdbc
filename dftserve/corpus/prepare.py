"""Prepares a corpus: filters texts, cuts them, drops duplicates, and splits off a held-out part.

    corpus = prepare(read(Path("novels")), Filters(languages=("en",)))

Each text is assigned to training or to the held-out part by a hash of its content before it is cut,
so the pieces of a book stay together. A conversation is assigned by its turns before the first
answer to somebody, so all answers to one prompt stay together. So do texts that are copies of one
another with some words changed, which are assigned by the first of them.

Appending a text moves no other text, with three exceptions: it is similar to two texts that were
not in one family (the later one's family is then assigned by the earlier one); there are so few
texts that one is held out only to have one; or the corpus becomes so large that families are found
by a sample.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blake3 import blake3

from dftserve.corpus.duplicates import Duplicates
from dftserve.corpus.families import Families
from dftserve.corpus.filters import Filters, language_of, stripped, unwrapped, verdict
from dftserve.corpus.records import opening, turn_text
from dftserve.corpus.text import Text, length_in_words

EXAMPLES = 3
"""Origins that a report lists for each reason."""
DUPLICATE = "near-duplicate"
GIVEN_AGAIN = "answer given again to its prompt, counted as often"
ANSWER_WORDS = 20
"""A shorter answer may be given to many prompts, and does not join their families."""
LANGUAGE_TEXTS = 200
"""Texts whose language is identified: more would take longer than everything else."""
NO_DRAW = 1.0
"""The draw of every text if none is held out; outside the range of actual draws."""
LIKE_HELDOUT = "copy of a held-out text, or answer to its prompt"


@dataclass(frozen=True)
class Dropped:
    """The texts that were dropped or noted for one reason."""

    count: int = 0
    examples: tuple[str, ...] = ()
    """Origins of the first few."""

    def with_one(self, origin: str) -> "Dropped":
        return Dropped(self.count + 1, (*self.examples, origin)[:EXAMPLES])


@dataclass
class Report:
    """What was kept, changed and dropped."""

    read: int = 0
    """Texts in the input."""
    given_heldout: int = 0
    """Those among them that their corpus holds out."""
    kept: int = 0
    """Texts of which at least one piece was kept."""
    stripped: Counter[str] = field(default_factory=Counter)
    """Kept texts from which boilerplate was stripped, by origin."""
    joined: Counter[str] = field(default_factory=Counter)
    """Kept texts whose wrapped lines were joined, by origin."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """By reason. Near-duplicates count pieces if a text was cut; all other reasons count texts."""
    noted: dict[str, Dropped] = field(default_factory=dict)
    """Kept texts in which something was changed or left out, by what it was."""
    documents: dict[str, int] = field(default_factory=dict)
    """By split; each piece of a text that was cut counts as one."""
    words: dict[str, int] = field(default_factory=dict)
    """By split."""
    languages: dict[str, int] = field(default_factory=dict)
    """Counts over the first `LANGUAGE_TEXTS` kept texts."""
    heldout_asked: float = 0.0
    """The requested share of texts."""
    compared: float = 1.0
    """Share of long texts' 5-grams that was compared to find families: 1 unless the corpus is very
    large."""

    @property
    def heldout_share(self) -> float:
        """The actual held-out share, of words."""
        return self.words.get("heldout", 0) / max(1, sum(self.words.values()))

    def drop(self, reason: str, origin: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, Dropped()).with_one(origin)

    def note(self, what: str, origin: str) -> None:
        self.noted[what] = self.noted.get(what, Dropped()).with_one(origin)

    def lose(self, origin: str) -> None:
        """A text that was counted as kept is dropped after all; `drop` records the reason."""
        self.kept -= 1
        for changed in (self.stripped, self.joined):
            if changed[origin]:
                changed[origin] -= 1

    def as_dict(self) -> dict[str, Any]:
        """The report in JSON types, with the reasons sorted by name."""
        return {
            "read": self.read,
            "kept": self.kept,
            "stripped": self.stripped.total(),
            "joined": self.joined.total(),
            "dropped": _as_counts(self.dropped),
            "noted": _as_counts(self.noted),
            "documents": dict(self.documents),
            "words": dict(self.words),
            "languages": dict(sorted(self.languages.items(), key=lambda each: -each[1])),
            "heldout_asked": self.heldout_asked,
            "heldout_share": round(self.heldout_share, 6),
            "compared": self.compared,
        }


def _as_counts(dropped: dict[str, Dropped]) -> dict[str, Any]:
    return {
        name: {"count": each.count, "examples": list(each.examples)}
        for name, each in sorted(dropped.items())
    }


@dataclass(frozen=True)
class Corpus:
    """The texts that were kept, in two splits, and what was done to the others."""

    train: tuple[Text, ...]
    heldout: tuple[Text, ...]
    report: Report


def prepare(
    texts: Iterable[Text],
    filters: Filters,
    *,
    heldout: float = 0.05,
    seed: int = 0,
    counts_answers: bool = False,
) -> Corpus:
    """The texts that pass the filters, in their original order.

    Args:
        heldout: the share of texts, in [0, 1), that is not trained on, of those whose `split` is
            not given. Above 0, at least one text is held out and at least one is trained on.
            Ignored if any text's `split` marks it as held out: then exactly those are.
        seed: of the split.
        counts_answers: the source counts how often each answer is given (`references`), so equal
            conversations are not dropped as duplicates.

    Raises:
        ValueError: no text passes, or only one (or one family) but a held-out part is requested,
            or none of the texts whose `split` marks them as held out passes.
    """
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout: got {heldout}; accepted: at least 0 and below 1.")
    report = Report()
    kept = list(_kept(texts, filters, report, counts_answers))
    if not kept:
        raise ValueError(
            f"the corpus is empty: {_losses(report)}. The recipe's `corpus` sets what is kept, "
            f"such as min_words ({filters.min_words} here)."
        )
    is_given = any(map(_is_given_heldout, kept))
    if report.given_heldout and not is_given:
        raise ValueError(
            f"none of the {report.given_heldout} texts given to be held out is kept: "
            f"{_losses(report)}. Give others, or change what the recipe's `corpus` keeps, such as "
            f"min_words ({filters.min_words} here)."
        )
    draws = _draws(kept, filters, seed, report) if heldout or is_given else [NO_DRAW] * len(kept)
    if is_given:
        aside = {draw for draw, text in zip(draws, kept, strict=True) if _is_given_heldout(text)}
    else:
        aside = _chosen_heldout(kept, draws, heldout)
        if heldout and not aside:
            raise ValueError(_cannot_hold_out(kept, report))
    splits = _split(kept, draws, aside, report, is_given=is_given)
    report.heldout_asked = 0.0 if is_given else heldout
    if not splits["train"]:
        raise ValueError(f"nothing is left to train on: {_losses(report)}; give more texts.")
    for split, pieces in splits.items():
        report.documents[split] = len(pieces)
        report.words[split] = sum(len(piece.content.split()) for piece in pieces)
    return Corpus(tuple(splits["train"]), tuple(splits["heldout"]), report)


@dataclass(frozen=True)
class _Kept:
    """A text of which at least one piece was kept."""

    content: str
    """The whole text, cleaned."""
    origin: str
    pieces: Sequence[Text]
    copied: Collection[int]
    """Indices, among the kept texts, of those that its dropped pieces duplicate."""


def _kept(
    texts: Iterable[Text], filters: Filters, report: Report, counts_answers: bool
) -> Iterator[_Kept]:
    copies = _Copies(filters, report, counts_answers)
    for text in texts:
        report.read += 1
        report.given_heldout += text.split == "heldout"
        reason = verdict(text, filters)
        if reason is not None:
            report.drop(reason, text.origin)
            continue
        bare = stripped(text, filters)
        clean = unwrapped(bare, filters)
        pieces: list[Text] = []
        copied: set[int] = set()
        for number, piece in enumerate(cut(clean, filters.split_words)):
            original = copies.original(piece, report.kept, number)
            if original is None:
                pieces.append(piece)
            else:
                copied.add(original)
                report.drop(DUPLICATE, piece.origin)
        if pieces:
            _count_language(clean, filters, report)
            report.kept += 1
            if bare is not text:
                report.stripped[text.origin] += 1
            if clean is not bare:
                report.joined[text.origin] += 1
            yield _Kept(clean.content, text.origin, pieces, copied)


class _Copies:
    """The pieces that were read, by which their copies are found.

    Where the source counts answers, conversations are no copies: equal ones are only noted.
    """

    def __init__(self, filters: Filters, report: Report, counts_answers: bool) -> None:
        self._duplicates = Duplicates(filters.duplicate_threshold)
        self._given: set[tuple[str, str]] = set()
        self._report, self._counts_answers = report, counts_answers

    def original(self, piece: Text, text: int, number: int) -> int | None:
        """The index, among the kept texts, of the one that the piece duplicates, if any.

        Args:
            text, number: the indices of the piece's text and of the piece in it.
        """
        if self._counts_answers and piece.messages is not None:
            self._note_repetition(piece)
            return None
        prompt, name = opening(piece), f"{text} {number}"
        within = prompt + _tools(piece)
        known = self._duplicates.of(piece.content[len(prompt) :], name, within=within)
        return None if known is None else int(known.split()[0])

    def _note_repetition(self, piece: Text) -> None:
        whole = piece.content, _tools(piece)
        if whole in self._given:
            self._report.note(GIVEN_AGAIN, piece.origin)
        self._given.add(whole)


def _count_language(text: Text, filters: Filters, report: Report) -> None:
    """Of the first texts only; of short ones it is not known."""
    if report.kept >= LANGUAGE_TEXTS:
        return
    if length_in_words(text.content) >= filters.language_min_words:
        language = language_of(text.content)
        report.languages[language] = report.languages.get(language, 0) + 1


def _chosen_heldout(
    kept: Sequence[_Kept], draws: Sequence[float], heldout: float
) -> Collection[float]:
    """The draws of about a share `heldout` of the texts whose split is not given."""
    by_split: dict[str | None, set[float]] = {"train": set(), None: set()}
    for draw, text in zip(draws, kept, strict=True):
        by_split[text.pieces[0].split].add(draw)
    return _heldout(by_split[None] - by_split["train"], heldout, any_left=by_split["train"])


def _split(
    kept: Sequence[_Kept],
    draws: Sequence[float],
    aside: Collection[float],
    report: Report,
    *,
    is_given: bool,
) -> dict[str, list[Text]]:
    """The pieces of each split. What is like a text that was given to be held out is left out."""
    splits: dict[str, list[Text]] = {"train": [], "heldout": []}
    for draw, text in zip(draws, kept, strict=True):
        if is_given and draw in aside and not _is_given_heldout(text):
            report.lose(text.origin)
            report.drop(LIKE_HELDOUT, text.pieces[0].origin)
        else:
            split = splits["heldout" if draw in aside else "train"]
            split += [replace(piece, family=_family(draw)) for piece in text.pieces]
    return splits


def _tools(text: Text) -> str:
    """The tools that a conversation's assistant may call, as JSON; empty without any."""
    return json.dumps(text.tools, sort_keys=True, default=str) if text.tools else ""


def _cannot_hold_out(kept: Sequence[_Kept], report: Report) -> str:
    """Error message: why nothing can be held out, and what to do."""
    if any(text.pieces[0].split == "train" for text in kept):
        return (
            "every text belongs to a corpus with `split: train`, or is a copy of one that does: "
            "none can be held out. Leave `split` out of one, give texts to hold out "
            "(--heldout-from), or hold out nothing (--heldout 0)."
        )
    reason = f"({kept[0].pieces[0].origin}; {_losses(report)}): none can be held out."
    openings = {opening(text.pieces[0]) for text in kept}
    if len(openings) == 1 and openings != {""}:
        return (
            f"the corpus is answers to one prompt {reason} Give answers to other prompts too, "
            "texts to hold out (--heldout-from), or hold out nothing (--heldout 0)."
        )
    return (
        f"the corpus is one text, or copies of one in large part {reason} Give more texts, a book "
        "as one file per chapter, or hold out nothing (--heldout 0). If texts share a form but are "
        "no copies, corpus.family_threshold=null treats each by itself."
    )


def _is_given_heldout(text: _Kept) -> bool:
    return text.pieces[0].split == "heldout"


def _draws(kept: Sequence[_Kept], filters: Filters, seed: int, report: Report) -> list[float]:
    """A number in [0, 1) for each text, equal for answers to one prompt and texts of one family.

    A family's draw comes from its first text, so appending a text changes no draw unless it joins
    two families.
    """
    families = Families(filters.family_threshold)
    prompts: dict[str, int] = {}
    answered = []
    for number, text in enumerate(kept):
        families.add(_compared_contents(text.pieces))
        answered.append(prompts.setdefault(opening(text.pieces[0]) or text.content, number))
        families.join(number, answered[-1])
        for other in text.copied if filters.family_threshold is not None else ():
            families.join(number, other)
    report.compared = families.share
    firsts = families.firsts()
    for number, first in enumerate(firsts):
        if first != number and answered[number] == number:
            report.note("near-copies kept on one side", kept[number].pieces[0].origin)
    return [_draw(opening(kept[first].pieces[0]) or kept[first].content, seed) for first in firsts]


def _compared_contents(pieces: Sequence[Text]) -> Iterator[str]:
    """The contents by which families are found: plain text, and the answers of conversations.

    Prompts are not compared, since instructions and passages may be the same in all of them; nor
    are short answers.
    """
    for piece in pieces:
        turns = piece.messages
        if turns is None:
            yield piece.content
            continue
        answers = "\n\n".join(turn_text(turn) for turn in turns if turn["role"] == "assistant")
        if length_in_words(answers) >= ANSWER_WORDS:
            yield answers


def _draw(content: str, seed: int) -> float:
    """Uniform in [0, 1), from content and seed alone."""
    digest = blake3(f"{seed}\n{content}".encode()).digest(length=8)
    return int.from_bytes(digest, "little") / 2**64


def _family(draw: float) -> str:
    return "" if draw == NO_DRAW else draw.hex()


def _heldout(draws: Collection[float], share: float, any_left: Collection[float]) -> set[float]:
    """The draws below `share`; at least one, even in a small corpus, and never all.

    Args:
        any_left: the draws of texts that are trained on in any case; with some, all of `draws` may
            be held out.
    """
    ordered = sorted(draws)
    count = sum(draw < share for draw in ordered)
    most = len(ordered) if any_left else len(ordered) - 1
    return set(ordered[: min(max(count, 1), most)]) if share and most > 0 else set()


def _losses(report: Report) -> str:
    lost = ", ".join(f"{each.count} {reason}" for reason, each in sorted(report.dropped.items()))
    return f"{report.read} read, dropped: {lost}" if lost else f"{report.read} read"


# ── Cutting ──────────────────────────────────────────────────────────────────────────────────────

_PARAGRAPH = re.compile(r"(?<=\n)(?=[ \t]*\n)")
_SENTENCE = re.compile(r"(?<=[.!?…。！？])(?=\s)|(?<=[。！？])")
_LINE = re.compile(r"(?<=\n)")
_WORDS = re.compile(r"\s*\S+\s*")


def cut(text: Text, limit: int) -> list[Text]:
    """Cut a plain text at paragraph ends into pieces of similar length, at most `limit` words each.

    A paragraph above the limit is cut at sentence ends, a sentence above it between words. Joined
    again, the pieces contain the text's words in order. A conversation is not cut.
    """
    left = len(text.content.split())
    if text.messages is not None or left <= limit:
        return [text]
    pieces, held, goal = [""], 0, _fair_share(left, limit)
    for block in _blocks(text.content, limit):
        size = len(block.split())
        if held and size and (held + size > limit or held + size / 2 > goal):
            pieces.append("")
            left -= held
            held, goal = 0, _fair_share(left, limit)
        pieces[-1] += block
        held += size
    last = len(pieces)
    return [
        replace(text, content=piece.strip("\n"), origin=f"{text.origin}#{i}", ends=i == last)
        for i, piece in enumerate(pieces, 1)
    ]


def _fair_share(words: int, limit: int) -> float:
    """Words per piece if cut into the fewest equal pieces, so that the last is not a short rest."""
    return words / max(1, -(-words // limit))


def _blocks(content: str, limit: int) -> Iterator[str]:
    """Paragraphs, or parts of them, of at most `limit` words; joined, they give the text."""
    for paragraph in _PARAGRAPH.split(content):
        yield from _parts(paragraph, limit, (_SENTENCE, _LINE))


def _parts(content: str, limit: int, ends: tuple[re.Pattern[str], ...]) -> Iterator[str]:
    if len(content.split()) <= limit:
        yield content
    elif ends:
        for part in ends[0].split(content):
            yield from _parts(part, limit, ends[1:])
    else:
        words = _WORDS.findall(content)
        for start in range(0, len(words), limit):
            yield "".join(words[start : start + limit])
