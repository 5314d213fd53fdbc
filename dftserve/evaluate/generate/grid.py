"""Request answers from a server: each prompt, several times, at each diversity of a grid.

Each answer is appended to `answers.jsonl` as soon as it is received. The same call resumes a
stopped run: only missing answers are requested, including those in flight when it stopped.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dftserve import atomic
from dftserve.bounded_files import read_json, shaped_as
from dftserve.evaluate.generate.answers import AnswerStore, read
from dftserve.evaluate.generate.in_force import check, is_off
from dftserve.evaluate.generate.prompts import Prompt
from dftserve.evaluate.text.thinking import after_thinking, is_cut
from dftserve.evaluate.text.windows import Sample
from dftserve.openai_client import Server, ask_all

if TYPE_CHECKING:
    from openai import AsyncOpenAI

ANSWERS = "answers.jsonl"
ASKED = "asked.json"
LARGEST_ASKED = 512 << 20
"""Maximum bytes of asked.json, which contains the prompts."""
RESERVED = frozenset(
    ("model", "messages", "max_tokens", "temperature", "seed", "diversity", "n", "stream")
)
"""Fields of a request that `body` may not have."""


@dataclass(frozen=True)
class RequestGrid:
    """The requests of a run. Two runs with equal values send the same requests."""

    model: str
    prompts: tuple[Prompt, ...]
    grid: tuple[Any, ...]
    """Diversities: numbers in [0, 1], or objects, or "human", as the field accepts them."""
    samples: int
    """Answers to each prompt at each diversity."""
    max_tokens: int = 1024
    temperature: float = 1.0
    seed: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)
    """Extra fields of each request, as vLLM accepts them: `top_p`, `chat_template_kwargs`, …"""
    weights: str | None = None
    """`client.weights_of` the model; None: unknown, as behind a URL."""

    def __post_init__(self) -> None:
        heated = [level for level in self.grid if not is_off(level)]
        shown = [json.dumps(level, sort_keys=True) for level in self.grid]
        if not shown or len(set(shown)) < len(shown):
            raise ValueError(
                f"grid: got {', '.join(shown) or 'nothing'}; accepted: each value once."
            )
        for name, least in (("samples", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted: {least} or more.")
        if reserved := sorted(set(self.body) & RESERVED):
            raise ValueError(
                f"body: got {', '.join(reserved)}; accepted: other fields, as the run sets these."
            )
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature: got {self.temperature}; accepted: 0 to 2.")
        if self.temperature == 0 and heated:
            raise ValueError(
                f"temperature: got 0 with the diversities {', '.join(shown)}; accepted: above 0, "
                "as greedy decoding does not sample and diversity has no effect; or a grid of 0 "
                "alone."
            )

    def requests(self) -> Iterator["Request"]:
        """Ordered so that a stopped run has answers at all diversities for some of the prompts."""
        for place, prompt in enumerate(self.prompts):
            for sample in range(self.samples):
                for level in range(len(self.grid)):
                    yield Request(level, place, sample, prompt)

    def request_body(self, request: "Request") -> dict[str, Any]:
        """The seed does not depend on the diversity, because levels are compared in pairs."""
        return {
            "model": self.model,
            "messages": request.prompt.messages(),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": (self.seed * 1_000_003 + request.place * 1009 + request.sample) % 2**31,
            "extra_body": {**self.body, "diversity": self.grid[request.level]},
        }


@dataclass(frozen=True)
class Request:
    """Indices into the grid (`level`), the prompts (`place`) and a prompt's answers (`sample`)."""

    level: int
    place: int
    sample: int
    prompt: Prompt

    @property
    def key(self) -> tuple[int, int, int]:
        return self.level, self.place, self.sample


@dataclass(frozen=True)
class Answer:
    """An answer as it is stored: a line of answers.jsonl. The indices are those of its
    `Request`."""

    level: int
    place: int
    sample: int
    text: str | None
    """As the server returned it; None: `message.content` was null."""
    finish_reason: str | None
    tokens: int
    figures: dict[str, float] | None
    """`diversity.choices[0]` of the response, merged with `style.choices[0]` if there was a style;
    None if both were off."""

    @property
    def key(self) -> tuple[int, int, int]:
        return self.level, self.place, self.sample

    @property
    def is_cut(self) -> bool:
        """Whether it ended in its thinking, so that there is no text to measure."""
        return is_cut(self.text)

    @property
    def final_text(self) -> str:
        """The text without the thinking before it."""
        return after_thinking(self.text)


@dataclass(frozen=True)
class LevelSamples:
    """The answers in a folder at one diversity."""

    diversity: Any
    samples: tuple[Sample, ...]
    """Answers that are not cut."""
    cut: int
    """Answers that ended in their thinking, which are left out."""


def generate(
    request_grid: RequestGrid,
    folder: Path,
    *,
    server: Server,
    concurrency: int,
    tick: Callable[[int, int], object],
) -> list[Answer]:
    """All answers, in the order of the requests; those missing from the folder are requested.

    Args:
        tick: called after each new answer with the number of answers so far and their total.

    Raises:
        ValueError: the folder has answers to other requests or of another model, another run is
            writing to it, the server refuses a request, or it sampled an answer with other settings
            than requested; that answer is not stored.
        ServerError: the server cannot be reached, or sends an unexpected response.
    """
    with AnswerStore(folder / ANSWERS, Answer) as store:
        if check_asked(request_grid, folder) is None:
            content = json.dumps(_as_json(request_grid), ensure_ascii=False, indent=1)
            atomic.write_text(folder / ASKED, content + "\n")
        known = {answer.key: answer for answer in store.rows}
        requests = list(request_grid.requests())
        missing = [request for request in requests if request.key not in known]

        async def ask(client: "AsyncOpenAI", request: Request) -> None:
            answer = await _ask(client, server, request_grid, request)
            store.append(answer)
            known[answer.key] = answer
            tick(len(known), len(requests))

        if missing:
            ask_all(server, missing, ask, concurrency)
    return [known[request.key] for request in requests]


def count_answers(folder: Path) -> int:
    """The number of answers in a folder."""
    return len(read(folder / ANSWERS, Answer))


def samples_by_level(folder: Path) -> list[LevelSamples]:
    """The answers in a folder, by the diversity that they were requested at.

    Raises:
        ValueError: the folder has no evaluation.
    """
    asked = read_asked(folder)
    if asked is None:
        raise ValueError(f"{folder}: no {ASKED}; accepted: the OUT of `dftserve evaluate`.")
    with shaped_as(folder, "the OUT of `dftserve evaluate`"):
        prompts = [Prompt(each["text"], each.get("system", "")) for each in asked["prompts"]]
        levels: list[list[Answer]] = [[] for _ in asked["grid"]]
        for answer in read(folder / ANSWERS, Answer):
            levels[answer.level].append(answer)
        return [
            LevelSamples(
                diversity,
                tuple(_sample(a, prompts[a.place]) for a in answers if not a.is_cut),
                sum(answer.is_cut for answer in answers),
            )
            for diversity, answers in zip(asked["grid"], levels, strict=True)
        ]


def _sample(answer: Answer, prompt: Prompt) -> Sample:
    return Sample(answer.final_text, prompt.text, group=prompt.group)


def read_asked(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's asked.json, the requests behind its answers; None if there is none.

    Raises:
        ValueError: the file is not what `generate` writes.
    """
    try:
        asked = read_json(folder / ASKED, within=folder, largest=LARGEST_ASKED)
    except FileNotFoundError:
        return None
    if not isinstance(asked, dict):
        raise ValueError(f"{folder / ASKED}: accepted: what `dftserve evaluate` wrote.")
    return asked


def check_asked(request_grid: RequestGrid, folder: Path) -> dict[str, Any] | None:
    """As `read_asked`, but check that the folder's answers belong to these requests.

    Weights that are unknown, then or now, match any others (see `unknown_weights_warning`).

    Raises:
        ValueError: they belong to other requests or to another model.
    """
    wanted, before = _as_json(request_grid), read_asked(folder)
    if before is None:
        return None
    changed = [name for name in wanted if wanted[name] != before.get(name)]
    if None in (wanted["weights"], before.get("weights")) and "weights" in changed:
        changed.remove("weights")
    if changed == ["weights"]:
        raise ValueError(
            f"{folder}: holds answers of other weights: {request_grid.model} was trained or "
            "replaced since; accepted: another folder (`--out`) for this model, or the weights "
            "that gave these answers."
        )
    if changed:
        shown = ", ".join(
            name
            if name in ("prompts", "weights")
            else f"{name} {before.get(name)!r} (now {wanted[name]!r})"
            for name in changed
        )
        raise ValueError(
            f"{folder}: holds answers to other requests: {shown}; accepted: the same settings, or "
            "another folder."
        )
    return before


def unknown_weights_warning(request_grid: RequestGrid, folder: Path) -> str | None:
    """A warning if it is unknown whether a folder's answers come from the current weights; None if
    it is known, or there are no answers."""
    before = read_asked(folder)
    if before is None or not count_answers(folder):
        return None
    if None not in (request_grid.weights, before.get("weights")):
        return None
    return (
        f"The answers in {folder} are assumed to be {request_grid.model}'s: whether its weights "
        "have changed since is not known, as servers do not report it."
    )


def _as_json(request_grid: RequestGrid) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(request_grid)))


async def _ask(
    client: "AsyncOpenAI", server: Server, request_grid: RequestGrid, request: Request
) -> Answer:
    with server.errors():
        answer = await client.chat.completions.create(**request_grid.request_body(request))
    choice = server.choices(answer)[0]
    extra = answer.model_extra or {}
    asked = {
        "diversity": request_grid.grid[request.level],
        "style": request_grid.body.get("style"),
    }
    check({name: value for name, value in asked.items() if value is not None}, extra)
    figures = [(extra.get(name) or {}).get("choices") or [None] for name in asked]
    return Answer(
        *request.key,
        text=choice.message.content,
        finish_reason=choice.finish_reason,
        tokens=answer.usage.completion_tokens if answer.usage else 0,
        figures={**(figures[0][0] or {}), **(figures[1][0] or {})} or None,
    )
