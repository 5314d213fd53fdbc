"""The terminal show: one prompt, two models, eight answers at each diversity, from real vLLM.

    from dftserve.demo.run import demo
    demo(Path("build/demo"))

The models are trained once and kept in the folder.
"""

import contextlib
import json
import os
import shlex
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from openai import OpenAI
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from dftserve.demo.grammar import PROMPTS, parse, valid
from dftserve.serve import Server, running

if TYPE_CHECKING:
    from dftserve.demo.tune import Tuned

PROMPT = "Tell me a story about a lost key."
LEVELS = {"sft": (0.0,), "dft": (0.0, 0.5, 1.0)}
"""Plain fine-tuning is shown as stock vLLM samples from it."""
ANSWERS = 8
"""To each prompt of the grammar; those to PROMPT are shown."""
SHOWN = 3
"""Texts of each level that stand side by side."""
MAX_TOKENS = 160

FLAGS = ("--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager")
CPU_FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "256000000")


@dataclass(frozen=True)
class Answers:
    """What a server said to the prompts, each asked several times at one level."""

    model: str
    level: float
    texts: dict[str, tuple[str, ...]]
    """By prompt."""
    figures: tuple[dict[str, float], ...]
    """The answers' own `diversity.choices`, where the server changed anything."""
    tokens: int
    seconds: float

    def mean(self, name: str) -> str:
        values = [figures[name] for figures in self.figures]
        return f"{fmean(values):.2f}" if values else "–"

    @property
    def title(self) -> str:
        return f"{self.model.upper()}, diversity {self.level:g}{'' if self.level else ' (off)'}"


def demo(folder: Path, console: Console | None = None) -> None:
    """Train and tune where the folder has no models, serve them, ask, and show.

    Raises:
        RuntimeError: a server did not start; with the last lines of its log.
    """
    from transformers.utils import logging

    from dftserve.demo.tune import tune

    logging.disable_progress_bar()
    console = console or Console()
    tuned = tune(folder, console.print)
    with _one_thread_each():
        asked = [answers for each in tuned for answers in _ask_server(each, folder, console)]
    show(asked, console)
    told(tuned, folder, console)


def _ask_server(tuned: "Tuned", folder: Path, console: Console) -> list[Answers]:
    with _server(tuned.folder, folder / f"{tuned.name}.log", console) as server:
        client = OpenAI(base_url=server.url, api_key="EMPTY", max_retries=0)
        ask(client, server.model, tuned.name, 0.0, 1)  # A server's first request is a slow one.
        with console.status("Asking…"):
            return [
                ask(client, server.model, tuned.name, level, ANSWERS)
                for level in LEVELS[tuned.name]
            ]


def ask(client: OpenAI, served: str, model: str, level: float, times: int) -> Answers:
    """Every prompt `times` times, all at once."""

    def once(prompt: str) -> Any:
        return client.chat.completions.create(
            model=served,
            messages=[{"role": "user", "content": prompt}],
            temperature=1.0,
            max_tokens=MAX_TOKENS,
            extra_body={"diversity": level},
        )

    wanted = [prompt for prompt in PROMPTS for _ in range(times)]
    start = time.perf_counter()
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(once, wanted))
    seconds = time.perf_counter() - start
    choices = [answer.model_extra["diversity"]["choices"][0] for answer in answers]
    texts = [answer.choices[0].message.content for answer in answers]
    return Answers(
        model=model,
        level=level,
        texts={
            prompt: tuple(texts[times * place : times * (place + 1)])
            for place, prompt in enumerate(PROMPTS)
        },
        figures=tuple(choice for choice in choices if choice is not None),
        tokens=sum(answer.usage.completion_tokens for answer in answers),
        seconds=seconds,
    )


def show(asked: list[Answers], console: Console) -> None:
    console.print(f"\n[bold]{PROMPT}[/bold]   ✓ = a valid story that answers the prompt\n")
    panels = [
        Panel(
            "\n\n".join(_marked(text) for text in answers.texts[PROMPT][:SHOWN]),
            title=answers.title,
        )
        for answers in asked
        if answers.level < 1
    ]
    console.print(Columns(panels, equal=True, expand=True, width=max(console.width // 3 - 1, 30)))
    console.print(table(asked))


def told(tuned: "list[Tuned]", folder: Path, console: Console) -> None:
    """What training measured, and what to try next."""
    for each in tuned:
        console.print(
            f"{each.name.upper()}: {each.figure('human_nll'):.3f} nats a token on held-out "
            f"stories, next-token entropy {each.figure('model_entropy'):.3f}.",
            highlight=False,
        )
    steps = f"\nServe the tuned model again, and ask it yourself:\n\n{next_steps(tuned[-1].folder)}"
    console.print(steps, highlight=False, markup=False, soft_wrap=True)


def _marked(text: str) -> str:
    sign = "[green]✓[/green]" if valid(PROMPT, text) else "[red]✗[/red]"
    return f"{sign} {text}"


def table(asked: list[Answers]) -> Table:
    grid = Table(
        title=f"{ANSWERS} answers to each of {len(PROMPTS)} prompts; "
        "distinct ones and openings\namong the valid; H: next-token entropy; T: mean temperature"
    )
    for head in ("model", "diversity", "valid", "distinct", "openings", "H, nats", "T", "tok/s"):
        grid.add_column(head, justify="left" if head == "model" else "right", no_wrap=True)
    for answers in asked:
        said = [(prompt, text) for prompt, texts in answers.texts.items() for text in texts]
        stories = [text for prompt, text in said if valid(prompt, text)]
        openings = {story.opening for text in stories if (story := parse(text)) is not None}
        before, after = answers.mean("mean_entropy_before"), answers.mean("mean_entropy_after")
        grid.add_row(
            answers.model.upper(),
            f"{answers.level:g}",
            f"{len(stories) / len(said):.0%}",
            str(len(set(stories))),
            str(len(openings)),
            "–" if not answers.figures else f"{before}→{after}",
            answers.mean("mean_temperature"),
            f"{answers.tokens / answers.seconds:.0f}",
        )
    return grid


def next_steps(folder: Path) -> str:
    """The commands that serve the model again and ask it once."""
    body = {
        "model": str(folder),
        "max_tokens": MAX_TOKENS,
        "diversity": 0.5,
        "messages": [{"role": "user", "content": PROMPT}],
    }
    serve = shlex.join([".venv/bin/dftserve", "serve", str(folder), *_flags()])
    url = "http://localhost:8000/v1/chat/completions"
    post = f"curl -s {url} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"
    return f"    {serve}\n    {post}"


@contextlib.contextmanager
def _server(folder: Path, log: Path, console: Console) -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        with console.status("Starting vLLM…"):
            server = stack.enter_context(running(str(folder), *_flags(), log=log))
        yield server


def _flags() -> tuple[str, ...]:
    import torch

    return FLAGS if torch.cuda.is_available() else (*FLAGS, *CPU_FLAGS)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """vLLM's processes share a CPU best with one thread each; a user's own setting stays."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
