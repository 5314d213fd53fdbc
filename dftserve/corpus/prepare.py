"""From texts as they lie about to a corpus: filtered, cut, without duplicates, split in two.

    corpus = prepare(read(Path("novels")), Filters(languages=("en",)))

Each text goes to training or to the held-out part by a hash of its own content, before it is cut:
the pieces of a book stay together. A conversation goes by its turns before the first answer to
somebody: all answers to one prompt stay together. So do texts that are copies of one another with
some words changed, which go by the first of them.

A text that is added behind moves no other, but where it is like two that were apart (the later
one's family goes by the earlier one), where so few texts are there that one is held out only for
there to be one, or where the corpus becomes so large that families are told by a sample.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blake3 import blake3

from dftserve.corpus.duplicates import Duplicates
from dftserve.corpus.families import Families
from dftserve.corpus.filters import Filters, language_of, stripped, unwrapped, verdict
from dftserve.corpus.records import opening, said
from dftserve.corpus.text import Text

EXAMPLES = 3
"""Origins that a report names for each reason."""
DUPLICATE = "near-duplicate"
GIVEN_AGAIN = "answer given again to its prompt, counted as often"
ANSWER_WORDS = 20
"""A shorter answer may be the same to many prompts, and joins none of them."""
TOLD = 200
"""Texts whose language is told: more would take longer than the rest."""
ALIKE = 1.0
"""The draw of every text where none is held out, which no text draws otherwise."""
LIKE_HELDOUT = "copy of a held-out text, or answer to its prompt"


@dataclass(frozen=True)
class Dropped:
    """What was left out for one reason."""

    count: int = 0
    examples: tuple[str, ...] = ()
    """Origins of the first ones."""

    def with_one(self, origin: str) -> "Dropped":
        return Dropped(self.count + 1, (*self.examples, origin)[:EXAMPLES])


@dataclass
class Report:
    """What became of the texts."""

    read: int = 0
    """Texts, as they came."""
    kept: int = 0
    """Texts of which something stayed."""
    stripped: Counter[str] = field(default_factory=Counter)
    """Texts that lost boilerplate, and stayed, by their origins."""
    joined: Counter[str] = field(default_factory=Counter)
    """Texts whose wrapped lines were joined, and that stayed, by their origins."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """By reason. Near-duplicates are pieces, where a text was cut; all else are texts."""
    noted: dict[str, Dropped] = field(default_factory=dict)
    """By what was changed or left out of a text that stayed."""
    documents: dict[str, int] = field(default_factory=dict)
    """By split: pieces, and texts that were not cut."""
    words: dict[str, int] = field(default_factory=dict)
    """By split."""
    languages: dict[str, int] = field(default_factory=dict)
    """How many of the first `TOLD` texts that stayed are of each."""
    heldout_asked: float = 0.0
    """Share of texts."""
    compared: float = 1.0
    """Of the 5-grams of long texts, the share by which families are told: 1 up to some size."""

    @property
    def heldout_share(self) -> float:
        """Share of the words that is held out."""
        return self.words.get("heldout", 0) / max(1, sum(self.words.values()))

    def drop(self, reason: str, origin: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, Dropped()).with_one(origin)

    def note(self, what: str, origin: str) -> None:
        self.noted[what] = self.noted.get(what, Dropped()).with_one(origin)

    def lose(self, origin: str) -> None:
        """A text that had stayed goes after all; `drop` says why."""
        self.kept -= 1
        for changed in (self.stripped, self.joined):
            if changed[origin]:
                changed[origin] -= 1

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types; the reasons in the order of their names."""
        return {
            "read": self.read,
            "kept": self.kept,
            "stripped": self.stripped.total(),
            "joined": self.joined.total(),
            "dropped": _counted(self.dropped),
            "noted": _counted(self.noted),
            "documents": dict(self.documents),
            "words": dict(self.words),
            "languages": dict(sorted(self.languages.items(), key=lambda each: -each[1])),
            "heldout_asked": self.heldout_asked,
            "heldout_share": round(self.heldout_share, 6),
            "compared": self.compared,
        }


def _counted(given: dict[str, Dropped]) -> dict[str, Any]:
    return {
        name: {"count": each.count, "examples": list(each.examples)}
        for name, each in sorted(given.items())
    }


@dataclass(frozen=True)
class Corpus:
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
    """The texts that pass the filters, in their order.

    Args:
        heldout: the share of texts, in [0, 1), that is not trained on. Above 0 it is one text at
            least, and one at least is trained on. Not heeded where texts say by `split` that they
            are held out: those are, and no others.
        seed: of the split.
        counts_answers: how often an answer is given to a prompt is what is learnt (`references`):
            conversations are no duplicates of one another.

    Raises:
        ValueError: no text passes, or one alone where a held-out part is asked for.
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
    is_given = any(map(_is_aside, kept))
    draws = _draws(kept, filters, seed, report) if heldout or is_given else [ALIKE] * len(kept)
    if heldout and not is_given and len(set(draws)) == 1:
        raise ValueError(_none_apart(kept, report))
    if is_given:
        aside = {draw for draw, text in zip(draws, kept, strict=True) if _is_aside(text)}
    else:
        aside = _heldout(set(draws), heldout)
    splits: dict[str, list[Text]] = {"train": [], "heldout": []}
    for draw, text in zip(draws, kept, strict=True):
        if is_given and draw in aside and not _is_aside(text):
            report.lose(text.origin)
            report.drop(LIKE_HELDOUT, text.pieces[0].origin)
        else:
            split = splits["heldout" if draw in aside else "train"]
            split += [replace(piece, family=_family(draw)) for piece in text.pieces]
    report.heldout_asked = 0.0 if is_given else heldout
    if not splits["train"]:
        raise ValueError(f"nothing is left to train on: {_losses(report)}; give more texts.")
    for split, pieces in splits.items():
        report.documents[split] = len(pieces)
        report.words[split] = sum(len(piece.content.split()) for piece in pieces)
    return Corpus(tuple(splits["train"]), tuple(splits["heldout"]), report)


@dataclass(frozen=True)
class _Kept:
    """A text of which something stays."""

    content: str
    """The whole of it."""
    origin: str
    pieces: Sequence[Text]
    copied: Collection[int]
    """The texts, by their numbers among those that stay, that dropped pieces are copies from."""


def _kept(
    texts: Iterable[Text], filters: Filters, report: Report, counts_answers: bool
) -> Iterator[_Kept]:
    duplicates = Duplicates(filters.duplicate_threshold)
    given: set[str] = set()
    for text in texts:
        report.read += 1
        reason = verdict(text, filters)
        if reason is not None:
            report.drop(reason, text.origin)
            continue
        bare = stripped(text, filters)
        clean = unwrapped(bare, filters)
        pieces: list[Text] = []
        copied: set[int] = set()
        for number, piece in enumerate(cut(clean, filters.split_words)):
            if counts_answers and piece.messages is not None:
                pieces.append(piece)
                if piece.content in given:
                    report.note(GIVEN_AGAIN, piece.origin)
                given.add(piece.content)
                continue
            prompt, name = opening(piece), f"{report.kept} {number}"
            known = duplicates.of(piece.content[len(prompt) :], name, within=prompt)
            if known is None:
                pieces.append(piece)
            else:
                copied.add(int(known.split()[0]))
                report.drop(DUPLICATE, piece.origin)
        if pieces:
            if report.kept < TOLD and len(clean.content.split()) >= filters.language_min_words:
                language = language_of(clean.content)
                report.languages[language] = report.languages.get(language, 0) + 1
            report.kept += 1
            if bare is not text:
                report.stripped[text.origin] += 1
            if clean is not bare:
                report.joined[text.origin] += 1
            yield _Kept(clean.content, text.origin, pieces, copied)


def _none_apart(kept: Sequence[_Kept], report: Report) -> str:
    """Why none can be held out, and what to do."""
    found = f"({kept[0].pieces[0].origin}; {_losses(report)}): none can be held out."
    openings = {opening(text.pieces[0]) for text in kept}
    if len(openings) == 1 and openings != {""}:
        return (
            f"the corpus is answers to one prompt {found} Give answers to other prompts too, texts "
            "to hold out (--heldout-from), or hold out nothing (--heldout 0)."
        )
    return (
        f"the corpus is one text, or copies of one in large part {found} Give more texts, a book "
        "as a file a chapter, or hold out nothing (--heldout 0). Where texts share a form and are "
        "no copies, corpus.family_threshold=null takes each by itself."
    )


def _is_aside(text: _Kept) -> bool:
    return text.pieces[0].split == "heldout"


def _draws(kept: Sequence[_Kept], filters: Filters, seed: int, report: Report) -> list[float]:
    """Of each text, in [0, 1): equal for answers to one prompt, and for texts of one family.

    A family draws by its first text: one that is added behind changes no draw, unless it joins two
    families.
    """
    families = Families(filters.family_threshold)
    prompts: dict[str, int] = {}
    answered = []
    for number, text in enumerate(kept):
        families.add(_compared(text.pieces))
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


def _compared(pieces: Sequence[Text]) -> Iterator[str]:
    """What families are told by; of a conversation what is learnt, which is the answers.

    Instructions and passages may be the same in all prompts, and so may short answers.
    """
    for piece in pieces:
        turns = piece.messages
        if turns is None:
            yield piece.content
            continue
        answers = "\n\n".join(said(turn) for turn in turns if turn["role"] == "assistant")
        if len(answers.split()) >= ANSWER_WORDS:
            yield answers


def _draw(content: str, seed: int) -> float:
    """Uniform in [0, 1), from the content alone."""
    digest = blake3(f"{seed}\n{content}".encode()).digest(length=8)
    return int.from_bytes(digest, "little") / 2**64


def _family(draw: float) -> str:
    return "" if draw == ALIKE else draw.hex()


def _heldout(draws: Collection[float], share: float) -> set[float]:
    """The draws below `share`; of a small corpus at least one, and never all."""
    ordered = sorted(draws)
    count = sum(draw < share for draw in ordered)
    return set(ordered[: min(max(count, 1), len(ordered) - 1)]) if share else set()


def _losses(report: Report) -> str:
    lost = ", ".join(f"{each.count} {reason}" for reason, each in sorted(report.dropped.items()))
    return f"{report.read} read, dropped: {lost}" if lost else f"{report.read} read"


# ── Cutting ──────────────────────────────────────────────────────────────────────────────────────

_PARAGRAPH = re.compile(r"(?<=\n)(?=[ \t]*\n)")
_SENTENCE = re.compile(r"(?<=[.!?…。！？])(?=\s)|(?<=[。！？])")
_LINE = re.compile(r"(?<=\n)")
_WORDS = re.compile(r"\s*\S+\s*")


def cut(text: Text, limit: int) -> list[Text]:
    """A plain text in pieces of at most `limit` words, alike in length, ending at paragraph ends.

    A paragraph above the limit is cut at sentence ends, a sentence above it between words. Joined
    again, the pieces have the text's words in their order. A conversation is not cut.
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
    """Words of each of the fewest pieces: the last one is no stump."""
    return words / max(1, -(-words // limit))


def _blocks(content: str, limit: int) -> Iterator[str]:
    """Paragraphs, or parts of them, of at most `limit` words; joined, they are the text."""
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
