"""Run an evaluation: request answers at each diversity of a grid, measure them, write the result.

OUT/asked.json      the prompts and settings        OUT/result.json   every number
OUT/answers.jsonl   every answer, unchanged         OUT/report.html   (`report.html.write`)
"""

import contextlib
import hashlib
import json
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dftserve import __version__, atomic
from dftserve.evaluate import reference
from dftserve.evaluate.generate.client import first_model, weights_of
from dftserve.evaluate.generate.grid import (
    Answer,
    RequestGrid,
    check_asked,
    count_answers,
    generate,
    read_asked,
    unknown_weights_warning,
)
from dftserve.evaluate.generate.prompts import Prompt
from dftserve.evaluate.generate.prompts import read as read_prompts
from dftserve.evaluate.metrics import slop
from dftserve.evaluate.metrics.intervals import Estimate, mean
from dftserve.evaluate.metrics.sds import Score, score
from dftserve.evaluate.metrics.stylometry import StyleSpace, function_share
from dftserve.evaluate.metrics.suite import Instruments, measure
from dftserve.evaluate.reference import LEAST_FUNCTION_WORDS, Anchors
from dftserve.evaluate.report.results import BIN_NATS, BINS, RESULT, Entropy, Level, Result, Side
from dftserve.evaluate.text.embeddings import Embedder, embedder
from dftserve.evaluate.text.windows import LEAST_TEXTS, Sample, Windows
from dftserve.hub import folder_of
from dftserve.openai_client import Server, key_of
from dftserve.serve import base_url, check_model_or_url, is_url, running, served_name

TOKENS_PER_WORD = 1.3
"""Of English prose, by the vocabularies of current models; only for a warning."""
SHOWN = 3
"""Number of prompts whose answers are shown side by side in the report."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to evaluate, against what, and where to write it."""

    model: str
    """A checkpoint, which is served during the run, or the URL of a server."""
    prompts: Path
    anchors: Path
    out: Path
    grid: tuple[Any, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 8
    max_tokens: int = 1024
    temperature: float = 1.0
    seed: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)
    """Extra fields of each request."""
    name: str | None = None
    """The model's name on the server; None: the first that it lists."""
    key_variable: str | None = None
    """The environment variable that holds the API key; None: OPENAI_API_KEY, where it is set."""
    concurrency: int = 16
    phrases: Path | None = None
    """A list of phrases to count; None: the built-in one."""
    embeddings: str | None = None
    """A sentence-transformers model, or `installed`; None: meaning is not measured."""
    serve_flags: tuple[str, ...] = ()
    """vLLM's flags, if `model` is a checkpoint."""
    weights: str | None = None
    """`weights_of` the checkpoint behind the URL; None: unknown."""

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency: got {self.concurrency}; accepted: 1 or more.")
        if self.serve_flags and self.is_url:
            raise ValueError(
                f"got {' '.join(self.serve_flags)} and a URL; accepted: this command's own "
                "options; vLLM's flags need a checkpoint."
            )
        check_model_or_url(self.model)
        self.requests("", ())  # Raises for a setting before texts are read or a server is asked.

    def requests(
        self, model: str, prompts: tuple[Prompt, ...], weights: str | None = None
    ) -> RequestGrid:
        return RequestGrid(
            model=model,
            prompts=prompts,
            grid=self.grid,
            samples=self.samples,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            body=self.body,
            weights=weights,
        )

    @property
    def is_url(self) -> bool:
        return is_url(self.model)


def evaluate(job: Job, say: Callable[[str], object], tick: Callable[[int, int], object]) -> Result:
    """Request the answers, measure them and write the result.

    Args:
        say: called with each line for the user.
        tick: called with the number of answers so far and their total.

    Raises:
        ValueError: a file, a setting or the texts are not accepted.
        RuntimeError: a server does not start, cannot be reached or fails.
    """
    anchors = reference.load(job.anchors)
    prompts = read_prompts(job.prompts)
    reference.require_enough_answers(anchors, len(prompts), job.samples)
    if job.max_tokens < TOKENS_PER_WORD * anchors.words:
        say(
            f"Warning: of answers of at most {job.max_tokens} tokens few have the {anchors.words} "
            "words of the anchors, and shorter ones are not measured; ask for more (--max-tokens)."
        )
    instruments = Instruments(
        style_space=StyleSpace.fit(anchors.splits["reference"]),
        phrases=slop.read_phrases(job.phrases or slop.OURS),
        embed=_embedder(job.embeddings),
    )
    request_grid, answers = ask(job, prompts, say, tick)
    say("Measuring…")
    result = assess(request_grid, answers, anchors, reference.digest(job.anchors), instruments)
    atomic.write_text(job.out / RESULT, result.as_json())
    return result


def ask(
    job: Job,
    prompts: tuple[Prompt, ...],
    say: Callable[[str], object],
    tick: Callable[[int, int], object],
) -> tuple[RequestGrid, list[Answer]]:
    """All answers; those missing from the folder are requested. If none are, no server is needed.

    Args:
        prompts: the contents of `job.prompts`.

    Raises as `evaluate`.
    """
    done, total = count_answers(job.out), len(prompts) * len(job.grid) * job.samples
    say(f"{job.out}: {done} of {total} answers are there.")
    is_complete = done == total
    weights = job.weights if job.is_url else weights_of(job.model, say)
    request_grid = job.requests(_model(job, is_complete, say), prompts, weights)
    check_asked(request_grid, job.out)  # Before starting a server, which takes minutes.
    if (warning := unknown_weights_warning(request_grid, job.out)) is not None:
        say(warning)

    with contextlib.ExitStack() as stack:
        url = "" if is_complete else stack.enter_context(server(job, say))
        answers = generate(
            request_grid,
            job.out,
            server=Server(url, job.key_variable),
            concurrency=job.concurrency,
            tick=tick,
        )
    return request_grid, answers


def _model(job: Job, is_complete: bool, say: Callable[[str], object]) -> str:
    """The model name to request, whatever name the folder's answers were requested under."""
    if job.name is not None:
        return job.name
    if not job.is_url:
        return served_name(job.model, job.serve_flags)
    kept = (read_asked(job.out) or {}).get("model") if is_complete else None
    return first_model(Server(base_url(job.model), job.key_variable), kept, say)


@contextlib.contextmanager
def server(job: Job, say: Callable[[str], object]) -> Iterator[str]:
    """The URL of the job's server. A checkpoint is served until the context exits."""
    key_of(job.key_variable)  # Before starting a server, which takes minutes.
    if job.is_url:
        yield base_url(job.model)
        return
    folder_of(job.model)  # vLLM would refuse a wrong name only after its start, with a traceback.
    say(f"Serving {job.model}…")
    job.out.mkdir(parents=True, exist_ok=True)
    log = job.out / "server.log"
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(running(job.model, *job.serve_flags, log=log))
        except RuntimeError as error:
            raise RuntimeError(f"{error}\nThe whole log is {log}.") from None
        yield started.url


def assess(
    request_grid: RequestGrid,
    answers: Sequence[Answer],
    anchors: Anchors,
    anchors_digest: str,
    instruments: Instruments,
) -> Result:
    """Measure answers.

    Raises:
        ValueError: too few answers are long enough.
    """
    start = time.perf_counter()
    by_level = [
        _AtLevel.of(
            [answer for answer in answers if answer.level == level],
            request_grid.prompts,
            anchors.words,
        )
        for level in range(len(request_grid.grid))
    ]
    calibration, test = anchors.splits["calibration"], anchors.test
    compared = min(len(calibration), len(test), *(level.whole for level in by_level))
    if compared < LEAST_TEXTS:
        raise ValueError(_too_few_texts(by_level, anchors.words, request_grid.max_tokens))
    _require_english([level.windows for level in by_level])
    side = partial(_side, compared=compared, instruments=instruments)
    levels = tuple(
        _level(diversity, level, request_grid.prompts, anchors, side)
        for diversity, level in zip(request_grid.grid, by_level, strict=True)
    )
    return Result(
        model=request_grid.model,
        asked=_settings(request_grid),
        anchors={
            "digest": anchors_digest,
            "words": anchors.words,
            "by_prompt": anchors.sds_reference.by_prompt,
            "texts": {name: len(split) for name, split in anchors.splits.items()},
        },
        compared=compared,
        embeddings=instruments.embed.name if instruments.embed else None,
        phrases=instruments.phrases.digest,
        human=side(calibration, test, anchors.human),
        levels=levels,
        cost={
            "seconds_scoring": round(time.perf_counter() - start, 2),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
        versions={"dftserve": __version__, "python": platform.python_version()},
    )


@dataclass(frozen=True)
class _AtLevel:
    """The answers at one diversity, and their windows of words."""

    answers: Sequence[Answer]
    windows: Windows

    @classmethod
    def of(cls, answers: Sequence[Answer], prompts: Sequence[Prompt], words: int) -> "_AtLevel":
        return cls(answers, Windows.of([_sample(each, prompts) for each in answers], words))

    @property
    def uncut(self) -> list[Answer]:
        """Those that did not end in their thinking."""
        return [answer for answer in self.answers if not answer.is_cut]

    @property
    def cut(self) -> int:
        return len(self.answers) - len(self.uncut)

    @property
    def whole(self) -> int:
        """Number of answers that are as long as a window."""
        return len(self.windows) - self.windows.short


def _too_few_texts(by_level: Sequence[_AtLevel], words: int, max_tokens: int) -> str:
    shown = ", ".join(f"{level.whole} of {len(level.answers)}" for level in by_level)
    if cut := sum(level.cut for level in by_level):
        shown += f" ({cut} ended in their thinking)"
    return (
        f"answers of {words} words or more, by diversity: {shown}; accepted: {LEAST_TEXTS} at "
        f"each. Ask for more or longer texts (`--max-tokens`, now {max_tokens}), or build anchors "
        "with fewer `--words`."
    )


def _side(
    texts: Windows, human: Windows, scored: Score, *, compared: int, instruments: Instruments
) -> Side:
    """The measures of `compared` of the texts, and of as many human ones."""
    some, other = (_evenly_spaced(each, compared) for each in (texts.whole(), human))
    measures = measure(some, other, instruments)
    return Side(scored, measures, tuple(slop.most_repeated(some.texts)))


def _level(
    diversity: Any,
    at_level: _AtLevel,
    prompts: Sequence[Prompt],
    anchors: Anchors,
    side: Callable[[Windows, Windows, Score], Side],
) -> Level:
    uncut = at_level.uncut
    return Level(
        diversity=diversity,
        side=side(at_level.windows, anchors.test, _score(at_level.windows, at_level.cut, anchors)),
        tokens=mean([each.tokens for each in uncut], groups=_prompt_groups(uncut)),
        cut=at_level.cut,
        unfinished=sum(each.finish_reason == "length" for each in uncut),
        entropy=_entropy(uncut),
        samples=_samples(prompts, at_level.answers),
    )


def _sample(answer: Answer, prompts: Sequence[Prompt]) -> Sample:
    """A cut answer is an empty text, so that the others to its prompt are still enough to compare
    within it."""
    prompt = prompts[answer.place]
    return Sample("" if answer.is_cut else answer.final_text, prompt.text, group=prompt.group)


def _score(texts: Windows, cut: int, anchors: Anchors) -> Score:
    """The score, whose numbers of texts do not include the answers that are cut."""
    whole_score = score(texts, anchors.sds_reference)
    return replace(whole_score, texts=whole_score.texts - cut, short=whole_score.short - cut)


def _require_english(windows: Sequence[Windows]) -> None:
    """Check that at least one level is English; word salad at others is measured and scores 0."""
    shares = [function_share(level.texts) for level in windows]
    if max(shares) < LEAST_FUNCTION_WORDS:
        raise ValueError(
            f"answers: {max(shares):.0%} of their words are English function words; accepted: "
            f"English prose ({LEAST_FUNCTION_WORDS:.0%} or more): the style features are English."
        )


def _embedder(named: str | None) -> Embedder | None:
    if named is None:
        return None
    return embedder(None if named == "installed" else named)


def _evenly_spaced(texts: Windows, count: int) -> Windows:
    """`count` of the texts, evenly spaced in their order."""
    return texts.pick(index * len(texts) // count for index in range(count))


def _entropy(answers: Sequence[Answer]) -> Entropy | None:
    def having(name: str) -> list[Answer]:
        return [each for each in answers if (each.figures or {}).get(name) is not None]

    def of(name: str) -> list[float]:
        return [(each.figures or {})[name] for each in having(name)]

    def mean_of(name: str) -> Estimate:
        return mean(of(name), groups=_prompt_groups(having(name)))

    if not having("mean_entropy_before"):
        return None
    return Entropy(
        before=mean_of("mean_entropy_before"),
        after=mean_of("mean_entropy_after"),
        temperature=mean_of("mean_temperature"),
        changed=mean_of("tokens_changed"),
        histogram_before=_histogram(of("mean_entropy_before")),
        histogram_after=_histogram(of("mean_entropy_after")),
    )


def _prompt_groups(answers: Sequence[Answer]) -> list[str]:
    """The group of each answer, which is its prompt."""
    return [f"{answer.place}" for answer in answers]


def _histogram(nats: Sequence[float]) -> tuple[int, ...]:
    bins = [0] * BINS
    for value in nats:
        bins[min(int(max(value, 0.0) / BIN_NATS), BINS - 1)] += 1
    return tuple(bins)


def _samples(
    prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> tuple[tuple[str, str | None], ...]:
    first = {
        answer.place: None if answer.is_cut else answer.final_text
        for answer in answers
        if answer.sample == 0
    }
    return tuple((prompts[place].text, first[place]) for place in sorted(first)[:SHOWN])


def _settings(request_grid: RequestGrid) -> dict[str, Any]:
    prompts = json.dumps([asdict(prompt) for prompt in request_grid.prompts], sort_keys=True)
    return {
        "prompts": hashlib.blake2b(prompts.encode(), digest_size=16).hexdigest(),
        "answers": len(request_grid.prompts) * request_grid.samples,
        "samples": request_grid.samples,
        "max_tokens": request_grid.max_tokens,
        "temperature": request_grid.temperature,
        "seed": request_grid.seed,
        "body": dict(request_grid.body),
    }
