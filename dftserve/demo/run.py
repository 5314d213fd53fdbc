"""The terminal show: one prompt, eight answers at each diversity, from a real vLLM server.

    from dftserve.demo.run import demo
    demo(Path("build/demo"))

The model is trained once and kept in the folder.
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
from typing import Any

from openai import OpenAI
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from dftserve.demo.grammar import parse, valid
from dftserve.serve import Server, running

PROMPT = "Tell me a story about a lost key."
LEVELS = (0.0, 0.5, 1.0)
ANSWERS = 8
SHOWN = 3
"""Texts of each level that stand side by side."""
MAX_TOKENS = 160

FLAGS = ("--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager")
CPU_FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "256000000")


@dataclass(frozen=True)
class Answers:
    """What the server said to one prompt, asked several times at one level."""

    level: float
    texts: tuple[str, ...]
    figures: tuple[dict[str, float], ...]
    """The answers' own `diversity.choices`, where the server changed anything."""
    tokens: int
    seconds: float

    def mean(self, name: str) -> str:
        values = [figures[name] for figures in self.figures]
        return f"{fmean(values):.2f}" if values else "–"


def demo(folder: Path, console: Console | None = None) -> None:
    """Train the model if the folder has none, serve it, ask, and show.

    Raises:
        RuntimeError: the server did not start; with the last lines of its log.
    """
    console = console or Console()
    with _one_thread_each():
        if not (folder / "config.json").exists():
            train(folder, console)
        with _server(folder, console) as server:
            client = OpenAI(base_url=server.url, api_key="EMPTY", max_retries=0)
            ask(client, server.model, 0.0, 1)  # The first request of a server is a slow one.
            asked = [ask(client, server.model, level, ANSWERS) for level in LEVELS]
    show(asked, folder, console)


def train(folder: Path, console: Console) -> None:
    from transformers.utils import logging

    from dftserve.demo.model import STEPS, build

    logging.disable_progress_bar()
    console.print("Writing stories and training a small model on them, about a minute:")
    folder.parent.mkdir(parents=True, exist_ok=True)
    build({folder: STEPS})


def ask(client: OpenAI, model: str, level: float, times: int) -> Answers:
    """The prompt `times` times at once."""

    def once(_: int) -> Any:
        return client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": PROMPT}],
            temperature=1.0,
            max_tokens=MAX_TOKENS,
            extra_body={"diversity": level},
        )

    start = time.perf_counter()
    with ThreadPoolExecutor(times) as pool:
        answers = list(pool.map(once, range(times)))
    seconds = time.perf_counter() - start
    choices = [answer.model_extra["diversity"]["choices"][0] for answer in answers]
    return Answers(
        level=level,
        texts=tuple(answer.choices[0].message.content for answer in answers),
        figures=tuple(choice for choice in choices if choice is not None),
        tokens=sum(answer.usage.completion_tokens for answer in answers),
        seconds=seconds,
    )


def show(asked: list[Answers], folder: Path, console: Console) -> None:
    console.print(f"\n[bold]{PROMPT}[/bold]   ✓ = a valid story that answers the prompt\n")
    panels = [
        Panel("\n\n".join(_marked(text) for text in answers.texts[:SHOWN]), title=_title(answers))
        for answers in asked
    ]
    console.print(Columns(panels, equal=True, expand=True, width=max(console.width // 3 - 1, 30)))
    console.print(table(asked))
    steps = f"\nServe it again, and ask it yourself:\n\n{next_steps(folder)}"
    console.print(steps, highlight=False, markup=False, soft_wrap=True)


def _title(answers: Answers) -> str:
    return f"diversity {answers.level:g}" + (" (off: stock vLLM)" if not answers.level else "")


def _marked(text: str) -> str:
    sign = "[green]✓[/green]" if valid(PROMPT, text) else "[red]✗[/red]"
    return f"{sign} {text}"


def table(asked: list[Answers]) -> Table:
    grid = Table(
        title=f"{ANSWERS} answers at each level; distinct ones and openings among the valid"
    )
    for head in ("diversity", "valid", "distinct", "openings"):
        grid.add_column(head, justify="right")
    for head in ("entropy, nats", "temperature", "tokens/s"):
        grid.add_column(head, justify="right")
    for answers in asked:
        stories = [text for text in answers.texts if valid(PROMPT, text)]
        openings = {story.opening for text in stories if (story := parse(text)) is not None}
        before, after = answers.mean("mean_entropy_before"), answers.mean("mean_entropy_after")
        grid.add_row(
            f"{answers.level:g}",
            f"{len(stories)} of {len(answers.texts)}",
            str(len(set(stories))),
            str(len(openings)),
            f"{before} → {after}",
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
def _server(folder: Path, console: Console) -> Iterator[Server]:
    log = folder.with_name(folder.name + ".log")
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
