"""Human anchors: a folder of your own human texts, and how they score.

    anchors.json    the window, the seed, numbers of texts, and the human scores
    texts.jsonl     the windows, each in one of three splits:
                    reference    the scale of style and the bigram model are fitted on it
                    calibration  defines human variety on that scale
                    test         held out: gives the human scores, and is the human side of every
                                 comparison

Everything else is recomputed from the texts when the folder is read, and must match anchors.json.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve import atomic
from dftserve.bounded_files import FileError, lines, parse_json, read_json, shaped_as, with_advice
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
"""Minimum texts in each split."""
COPY = 0.5
"""Texts that share more of their phrases than this are copies (`ngram_overlap`)."""
MOST = 5_000
"""Maximum number of texts. Each is compared with all others: 200 MB for each overlap matrix."""
UNSAMPLED = "unsampled"
LARGEST = 1 << 20
"""Maximum bytes of anchors.json."""
LARGEST_TEXTS = 2 << 30
"""Maximum bytes of texts.jsonl: `MOST` windows of some 400 kB."""
LARGEST_LINE = 64 << 20
"""Maximum bytes of one window."""
MOST_WORDS = 1_000_000
"""Maximum words of a window, which bounds what a damaged file can ask for."""
FEW_WORKS = 16
"""Texts from fewer works than this raise a warning: they are by few authors."""
LOW_SCORE = 80.0
"""Held-out human text that scores below this raises a warning; on ten splits of the story set it
scores 92 to 100."""
LEAST_FUNCTION_WORDS = 0.25
"""English prose has .4 to .6; other languages, which the style features do not cover, below .1."""


@dataclass(frozen=True)
class Anchors:
    """Human text in three disjoint splits, the reference fitted on it, and its score."""

    seed: int
    dropped: dict[str, int]
    """Numbers of texts that were left out, by reason: `short`, `copies`, `alone` (in a prompt with
    too few, where other prompts have enough), and `unsampled` if there were more than `MOST`."""
    splits: dict[str, Windows]
    sds_reference: SDSReference
    human: Score
    """The score of the `test` split."""

    @property
    def words(self) -> int:
        return self.splits["test"].words

    @property
    def test(self) -> Windows:
        return self.splits["test"]

    def has_the_texts_of(self, other: "Anchors") -> bool:
        """Whether the windows of every split are the same, and answer the same prompts."""
        return all(
            (self.words, self.splits[name].texts, self.splits[name].prompts)
            == (other.words, other.splits[name].texts, other.splits[name].prompts)
            for name in SHARES
        )


def samples(corpus: Path, *, words: int = WORDS, pieces: int = 1) -> list[Sample]:
    """Human texts of a file or folder that `dftserve.corpus.read` accepts. Of a conversation, the
    text is the last answer and its prompt the last question.

    Args:
        pieces: the maximum number of windows that are cut from one long work.
    """
    windows = []
    for text in read(corpus):
        turns = text.messages or ({"role": "assistant", "content": text.content},)
        questions = [turn["content"] for turn in turns if turn["role"] == "user"]
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        if answers:
            prompt = questions[-1] if questions else ""
            windows += cut(Sample(answers[-1], prompt, text.origin), words, pieces)
    return windows


def build(samples: Iterable[Sample], *, words: int = WORDS, seed: int = 0) -> Anchors:
    """Build anchors from human texts; their order does not matter.

    If at least half of the texts belong to prompts with eight or more, texts are compared within
    prompts, and all texts of a prompt are in one split; otherwise all texts of a source are. Of
    more than `MOST` texts, at most `MOST` are drawn by the seed, equally many from each prompt or
    source that has enough.

    Raises:
        ValueError: too few texts, texts that are too short or not English, or all the same.
    """
    windows = Windows.of(samples, words)
    short = windows.short
    whole = windows.whole()
    _require_enough(len(whole), f"{len(windows)} texts, {short} of them shorter than {words} words")
    _require_english(whole)
    whole = _sorted_by_digest(whole, seed)
    drawn = whole.pick(_subsample(whole))
    kept = drawn.pick(_without_copies(drawn))
    units = _units(kept)
    alone = len(kept) - sum(map(len, units))
    dropped = {"short": short, "copies": len(drawn) - len(kept), "alone": alone}
    if left := len(whole) - len(drawn):
        dropped[UNSAMPLED] = left
    splits = {name: kept.pick(indices) for name, indices in _split(units).items()}
    counts = {name: len(split) for name, split in splits.items()}
    if any(counts[name] < LEAST[name] for name in LEAST):
        raise ValueError(
            f"human texts: got {counts} after {dropped} were dropped; accepted: at least {LEAST}: "
            "more texts, or prompts and sources with fewer each, as these are kept whole."
        )
    return _fit(seed, dropped, splits)


def save(anchors: Anchors, folder: Path) -> None:
    """Write a new folder.

    Raises:
        FileExistsError: the folder exists.
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
        ValueError: the folder has no anchors, they have another format or were changed, or this
            version computes other scores from them.
    """
    written = "a folder that `dftserve evaluate anchors build` wrote"
    try:
        about = read_json(folder / FILE, within=folder, largest=LARGEST)
    except FileError as error:
        raise ValueError(with_advice(error, f"give {written}")) from None
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
    anchors = _fit(about["seed"], about["dropped"], splits)
    if _about(anchors) != {name: value for name, value in about.items() if name != "texts_blake3"}:
        raise ValueError(
            f"{folder}: this version computes other scores for these texts than the one that wrote "
            "the folder; build it again, and repeat the evaluations that used it."
        )
    return anchors


def require_enough_answers(anchors: Anchors, prompts: int, samples: int) -> None:
    """Check the numbers of prompts and of answers to each before anything is generated.

    Raises:
        ValueError: too few answers to compare.
    """
    if anchors.sds_reference.by_prompt and samples < LEAST_TEXTS:
        raise ValueError(
            f"samples: got {samples}; accepted: {LEAST_TEXTS} or more, as these anchors compare "
            "texts within prompts."
        )
    if samples * prompts < LEAST_TEXTS:
        raise ValueError(
            f"prompts: got {prompts} with {samples} answers each; accepted: {LEAST_TEXTS} answers "
            "or more at each diversity."
        )


def render(anchors: Anchors) -> str:
    """A summary for the terminal."""
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


def warnings(anchors: Anchors, works: int) -> list[str]:
    """Reasons why scores on these anchors may be unreliable, as sentences.

    Args:
        works: the number of works that the texts are from.
    """
    problems, people = [], anchors.human.sds.value
    if works < FEW_WORKS:
        problems.append(
            f"The texts are from {works} works, so human variety is measured on few authors. "
            f"Add texts by other people, from {FEW_WORKS} works or more."
        )
    if people < LOW_SCORE:
        problems.append(
            f"Held-out human text scores {people:.0f} and should score about 95: the splits "
            "differ in kind. Add texts from more works, or leave out those unlike the rest."
        )
    return problems


def digest(folder: Path) -> str:
    """The BLAKE3 digest of anchors.json, by which a result identifies its anchors."""
    return digest_of(folder / FILE, within=folder, largest=LARGEST)


def _texts_digest(folder: Path) -> str | None:
    try:
        return digest_of(folder / TEXTS, within=folder, largest=LARGEST_TEXTS)
    except FileNotFoundError:
        return None


# ── Splitting ────────────────────────────────────────────────────────────────────────────────────


def _sorted_by_digest(windows: Windows, seed: int) -> Windows:
    """Sort, so that neither the splits nor the choice of copies depends on the input's order."""

    def key(index: int) -> tuple[bytes, str]:
        content = f"{seed}\0{windows.prompts[index]}\0{windows.texts[index]}"
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        return digest, windows.sources[index]

    return windows.pick(sorted(range(len(windows)), key=key))


def _subsample(windows: Windows) -> list[int]:
    """Indices of at most `MOST` texts, equally many from each unit that has enough.

    Taking all texts of some units could leave too few units to split, and prompts with fewer than
    `LEAST_TEXTS` could not be compared within.
    """
    if len(windows) <= MOST:
        return list(range(len(windows)))
    units = _units(windows)

    def taken(of_each: int) -> int:
        return sum(min(len(unit), of_each) for unit in units)

    fitting = bisect_right(range(1, max(map(len, units)) + 1), MOST, key=taken)
    of_each = max(fitting, LEAST_TEXTS if _by_prompt(windows) else 1)
    return sorted([index for unit in units for index in unit[:of_each]][:MOST])


def _without_copies(windows: Windows) -> list[int]:
    """Indices of the texts that are no copies of an earlier one."""
    shared_TT = ngram_overlap([tokens(text) for text in windows.texts])
    kept: list[int] = []
    for index in range(len(windows)):
        if not kept or shared_TT[index, kept].max() <= COPY:
            kept.append(index)
    return kept


def _units(windows: Windows) -> list[list[int]]:
    """Indices of the texts that stay in one split: those of a prompt, or of a source."""
    return _by_prompt(windows) or _by_source(windows)


def _by_prompt(windows: Windows) -> list[list[int]]:
    """Indices of each prompt's texts, for prompts with enough of them; empty if these are fewer
    than half of all texts."""
    units = list(windows.indices_by_prompt().values())
    return units if 2 * sum(map(len, units)) >= len(windows) else []


def _by_source(windows: Windows) -> list[list[int]]:
    """Indices of each source's texts; a text without a source counts as its own source."""
    units: dict[str | int, list[int]] = {}
    for index, source in enumerate(windows.sources):
        units.setdefault(source or index, []).append(index)
    return list(units.values())


def _split(units: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Indices of the texts of each split: whole units, in the proportions of `SHARES`."""
    splits: dict[str, list[int]] = {}
    start, share = 0, 0.0
    for name in SHARES:
        share += SHARES[name]
        stop = round(share * len(units))
        splits[name] = [index for unit in units[start:stop] for index in unit]
        start = stop
    return splits


def _require_enough(count: int, texts: str) -> None:
    least = 2 * LEAST["reference"]
    if count < least:
        raise ValueError(
            f"human texts: got {texts}; accepted: {least} or more that are long enough (`--words` "
            "sets a smaller window)."
        )


def _require_english(windows: Windows) -> None:
    share = function_share(windows.texts)
    if share < LEAST_FUNCTION_WORDS:
        raise ValueError(
            f"human texts: {share:.0%} of their words are English function words; accepted: "
            f"English prose ({LEAST_FUNCTION_WORDS:.0%} or more): the style features are English."
        )


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────


def _fit(seed: int, dropped: dict[str, int], splits: dict[str, Windows]) -> Anchors:
    sds_reference = SDSReference.fit(splits["reference"], splits["calibration"])
    return Anchors(seed, dropped, splits, sds_reference, score(splits["test"], sds_reference))


def _about(anchors: Anchors) -> dict[str, Any]:
    """The contents of anchors.json. Scores are rounded, as their last digits depend on the order of
    summation."""
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
    raw_lines = lines(folder / TEXTS, within=folder, largest=LARGEST_TEXTS, longest=LARGEST_LINE)
    rows = [parse_json(line, f"{folder / TEXTS}, line {i}") for i, line in enumerate(raw_lines, 1)]
    return {
        name: Windows(
            words=words,
            texts=tuple(row["text"] for row in rows if row["split"] == name),
            prompts=tuple(row["prompt"] for row in rows if row["split"] == name),
            sources=tuple("" for row in rows if row["split"] == name),
            groups=tuple(row["prompt"] for row in rows if row["split"] == name),
        )
        for name in SHARES
    }
