"""Correct a profile's λ from what a server writes with the profile in force.

    fit(Job(server="path/to/model", profile=Path("profiles/novels"), prompts=Path("prompts.txt"),
            out=Path("fits/novels")))

Of all distributions with the human rates, the one nearest to the model's is p·e^−λ·φ, where φ are
the counts; the gradient of its dual in λ is the rates minus people's. Rates are roughly
proportional to e^−λ and counts are small, so a round takes a step in their logarithm:

    λ ← clip(λ + STEP·ln((n + PRIOR) / (N·μ + PRIOR)), 0, 10)

with n occurrences in the N words of a round's answers and μ people's rate. One to three rounds
suffice; the remaining error is that of the counts. λ is fitted on four prompts of five; the fifth,
and the measures that are not fitted, show whether it helped. A fit never uses users' texts. It
writes another profile, which is frozen.

A step whose effective sample size, by importance sampling, would be too small is not taken.

    OUT/styles/NAME-1 …     the profile of each round, for the server
    OUT/round-1 …           its answers (`evaluate.generate`), from which the same command resumes
    OUT/NAME                the frozen profile
    OUT/fit.json            each round's measurements
    OUT/report.html         the same as a page (`styles.report`)

Shapes: P phrases, T answers.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dftserve import atomic
from dftserve.evaluate import reference
from dftserve.evaluate.generate import grid, prompts
from dftserve.evaluate.generate.client import first_model, weights_of
from dftserve.evaluate.generate.grid import Answer, RequestGrid
from dftserve.evaluate.generate.prompts import Prompt
from dftserve.evaluate.metrics.sds import score
from dftserve.evaluate.metrics.stylometry import StyleSpace
from dftserve.evaluate.metrics.two_sample import mmd2
from dftserve.evaluate.reference import Anchors
from dftserve.evaluate.text.tokenize import words
from dftserve.evaluate.text.windows import LEAST_TEXTS, Sample, Windows
from dftserve.openai_client import Server, ServerError
from dftserve.serve import base_url, check_model_or_url, is_url, running, served_name
from dftserve.settings import accepted_names
from dftserve.spec import STYLES_VARIABLE
from dftserve.styles import profile as profiles
from dftserve.styles.build import HELD_OUT, Say, Tick
from dftserve.styles.counts import PER
from dftserve.styles.profile import LARGEST_LOG_RATIO, ProfileError, Stored, with_log_ratios
from dftserve.styles.report import Rate, fit_html
from dftserve.styles.rounds import Fitted, Round, round_text
from dftserve.styles.spellings import Finder

STEP = 0.7
"""Share of the estimated correction that a round makes."""
PRIOR = 2.0
"""Pseudo-occurrences added to the numerator and the denominator of the logarithm."""
LEAST_EFFECTIVE = 0.1
"""Minimum effective share of a round's answers: a larger step is not supported by them."""
SETTLED = 0.05
"""Nats: a round in which no λ changes by this much is the last one."""
MOST_ROUNDS = 20
"""Maximum number of rounds, each of which serves and asks the model."""
RESULT = "fit.json"
REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `dftserve style fit` fits, and on which prompts."""

    server: str
    """A model's folder or its name on the hub, which is served afresh for each round; or the URL of
    a server, which the user restarts with `OUT/styles` for each."""
    profile: Path
    prompts: Path
    out: Path
    rounds: int = 3
    anchors: Path | None = None
    """Human anchors, for the measures that are not fitted."""
    samples: int = 8
    max_tokens: int = 400
    temperature: float = 1.0
    seed: int = 0
    concurrency: int = 16
    served_as: str | None = None
    key_variable: str | None = None
    serve_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, most in (("rounds", MOST_ROUNDS), ("concurrency", 10_000)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted: 1 to {most}.")
        if self.is_url and self.serve_flags:
            raise ValueError(
                f"got the flags {' '.join(self.serve_flags)} and a URL; accepted: vLLM's flags "
                "with a model."
            )
        check_model_or_url(self.server)

    @property
    def is_url(self) -> bool:
        return is_url(self.server)


@dataclass(frozen=True)
class StyledAnswer:
    """An answer written with a profile in force."""

    text: str
    prompt: str
    held_out: bool
    kl: float | None
    """Mean nats per token that the style cost, if the server reports it."""
    group: str = ""
    """As that of a `Sample`."""


Ask = Callable[[str, int], Sequence[StyledAnswer]]
"""(name of the profile in `OUT/styles`, round) → answers."""


@dataclass(frozen=True)
class Fit:
    """The result of a fit."""

    stored: Stored
    rounds: tuple[Round, ...]
    ended: str
    """Why it ended."""
    rates: tuple[Rate, ...]
    """The rate of each phrase in the last round, on the fitted prompts."""

    @property
    def fitted(self) -> Fitted:
        return Fitted(self.ended, self.rounds)


def fit(job: Job, say: Say = print, tick: Tick = lambda done, total: None) -> Fit:
    """Fit, and write the frozen profile.

    Raises:
        ValueError: the profile, the prompts, the anchors or a setting is not accepted, `out` holds
            another fit, or the server at a URL does not have the round's profile.
        RuntimeError: a server does not start, cannot be reached or fails.
    """
    stored = profiles.load(job.profile)
    asked = prompts.read(job.prompts)
    anchors = None if job.anchors is None else reference.load(job.anchors)
    if anchors is not None:
        reference.require_enough_answers(anchors, len(asked), job.samples)
    if (job.out / stored.profile.name).exists():
        raise FileExistsError(
            f"{job.out / stored.profile.name} exists: this fit is done; choose another --out."
        )

    def ask(name: str, number: int) -> list[StyledAnswer]:
        say(f"Round {number}: sampling answers with {name}…")
        return _answers(job, asked, name, number, say, tick)

    result = rounds(stored, ask, job.out, job.rounds, anchors, say)
    atomic.write_text(
        job.out / RESULT,
        json.dumps({"ended": result.ended, "rounds": [asdict(r) for r in result.rounds]}, indent=1)
        + "\n",
    )
    profiles.write(job.out / result.stored.profile.name, result.stored)
    atomic.write_text(
        job.out / REPORT, fit_html(result.stored.profile, result.fitted, result.rates)
    )
    return result


def rounds(
    stored: Stored,
    ask: Ask,
    out: Path,
    most: int,
    anchors: Anchors | None = None,
    say: Say = lambda line: None,
) -> Fit:
    """Run the rounds of a fit, with answers from `ask`.

    Raises:
        ProfileError: the profile has no phrases to fit.
        ValueError: `out` holds another fit, or the answers have no words.
    """
    phrases = stored.profile.phrases
    if not phrases:
        raise ProfileError(f"the style {stored.profile.name!r} has no phrases to fit; build more.")
    finder = Finder([phrase.text for phrase in phrases])
    human_P = np.array([phrase.human_rate for phrase in phrases])
    log_ratio_P = np.array([phrase.log_ratio for phrase in phrases])
    done: list[Round] = []
    rates: tuple[Rate, ...] = ()
    ended = f"{most} rounds"
    for number in range(1, most + 1):
        name = _write_round_profile(stored, log_ratio_P, number, out)
        answers = ask(name, number)
        counts_TP, words_T = _counted(answers, finder, len(phrases))
        rates = _rates(answers, counts_TP, words_T)
        step_P = _step(answers, counts_TP, words_T, human_P, log_ratio_P)
        effective = effective_share(counts_TP[_fitted(answers)], step_P)
        done.append(
            _round(number, answers, counts_TP, words_T, human_P, step_P, effective, anchors)
        )
        say(round_text(done[-1]))
        if effective < LEAST_EFFECTIVE:
            ended = (
                f"round {number}'s step would leave {effective:.0%} of its answers effective; "
                "give more answers to each prompt (--samples)"
            )
            break
        log_ratio_P = log_ratio_P + step_P
        if np.abs(step_P).max() < SETTLED:
            ended = f"settled in round {number}"
            break
    profile = with_log_ratios(stored, log_ratio_P)
    counts = {**stored.counts, "fit": asdict(Fitted(ended, tuple(done)))}
    return Fit(replace(stored, profile=profile, counts=counts), tuple(done), ended, rates)


def updated(
    log_ratio_P: NDArray[np.float64],
    count_P: NDArray[np.float64],
    expected_P: NDArray[np.float64],
) -> NDArray[np.float64]:
    """λ after a round: the rule above, with N·μ as `expected_P`."""
    step_P = STEP * np.log((count_P + PRIOR) / (expected_P + PRIOR))
    return np.clip(log_ratio_P + step_P, 0, LARGEST_LOG_RATIO)


def effective_share(counts_TP: NDArray[np.float64], step_P: NDArray[np.float64]) -> float:
    """(Σw)² / (T·Σw²), where w = e^−Δλ·φ is how much likelier the step makes each answer."""
    log_weight_T = -(counts_TP @ step_P)
    weight_T = np.exp(log_weight_T - log_weight_T.max(initial=-np.inf))
    return float(weight_T.sum() ** 2 / (len(weight_T) * (weight_T**2).sum()))


# ── A round ──────────────────────────────────────────────────────────────────────────────────────


def _write_round_profile(stored: Stored, log_ratio_P: NDArray, number: int, out: Path) -> str:
    """Write the round's profile to `OUT/styles` unless it is there already, and return its name."""
    suffix = f"-{number}"
    name = stored.profile.name[: 64 - len(suffix)] + suffix
    profile = replace(with_log_ratios(stored, log_ratio_P), name=name)
    folder = out / "styles" / name
    if not folder.exists():
        profiles.write(folder, replace(stored, profile=profile))
        return name
    stored_profile = profiles.read(folder)
    same = [phrase.text for phrase in stored_profile.phrases] == [p.text for p in profile.phrases]
    found_P = np.array([phrase.log_ratio for phrase in stored_profile.phrases])
    if not same or not np.allclose(found_P, log_ratio_P, atol=1e-6):
        raise ValueError(
            f"{folder} is a profile of another fit; repeat that fit's command, or choose another "
            "--out."
        )
    return name


def _counted(
    answers: Sequence[StyledAnswer], finder: Finder, phrases: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """float64 [T, P] and [T]: occurrences and words of each answer."""
    counts_TP = np.zeros((len(answers), phrases))
    for index, answer in enumerate(answers):
        for phrase, _, _ in finder.found(answer.text):
            counts_TP[index, phrase] += 1
    words_T = np.array([len(words(answer.text)) for answer in answers], float)
    if not words_T[_fitted(answers)].sum():
        raise ValueError(f"answers: got {len(answers)} without words; does the server work?")
    return counts_TP, words_T


def _fitted(answers: Sequence[StyledAnswer]) -> NDArray[np.bool_]:
    return np.array([not answer.held_out for answer in answers], bool)


def _rates(
    answers: Sequence[StyledAnswer], counts_TP: NDArray, words_T: NDArray
) -> tuple[Rate, ...]:
    fitted_T = _fitted(answers)
    total = int(words_T[fitted_T].sum())
    return tuple(Rate.of(int(count), total) for count in counts_TP[fitted_T].sum(axis=0))


def _step(
    answers: Sequence[StyledAnswer],
    counts_TP: NDArray,
    words_T: NDArray,
    human_P: NDArray,
    log_ratio_P: NDArray,
) -> NDArray[np.float64]:
    fitted_T = _fitted(answers)
    expected_P = human_P * words_T[fitted_T].sum() / PER
    return updated(log_ratio_P, counts_TP[fitted_T].sum(axis=0), expected_P) - log_ratio_P


def _round(
    number: int,
    answers: Sequence[StyledAnswer],
    counts_TP: NDArray,
    words_T: NDArray,
    human_P: NDArray,
    step_P: NDArray,
    effective: float,
    anchors: Anchors | None,
) -> Round:
    fitted_T = _fitted(answers)
    count_P, total = counts_TP[fitted_T].sum(axis=0), words_T[fitted_T].sum()
    held_out_count, held_out_words = counts_TP[~fitted_T].sum(), words_T[~fitted_T].sum()
    rate = Rate.of(int(count_P.sum()), int(total))
    held_out = Rate.of(int(held_out_count), int(held_out_words)) if held_out_words else None
    costs = [answer.kl for answer in answers if answer.kl is not None]
    return Round(
        number=number,
        words=int(words_T.sum()),
        rate=rate.value,
        held_out_rate=None if held_out is None else held_out.value,
        human_rate=float(human_P.sum()),
        above=int((count_P > 2 * human_P * total / PER + PRIOR).sum()),
        mean_kl=float(np.mean(costs)) if costs else None,
        largest_step=float(np.abs(step_P).max()),
        effective=effective,
        unfitted={} if anchors is None else unfitted(answers, anchors),
        interval=(rate.low, rate.high),
        held_out_interval=() if held_out is None else (held_out.low, held_out.high),
    )


def unfitted(answers: Sequence[StyledAnswer], anchors: Anchors) -> dict[str, float]:
    """Measures that the fit does not use: the Style Diversity Score, and √MMD² of style features to
    held-out human text. Empty where too few answers are long enough."""
    samples = [Sample(answer.text, answer.prompt, group=answer.group) for answer in answers]
    texts = Windows.of(samples, anchors.words)
    whole, human = texts.whole(), anchors.test
    if len(whole) < LEAST_TEXTS:
        return {}
    space = StyleSpace.fit(anchors.splits["reference"])
    distance = mmd2(space.features(whole), space.features(human), space.sigma)
    return {
        "sds": score(texts, anchors.sds_reference).sds.value,
        "mmd_style": float(np.sqrt(max(distance, 0.0))),
    }


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


def _answers(
    job: Job, asked: tuple[Prompt, ...], name: str, number: int, say: Say, tick: Tick
) -> list[StyledAnswer]:
    folder = job.out / f"round-{number}"
    is_whole = grid.count_answers(folder) == len(asked) * job.samples
    if job.is_url and not is_whole:
        server = Server(base_url(job.server), job.key_variable, retries=0)
        _check_has_style(server, name, (job.out / "styles").resolve())
    wanted = RequestGrid(
        model=_model(job, folder, is_whole, say),
        prompts=asked,
        grid=(0,),
        samples=job.samples,
        max_tokens=job.max_tokens,
        temperature=job.temperature,
        # Rounds are independent draws, so that they do not share their sampling error.
        seed=job.seed + number,
        body={"style": {"name": name, "strength": 1}},
        weights=None if job.is_url else weights_of(job.server, say),
    )
    grid.check_asked(wanted, folder)  # Before minutes go into starting a server.
    if (unknown := grid.unknown_weights_warning(wanted, folder)) is not None:
        say(unknown)
    with contextlib.ExitStack() as stack:
        url = "" if is_whole else stack.enter_context(_served(job, name, number))
        server = Server(url, job.key_variable)
        answers = grid.generate(
            wanted, folder, server=server, concurrency=job.concurrency, tick=tick
        )
    return [_styled_answer(answer, asked[answer.place], len(asked)) for answer in answers]


def _model(job: Job, folder: Path, is_whole: bool, say: Say) -> str:
    """The model's name in the requests of this run; stored answers may have been asked for under
    another one."""
    if job.served_as is not None:
        return job.served_as
    if not job.is_url:
        return served_name(job.server, job.serve_flags)
    kept = (grid.read_asked(folder) or {}).get("model") if is_whole else None
    return first_model(Server(base_url(job.server), job.key_variable), kept, say)


def _styled_answer(answer: Answer, prompt: Prompt, prompts: int) -> StyledAnswer:
    """Empty answers are kept, as a prompt with fewer of them could not be scored (`unfitted`)."""
    return StyledAnswer(
        text=answer.final_text,
        prompt=prompt.text,
        held_out=prompts >= HELD_OUT and answer.place % HELD_OUT == HELD_OUT - 1,
        kl=(answer.figures or {}).get("mean_kl"),
        group=prompt.group,
    )


@contextlib.contextmanager
def _served(job: Job, name: str, number: int) -> Iterator[str]:
    """The URL of a server that has the round's profile; one given by its URL has been checked."""
    if job.is_url:
        yield base_url(job.server)
        return
    styles = (job.out / "styles").resolve()
    log = job.out / f"server-{number}.log"
    with running(
        job.server, *job.serve_flags, env={STYLES_VARIABLE: str(styles)}, log=log
    ) as server:
        _check_has_style(Server(server.url, job.key_variable, retries=0), name, styles)
        yield server.url


def _check_has_style(server: Server, name: str, styles: Path) -> None:
    """Check that the server which the user restarted has the profile of this round.

    Raises:
        ValueError: the server does not have the profile.
        ServerError: there is no server, or it fails.
    """
    advice = (
        f"restart the server with {STYLES_VARIABLE}={styles}, and run this command again: it "
        "continues with this round."
    )
    try:
        capabilities = server.capabilities() or {}
    except ServerError as error:
        raise ServerError(f"{error} The profile {name!r} is written; {advice}") from None
    known = capabilities.get("styles")
    refused = capabilities.get("styles_refused")
    if isinstance(known, list) and name in known:
        return
    if isinstance(refused, Mapping) and name in refused:
        raise ValueError(f"{server.url} refuses the style {name!r}: {refused[name]}")
    listed = accepted_names(name, map(str, known)) if isinstance(known, list) and known else "none"
    raise ValueError(f"{server.url} does not have the style {name!r} (it has: {listed}); {advice}")
