"""Human anchors: what human text scores, on texts of your own, kept in a folder.

    anchors.json    what it was made from, the window, the seed, and the human figures
    texts.jsonl     the windows, each in one of three splits:
                    reference    the scale of style and the bigram model are made from it
                    calibration  what human variety is, in these units
                    test         held out: what a person scores, and the other side of every
                                 comparison with human text

Everything else is made again from the texts when the folder is read, and must come out as written.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve import atomic
from dftserve.bounded_files import FileError, advised, lines, parse_json, read_json, shaped_as
from dftserve.corpus.read import read
from dftserve.digest import digest_of
from dftserve.evaluate.metrics.overlap import ngram_overlap
from dftserve.evaluate.metrics.sds import Score, SDSReference, score
from dftserve.evaluate.metrics.stylometry import function_share
from dftserve.evaluate.text.tokenize import tokens
from dftserve.evaluate.text.windows import LEAST_TEXTS, LEAST_WORDS, WORDS, Sample, Windows
from dftserve.evaluate.text.windows import pieces as cut

FORMAT = "dftserve-anchors-1"
FILE = "anchors.json"
TEXTS = "texts.jsonl"
SHARES = {"reference": 0.5, "calibration": 0.25, "test": 0.25}
LEAST = {"reference": 32, "calibration": 16, "test": 16}
"""Texts in a split."""
COPY = 0.5
"""Two texts that share more of their phrases than this are the same text twice."""
MOST = 5_000
"""Texts that are compared, each with all others: 200 MB for each matrix of what they share."""
UNSAMPLED = "unsampled"
LARGEST = 1 << 20
"""Bytes of anchors.json."""
LARGEST_TEXTS = 2 << 30
LARGEST_LINE = 64 << 20
MOST_WORDS = 1_000_000
FEW_WORKS = 16
LOW_SCORE = 80.0
"""Of held-out human text, which scores 92 to 100 on ten splits of the story set."""
LEAST_FUNCTION_WORDS = 0.25
"""English prose has .4 to .6; other languages, which the style features do not know, below .1."""


@dataclass(frozen=True)
class Anchors:
    """Human text in three disjoint splits, what it gives to measure by, and what it scores."""

    seed: int
    dropped: dict[str, int]
    """Texts that were left out, by reason: `short`, `copies`, `alone` (their prompt has too few
    where others have enough), `unsampled` where there were more than `MOST`."""
    splits: dict[str, Windows]
    sds_reference: SDSReference
    human: Score
    """Of the `test` split."""

    @property
    def words(self) -> int:
        return self.splits["test"].words

    @property
    def test(self) -> Windows:
        return self.splits["test"]


def samples(corpus: Path, *, words: int = WORDS, pieces: int = 1) -> list[Sample]:
    """Human texts of a file or folder, as `dftserve.corpus.read` takes them; of a conversation
    the last answer, with what was asked before it.

    Args:
        pieces: how many windows at most are cut from one long work.
    """
    found = []
    for text in read(corpus):
        turns = text.messages or ({"role": "assistant", "content": text.content},)
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        if said:
            prompt = asked[-1] if asked else ""
            found += cut(Sample(said[-1], prompt, text.origin), words, pieces)
    return found


def build(samples: Iterable[Sample], *, words: int = WORDS, seed: int = 0) -> Anchors:
    """Anchors from human texts; the order in which they come does not matter.

    Where at least half of the texts belong to prompts with eight or more, texts are compared within
    prompts, and a prompt is in one split whole; else a source is. Of more than `MOST` texts so many
    are drawn, by the seed, of each prompt or source alike where it has as many.

    Raises:
        ValueError: too few texts, too short ones, not English, or all alike.
    """
    windows = Windows.of(samples, words)
    short = windows.short
    whole = windows.whole()
    _refuse_few(len(whole), f"{len(windows)} texts, {short} of them shorter than {words} words")
    _refuse_foreign(whole)
    whole = _in_order(whole, seed)
    drawn = whole.pick(_drawn(whole))
    kept = drawn.pick(_originals(drawn))
    units = _units(kept)
    alone = len(kept) - sum(map(len, units))
    dropped = {"short": short, "copies": len(drawn) - len(kept), "alone": alone}
    if left := len(whole) - len(drawn):
        dropped[UNSAMPLED] = left
    splits = {name: kept.pick(places) for name, places in _split(units).items()}
    counts = {name: len(split) for name, split in splits.items()}
    if any(counts[name] < LEAST[name] for name in LEAST):
        raise ValueError(
            f"human texts: got {counts} after {dropped} were dropped; accepted: at least {LEAST}: "
            "more texts, or smaller prompts and sources, which are in one split whole."
        )
    return _measured(seed, dropped, splits)


def save(anchors: Anchors, folder: Path) -> None:
    """Write a new folder.

    Raises:
        FileExistsError: there is one.
    """
    with atomic.folder(folder) as temporary:
        texts = temporary / TEXTS
        with texts.open("w", encoding="utf-8") as file:
            for name, split in anchors.splits.items():
                for prompt, text in zip(split.prompts, split.texts, strict=True):
                    line = {"split": name, "prompt": prompt, "text": text}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        about = {**_about(anchors), "texts_blake3": digest_of(texts)}
        atomic.write_text(temporary / FILE, json.dumps(about, indent=2) + "\n")


def load(folder: Path) -> Anchors:
    """Read what `save` wrote.

    Raises:
        ValueError: no anchors there, of another format, changed since, or measured otherwise by
            this version.
    """
    written = "a folder that `dftserve evaluate anchors` wrote"
    try:
        about = read_json(folder / FILE, within=folder, largest=LARGEST)
    except FileError as error:
        raise ValueError(advised(error, f"give {written}")) from None
    except OSError:
        raise ValueError(f"{folder}: no {FILE} that can be read; accepted: {written}.") from None
    with shaped_as(folder / FILE, written):
        form = about["format"]
    if form != FORMAT:
        raise ValueError(f"{folder}: got the format {form!r}; accepted: {FORMAT}; build it again.")
    if lacks := {"words", "seed", "dropped", "texts_blake3"} - about.keys():
        raise ValueError(f"{folder / FILE}: lacks {', '.join(sorted(lacks))}; build it again.")
    words = about["words"]
    if not isinstance(words, int) or not LEAST_WORDS <= words <= MOST_WORDS:
        accepted = f"from {LEAST_WORDS} to {MOST_WORDS}"
        raise ValueError(f"{folder / FILE}: words: got {words!r:.40}; accepted: {accepted}.")
    if _texts_digest(folder) != about["texts_blake3"]:
        raise ValueError(f"{folder / TEXTS}: changed since it was written; build it again.")
    with shaped_as(folder / TEXTS, f"the texts of {written}"):
        splits = _read_splits(folder, words)
    anchors = _measured(about["seed"], about["dropped"], splits)
    if _about(anchors) != {name: value for name, value in about.items() if name != "texts_blake3"}:
        raise ValueError(
            f"{folder}: this version measures these texts otherwise than the one that wrote the "
            "folder; build it again, and the evaluations that used it."
        )
    return anchors


def render(anchors: Anchors) -> str:
    """For a terminal."""
    counts = ", ".join(f"{len(split)} {name}" for name, split in anchors.splits.items())
    dropped = ", ".join(f"{count} {reason}" for reason, count in anchors.dropped.items() if count)
    if anchors.dropped.get(UNSAMPLED):
        dropped += f" ({MOST:,} are compared at most, drawn by the seed)"
    score = anchors.human
    pairs = "within prompts" if anchors.sds_reference.by_prompt else "between all texts"
    return (
        f"{counts}, of {anchors.words} words each; left out: {dropped or 'none'}; "
        f"compared {pairs}.\n"
        f"Held-out human text scores {score.sds.render(1)}: V {score.variety.render()}, "
        f"P {score.wording.render()}, q {score.coherence.render()}."
    )


def doubts(anchors: Anchors, works: int) -> list[str]:
    """Why scores beside these anchors may mean little, a sentence each.

    Args:
        works: from how many works the texts are.
    """
    found, people = [], anchors.human.sds.value
    if works < FEW_WORKS:
        found.append(
            f"The texts are of {works} works: what counts as human variety is that of few authors. "
            f"Add texts of other people, {FEW_WORKS} works or more."
        )
    if people < LOW_SCORE:
        found.append(
            f"Held-out human text scores {people:.0f} and should score about 95: the splits are "
            "not of one kind. Add texts of more works, or leave out what is unlike the rest."
        )
    return found


def digest(folder: Path) -> str:
    """What a result carries to say which anchors it used: the BLAKE3 of anchors.json."""
    return digest_of(folder / FILE, within=folder, largest=LARGEST)


def _texts_digest(folder: Path) -> str | None:
    try:
        return digest_of(folder / TEXTS, within=folder, largest=LARGEST_TEXTS)
    except FileNotFoundError:
        return None


# ── Splitting ────────────────────────────────────────────────────────────────────────────────────


def _in_order(windows: Windows, seed: int) -> Windows:
    """By a digest of the text, so that neither the split nor what is kept follows the input."""

    def key(place: int) -> tuple[bytes, str]:
        said = f"{seed}\0{windows.prompts[place]}\0{windows.texts[place]}"
        digest = hashlib.blake2b(said.encode(), digest_size=16).digest()
        return digest, windows.sources[place]

    return windows.pick(sorted(range(len(windows)), key=key))


def _drawn(windows: Windows) -> list[int]:
    """Places of at most `MOST` texts of those in order.

    Of each unit alike, where it has as many: few units that have all their texts would fill no
    split, and prompts with fewer than `LEAST_TEXTS` could not be compared within.
    """
    if len(windows) <= MOST:
        return list(range(len(windows)))
    units = _units(windows)

    def taken(of_each: int) -> int:
        return sum(min(len(unit), of_each) for unit in units)

    fitting = bisect_right(range(1, max(map(len, units)) + 1), MOST, key=taken)
    of_each = max(fitting, LEAST_TEXTS if _prompts(windows) else 1)
    return sorted([place for unit in units for place in unit[:of_each]][:MOST])


def _originals(windows: Windows) -> list[int]:
    shared_TT = ngram_overlap([tokens(text) for text in windows.texts])
    kept: list[int] = []
    for place in range(len(windows)):
        if not kept or shared_TT[place, kept].max() <= COPY:
            kept.append(place)
    return kept


def _units(windows: Windows) -> list[list[int]]:
    """The places of texts that stay together: of a prompt, or of a source."""
    return _prompts(windows) or _by_source(windows)


def _prompts(windows: Windows) -> list[list[int]]:
    """The places of each prompt's texts, of prompts with enough; none where these have fewer than
    half of the texts."""
    answered = list(windows.answered().values())
    return answered if 2 * sum(map(len, answered)) >= len(windows) else []


def _by_source(windows: Windows) -> list[list[int]]:
    """The places of each source's texts; a text without a source is one of its own."""
    units: dict[str | int, list[int]] = {}
    for place, source in enumerate(windows.sources):
        units.setdefault(source or place, []).append(place)
    return list(units.values())


def _split(units: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Units by their shares, whole, the last split taking what is left."""
    splits: dict[str, list[int]] = {}
    start, share = 0, 0.0
    for name in SHARES:
        share += SHARES[name]
        stop = round(share * len(units))
        splits[name] = [place for unit in units[start:stop] for place in unit]
        start = stop
    return splits


def _refuse_few(count: int, told: str) -> None:
    least = 2 * LEAST["reference"]
    if count < least:
        raise ValueError(
            f"human texts: got {told}; accepted: {least} or more that are long enough (a smaller "
            "window is `--words`)."
        )


def _refuse_foreign(windows: Windows) -> None:
    share = function_share(windows.texts)
    if share < LEAST_FUNCTION_WORDS:
        raise ValueError(
            f"human texts: {share:.0%} of their words are English function words; accepted: "
            f"English prose ({LEAST_FUNCTION_WORDS:.0%} or more): the style features are English."
        )


# ── Figures ──────────────────────────────────────────────────────────────────────────────────────


def _measured(seed: int, dropped: dict[str, int], splits: dict[str, Windows]) -> Anchors:
    sds_reference = SDSReference.fit(splits["reference"], splits["calibration"])
    return Anchors(seed, dropped, splits, sds_reference, score(splits["test"], sds_reference))


def _about(anchors: Anchors) -> dict[str, Any]:
    """Rounded, so that another order of summation is no difference."""
    score = anchors.human
    parts = {name: getattr(score, name) for name in ("sds", "variety", "wording", "coherence")}
    human = {
        name: [end and round(end, 4) for end in (part.value, part.low, part.high)]
        for name, part in parts.items()
    }
    return {
        "format": FORMAT,
        "words": anchors.words,
        "seed": anchors.seed,
        "by_prompt": anchors.sds_reference.by_prompt,
        "texts": {name: len(split) for name, split in anchors.splits.items()},
        "dropped": anchors.dropped,
        "human": human,
    }


def _read_splits(folder: Path, words: int) -> dict[str, Windows]:
    found = lines(folder / TEXTS, within=folder, largest=LARGEST_TEXTS, longest=LARGEST_LINE)
    rows = [parse_json(line, f"{folder / TEXTS}, line {i}") for i, line in enumerate(found, 1)]
    return {
        name: Windows(
            words=words,
            texts=tuple(row["text"] for row in rows if row["split"] == name),
            prompts=tuple(row["prompt"] for row in rows if row["split"] == name),
            sources=tuple("" for row in rows if row["split"] == name),
        )
        for name in SHARES
    }
