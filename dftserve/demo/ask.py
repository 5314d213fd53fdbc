"""Send a server the demo's prompts, each several times at each diversity, and store the answers.

answers = ask(client, model="build/demo/smollm2", tick=lambda done, all: None)
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from dftserve import atomic
from dftserve.bounded_files import read_json, shaped_as

PROMPTS = (
    "Write the opening paragraph of a story.",
    "Describe a stranger who comes to town.",
    "Tell me about a night you will never forget.",
)
"""None of these is in prose.jsonl."""
LEVELS: tuple[float | None, ...] = (None, 0.5, 1.0)
"""None: the field is not sent, and vLLM samples as usual, at temperature 1."""
TIMES = 4
MAX_TOKENS = 100
LARGEST = 1 << 22
"""Maximum size of a file of answers, in bytes."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt at one level of `diversity` (None: stock sampling)."""

    prompt: str
    level: float | None
    seed: int
    text: str
    tokens: int
    statistics: Mapping[str, float]
    """`diversity.choices[0]` of the response; empty if no diversity was in force."""


def body(model: str, prompt: str, level: float | None, seed: int) -> dict[str, Any]:
    """One request's JSON body."""
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
        "seed": seed,
    }
    return asked if level is None else {**asked, "diversity": level}


def ask(client: OpenAI, model: str, tick: Callable[[int, int], None]) -> list[Answer]:
    """Send every prompt TIMES times at every level, all concurrently; answers in request order.

    Args:
        tick: called with the number of answers so far, and their total.
    """
    wanted = [
        (prompt, level, number)
        for prompt in PROMPTS
        for level in LEVELS
        for number in range(1, TIMES + 1)
    ]
    with ThreadPoolExecutor(len(wanted)) as pool:
        asked = [pool.submit(_one, client, model, *each) for each in wanted]
        for done, _ in enumerate(as_completed(asked), 1):
            tick(done, len(wanted))
    return [each.result() for each in asked]


def _one(client: OpenAI, model: str, prompt: str, level: float | None, seed: int) -> Answer:
    request = body(model, prompt, level, seed)
    extra = {name: request.pop(name) for name in ("diversity",) if name in request}
    response = client.chat.completions.create(**request, extra_body=extra)
    diversity = (response.model_extra or {}).get("diversity", {"choices": [None]})
    return Answer(
        prompt=prompt,
        level=level,
        seed=seed,
        text=(response.choices[0].message.content or "").strip(),
        tokens=response.usage.completion_tokens if response.usage else 0,
        statistics=diversity["choices"][0] or {},
    )


def save(answers: list[Answer], path: Path) -> None:
    """Write the answers as a JSON list."""
    atomic.write_text(path, json.dumps([asdict(each) for each in answers], indent=1) + "\n")


def load(path: Path) -> list[Answer] | None:
    """The answers that `save` wrote; None if there is no file, or it is of other questions.

    Raises:
        ValueError: the file has other content.
    """
    if not path.exists():
        return None
    content = read_json(path, largest=LARGEST, within=path.parent)
    with shaped_as(path, "answers that the demo wrote; remove it"):
        answers = [Answer(**each) for each in content]
    questions = {(each.prompt, each.level, each.seed) for each in answers}
    wanted = {(p, level, n) for p in PROMPTS for level in LEVELS for n in range(1, TIMES + 1)}
    return answers if questions == wanted else None
