"""Build a style profile from a corpus and a model's answers (`dftserve style build`).

    build(Job(corpus=Path("novels"), model="path/to/model", answers=Path("answers.jsonl"),
              out=Path("profiles/novels")))

Answers come from a file, from the folder of an evaluation, or from a server. A server is asked only
for the answers that the folder lacks, so the same job resumes where it was stopped.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dftserve.evaluate.generate import grid, prompts
from dftserve.evaluate.generate.client import first_model
from dftserve.evaluate.generate.grid import ASKED, RequestGrid
from dftserve.evaluate.generate.in_force import is_off
from dftserve.evaluate.metrics import slop
from dftserve.evaluate.reference import samples as read_samples
from dftserve.evaluate.text.tokenize import normalise, sentences, words
from dftserve.evaluate.text.windows import Sample
from dftserve.fingerprints import template_fingerprint, tokenizer_fingerprint
from dftserve.openai_client import Server
from dftserve.sampling.style.tables import DEEPEST
from dftserve.sampling.token_classes import token_pieces
from dftserve.serve import base_url
from dftserve.styles import profile as profiles
from dftserve.styles import spellings, tilt
from dftserve.styles.automaton import Automaton, completions, count_harms
from dftserve.styles.automaton import build as build_automaton
from dftserve.styles.counts import PER, Choice, Side, Tally, names, over_used
from dftserve.styles.folder import check_depth
from dftserve.styles.profile import Phrase, Profile, Stored
from dftserve.styles.spellings import Encoded, Finder
from dftserve.targets.document import load_tokenizer

PIECE = 400
"""Words. Long works are split into pieces of this length; a phrase counts once in each piece."""
MOST_PIECES = 1_000_000
"""Pieces of one work: no work is shortened."""
LEAST_ANSWERS = 32
"""Fewest answers of the model that are accepted."""
LEAST_RECALL = 0.98
"""Least share of the phrases in held-out answers that the automaton must find; below it a warning
says what it missed."""
HELD_OUT = 5
"""One prompt in so many is held out: recall is measured on its answers, which contribute no
tokenisations."""
SHOWN_OPENERS = 20
"""Number of sentence beginnings that the profile lists."""
PART = "\ufffd"
"""What a token decodes to if it ends inside a character."""
ANSWERS = "-answers"

Say = Callable[[str], object]
Tick = Callable[[int, int], object]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `dftserve style build` makes a profile from."""

    corpus: Path
    """Texts by people: a file or folder that `dftserve.corpus` can read."""
    model: str
    """The model's folder or name on the Hub; only its tokenizer is used."""
    out: Path
    answers: Path | None = None
    """The model's answers: a .jsonl of `prompt` and `response`, or the OUT of an evaluation. With
    `server`: the folder in which they are stored; default: next to `out`."""
    server: str | None = None
    """The URL of a server that answers `prompts`."""
    prompts: Path | None = None
    served_as: str | None = None
    """The model's name on the server; default: its first."""
    key_variable: str | None = None
    name: str | None = None
    """The profile's name; default: the name of `out`."""
    phrases: Path | None = None
    """A list of known phrases (`slop.read_lines`); default: the built-in one."""
    samples: int = 8
    max_tokens: int = 400
    temperature: float = 1.0
    seed: int = 0
    concurrency: int = 16
    strength: float = 1.0
    max_kl: float = 0.05
    choice: Choice = field(default_factory=Choice)

    def __post_init__(self) -> None:
        if not profiles.is_name(self.profile_name):
            raise ValueError(
                f"name: got {self.profile_name!r:.80}; accepted: up to 64 letters, digits, '.', "
                "'_' and '-'; give one with --name."
            )
        if self.server is None and self.answers is None:
            raise ValueError(
                "answers: got neither --answers nor --server; accepted: a file of the model's "
                "answers, or the server to ask for them."
            )
        if self.server is not None:
            base_url(self.server)  # Refuses an address without http.
        if self.server is not None and self.prompts is None:
            raise ValueError("prompts: got none; accepted: a .txt or .jsonl file of prompts.")
        if self.server is not None and self.answers is not None and self.answers.is_file():
            raise ValueError(
                f"answers: got the file {self.answers} and a server; accepted: a file of answers "
                "without --server, or a folder in which to store the server's answers."
            )
        if not profiles.is_model_name(self.model_name):
            raise ValueError(
                f"model: got {self.model!r:.80}; accepted: a folder or a name on the Hub, the last "
                f"part of which is {profiles.MODEL_NAME}."
            )
        for name, most in profiles.MOST_OF_DEFAULTS.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(f"{name}: got {value}; accepted: 0 to {most}.")
        if self.concurrency < 1:
            raise ValueError(f"concurrency: got {self.concurrency}; accepted: 1 or more.")

    @property
    def profile_name(self) -> str:
        return self.name or self.out.name

    @property
    def model_name(self) -> str:
        """The last part of the model's name; of a folder given as `.` or `..`, its own name."""
        return Path(os.path.abspath(self.model)).name

    @property
    def answers_folder(self) -> Path:
        """The folder of the server's answers."""
        return self.answers or self.out.with_name(self.out.name + ANSWERS)


def build(job: Job, say: Say = print, tick: Tick = lambda done, total: None) -> Stored:
    """Build the profile.

    Args:
        say: called with each line for the user.
        tick: called with the number of answers so far, and their total.

    Raises:
        ValueError: the corpus, the model, the answers or a setting is not accepted.
        FileExistsError: `out` exists.
        RuntimeError: the server cannot be reached or fails.
    """
    if job.out.exists():
        raise FileExistsError(f"{job.out} exists; choose another place, or remove it.")
    tokenizer = load_tokenizer(job.model)
    spellings.require_offsets(tokenizer)
    known = slop.read_lines(job.phrases or slop.OURS)
    _require_short(tokenizer, known)
    human = read_samples(job.corpus, words=PIECE, pieces=MOST_PIECES)
    if not any(words(text.text) for text in human):  # Before hours of requests to a server.
        raise ValueError(
            f"corpus: got {job.corpus}, which contains no words; accepted: texts by people (.txt, "
            ".md, .rst, .jsonl (.gz), .json, .csv, .parquet, or a folder of such)."
        )
    model = answers_of(job, say, tick)
    _require_enough(len(model))
    model, human, is_shared = on_shared_prompts(model, human)
    say(f"Comparing {len(model):,} answers with {len(human):,} texts by people…")
    stored = profile_of(job, tokenizer, Side(model), Side(human), known, is_shared)
    profiles.write(job.out, stored)
    for line in warnings(stored):
        say(f"Warning: {line}")
    return stored


def _require_short(tokenizer: Any, known: Sequence[str]) -> None:
    """Check that a profile, and an engine, may have each of the known phrases."""
    for phrase in known:
        if len(phrase) > profiles.LONGEST_PHRASE:
            raise ValueError(
                f"phrases: got {phrase!r:.80} of {len(phrase)} characters; accepted: at most "
                f"{profiles.LONGEST_PHRASE}."
            )
    # A token is a byte or more, apart from the few around the phrase.
    long = [phrase for phrase in known if len(phrase.encode(errors="replace")) > DEEPEST // 2]
    for pattern in spellings.spell(tokenizer, long):
        if len(pattern.tokens) > DEEPEST:
            raise ValueError(
                f"phrases: got {long[pattern.phrase]!r:.80} of {len(pattern.tokens)} tokens; "
                f"accepted: at most {DEEPEST}."
            )


def _require_enough(answers: int) -> None:
    if answers < LEAST_ANSWERS:
        raise ValueError(
            f"answers: got {answers}; accepted: {LEAST_ANSWERS} or more, and a few thousand are "
            "better. Give more prompts, or more answers to each (--samples)."
        )


def warnings(stored: Stored) -> Iterator[str]:
    """Weaknesses of the profile that a user should be aware of."""
    recall = stored.counts["recall"]
    if recall["searched"] and recall["recall"] < LEAST_RECALL:
        yield (
            f"the automaton finds {recall['recall']:.1%} of the phrases (wanted: "
            f"{LEAST_RECALL:.0%}); missed: {', '.join(map(repr, list(recall['missed'])[:5]))}."
        )
    if not stored.profile.phrases:
        yield (
            "no phrase is significantly over-used; give more answers (--samples, --prompts), or "
            "accept a larger share of false discoveries (--false-discoveries)."
        )


# ── Texts ────────────────────────────────────────────────────────────────────────────────────────


def answers_of(job: Job, say: Say, tick: Tick) -> list[Sample]:
    """The model's answers: from the server if there is one, otherwise from `job.answers`."""
    if job.server is not None:
        return _from_server(job, say, tick)
    assert job.answers is not None
    if (job.answers / ASKED).exists():
        return _from_evaluation(job.answers)
    if not job.answers.exists():
        raise ValueError(
            f"answers: got {job.answers}, which does not exist; accepted: a .jsonl with `prompt` "
            "and `response`, or the OUT of `dftserve evaluate`."
        )
    return read_samples(job.answers, words=PIECE, pieces=1)


def _from_evaluation(folder: Path) -> list[Sample]:
    """The answers of an evaluation that were sampled without the field."""
    levels = grid.samples_by_level(folder)
    plain = [level for level in levels if is_off(level.diversity)]
    if not plain:
        asked = ", ".join(str(level.diversity) for level in levels)
        raise ValueError(
            f"answers: got {folder} with the diversities {asked}; accepted: an evaluation whose "
            "diversities include 0: a profile describes the model without the field."
        )
    return list(plain[0].samples)


def _from_server(job: Job, say: Say, tick: Tick) -> list[Sample]:
    assert job.server is not None
    assert job.prompts is not None
    asked, folder = prompts.read(job.prompts), job.answers_folder
    done, total = grid.count_answers(folder), len(asked) * job.samples
    _require_enough(total)
    say(f"{folder}: {done} of {total} answers are there.")
    server = Server(base_url(job.server), job.key_variable)
    kept = (grid.read_asked(folder) or {}).get("model") if done == total else None
    wanted = RequestGrid(
        model=job.served_as or first_model(server, kept, say),
        prompts=asked,
        grid=(0,),
        samples=job.samples,
        max_tokens=job.max_tokens,
        temperature=job.temperature,
        seed=job.seed,
    )
    if (unknown := grid.unknown_weights_warning(wanted, folder)) is not None:
        say(unknown)

    answers = grid.generate(wanted, folder, server=server, concurrency=job.concurrency, tick=tick)
    return [
        Sample(each.final_text, asked[each.place].text)
        for each in answers
        if each.final_text.strip()
    ]


def on_shared_prompts(
    model: Sequence[Sample], human: Sequence[Sample]
) -> tuple[list[Sample], list[Sample], bool]:
    """Both sides, and whether they were restricted to the prompts that both answer.

    They are where at least half of the model's prompts are shared, so that a difference of topics
    is not taken for one of style.
    """
    shared = {s.prompt for s in model} & {s.prompt for s in human} - {""}
    if not shared or 2 * len(shared) < len({sample.prompt for sample in model}):
        return list(model), list(human), False
    sides = ([s for s in side if s.prompt in shared] for side in (model, human))
    return *sides, True  # type: ignore[return-value]


# ── The profile ──────────────────────────────────────────────────────────────────────────────────


def profile_of(
    job: Job, tokenizer: Any, model: Side, human: Side, known: Sequence[str], is_shared: bool
) -> Stored:
    """The profile from the texts of both sides."""
    tallies = over_used(model, human, job.choice, known)
    phrases = [tally.text for tally in tallies]
    texts = {side: [s.text for s in side.samples] for side in (model, human)}
    encoded = {side: spellings.encode(tokenizer, texts[side]) for side in (model, human)}
    held_out = _held_out(model)
    seen = [n for n, is_held_out in enumerate(held_out) if not is_held_out]
    patterns = spellings.spell(
        tokenizer,
        phrases,
        seen=[texts[model][n] for n in seen],
        seen_encoded=[encoded[model][n] for n in seen],
    )
    V = len(tokenizer)
    automaton = build_automaton(patterns, vocabulary=V)
    harms = count_harms(automaton, [each.tokens for each in encoded[model]])
    recall = _recall(automaton, phrases, texts, encoded, model, human, held_out)
    word_tilt = _tilt(tokenizer, automaton, model, human, encoded)
    factor_A = harms.log_factors(np.array([tally.log_ratio for tally in tallies]))
    profile = Profile(
        name=job.profile_name,
        vocabulary=V,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        template_fingerprint=template_fingerprint(tokenizer),
        model=job.model_name,
        phrases=tuple(_phrase(tally, model, human) for tally in tallies),
        root_next_V=automaton.root_next_V,
        root_log_factor_V=factor_A[automaton.root_next_V],
        row_start_A=automaton.row_start_A,
        row_token_N=automaton.row_token_N,
        row_next_N=automaton.row_next_N,
        row_log_factor_N=factor_A[automaton.row_next_N],
        unigram_V=word_tilt.unigram_V,
        bigram_context_C=word_tilt.context_C,
        bigram_start_C=word_tilt.start_C,
        bigram_token_M=word_tilt.token_M,
        bigram_delta_M=word_tilt.delta_M,
        strength=job.strength,
        max_kl=job.max_kl,
    )
    check_depth(profile)
    counts = {
        "model": _size(model),
        "human": _size(human),
        "shared_prompts": is_shared,
        "phrases": [_counted(tally) for tally in tallies],
        "recall": recall,
        "patterns": len(patterns),
        "unigrams": int(np.count_nonzero(word_tilt.unigram_V)),
        "bigrams": len(word_tilt.token_M),
        "habits": habits(texts[model], texts[human]),
    }
    return Stored(
        profile=profile,
        harms=harms,
        counts=counts,
        settings=_settings(job),
        versions=profiles.versions(),
    )


def _phrase(tally: Tally, model: Side, human: Side) -> Phrase:
    return Phrase(
        text=tally.text,
        log_ratio=min(max(tally.log_ratio, 0.0), profiles.LARGEST_LOG_RATIO),
        model_rate=PER * tally.model_count / model.words,
        human_rate=PER * tally.human_count / human.words,
    )


def _counted(tally: Tally) -> dict[str, Any]:
    return {name: value for name, value in asdict(tally).items() if name != "text"}


def _size(side: Side) -> dict[str, int]:
    return {
        "texts": len(side.samples),
        "words": side.words,
        "prompts": len({sample.prompt for sample in side.samples if sample.prompt}),
    }


def _settings(job: Job) -> dict[str, Any]:
    """The settings that determine the profile, without paths of this machine."""
    return {
        "samples": job.samples,
        "max_tokens": job.max_tokens,
        "temperature": job.temperature,
        "seed": job.seed,
        **asdict(job.choice),
    }


def _held_out(model: Side) -> list[bool]:
    """Whether each answer belongs to a prompt that is held out, one of `HELD_OUT`."""
    return [group % HELD_OUT == HELD_OUT - 1 for group in model.groups]


def _recall(
    automaton: Automaton,
    phrases: Sequence[str],
    texts: Mapping[Side, Sequence[str]],
    encoded: Mapping[Side, Sequence[Encoded]],
    model: Side,
    human: Side,
    held_out: Sequence[bool],
) -> dict[str, Any]:
    """Recall and precision on the held-out answers and the corpus."""
    unseen = [n for n, is_held_out in enumerate(held_out) if is_held_out]
    comparison = spellings.compare(
        automaton,
        Finder(phrases),
        [*(texts[model][n] for n in unseen), *texts[human]],
        [*(encoded[model][n] for n in unseen), *encoded[human]],
    )
    return {**asdict(comparison), "recall": comparison.recall, "precision": comparison.precision}


def _tilt(
    tokenizer: Any,
    automaton: Automaton,
    model: Side,
    human: Side,
    encoded: Mapping[Side, Sequence[Encoded]],
) -> tilt.Tilt:
    """The tilt, from the tokens outside the phrases; the automaton handles those inside."""
    V = automaton.vocabulary
    counts = {
        side: tilt.count(
            [np.array(each.tokens, np.int64) for each in encoded[side]],
            [_outside(automaton, each) for each in encoded[side]],
            side.groups,
            vocabulary=V,
        )
        for side in (model, human)
    }
    allowed_V = _allowed(tokenizer, V, names(model, human))
    return tilt.fit(counts[human], counts[model], allowed_V)


def _outside(automaton: Automaton, encoded: Encoded) -> NDArray[np.bool_]:
    outside = np.ones(len(encoded.tokens), bool)
    for _, first, last in completions(automaton, encoded.tokens):
        outside[first : last + 1] = False
    return outside


def _allowed(tokenizer: Any, vocabulary: int, known_names: frozenset[str]) -> NDArray[np.bool_]:
    """Tokens that are text, contain no digit, dash or part of a character, and are not names.

    Dashes are a habit that is only reported; parts of a character may be those of a dash.
    """
    allowed_V = np.zeros(vocabulary, bool)
    for token, piece in enumerate(token_pieces(tokenizer)[:vocabulary]):
        text = "" if piece is None else piece.decode(errors="replace").strip()
        is_name = text[:1].isupper() and text.lower() in known_names
        is_dash = "—" in normalise(text) or PART in text
        has_digit = any(map(str.isdigit, text))
        allowed_V[token] = piece is not None and not (is_name or is_dash or has_digit)
    return allowed_V


# ── Habits: reported, not changed ────────────────────────────────────────────────────────────────


def habits(model: Sequence[str], human: Sequence[str]) -> dict[str, Any]:
    """Em dashes and "not X but Y" per 1,000 words, and how sentences begin, for both sides."""
    sides = {"model": [normalise(t) for t in model], "human": [normalise(t) for t in human]}
    total = {name: sum(len(words(text)) for text in texts) for name, texts in sides.items()}
    firsts = {name: _openers(texts) for name, texts in sides.items()}
    begun = {name: firsts[name].total() for name in sides}
    share = {
        word: {n: firsts[n][word] / max(begun[n], 1) for n in sides}
        for word in sorted(firsts["model"])
    }
    over_used_first = sorted(share, key=lambda word: share[word]["human"] - share[word]["model"])
    return {
        "em_dashes": {n: PER * sum(t.count("—") for t in sides[n]) / total[n] for n in sides},
        "contrasts": {n: slop.contrast_rate(sides[n]).value for n in sides},
        "openers": {word: share[word] for word in over_used_first[:SHOWN_OPENERS]},
    }


def _openers(texts: Sequence[str]) -> Counter[str]:
    begun = (words(sentence)[:1] for text in texts for sentence in sentences(text))
    return Counter(word for first in begun for word in first)
