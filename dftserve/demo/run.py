"""`make demo`: fetch a model, sample answers, tune it, sample again, and show both.

    from dftserve.demo.run import demo
    demo(Path("build/demo"))

Every part keeps its result in the folder and is skipped if it is there.
"""

import contextlib
import json
import os
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI
from rich.console import Console

from dftserve import atomic
from dftserve.demo import ask, show
from dftserve.demo.mark import can_find_errors
from dftserve.demo.model import smollm2
from dftserve.serve import running
from dftserve.spec import FINAL

PAGE = "demo.html"
HEARTBEAT_SECONDS = 30.0
FLAGS = ("--max-model-len", "1024", "--max-num-seqs", "36", "--enforce-eager")
CPU_FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "400000000")
ESTIMATE = (
    "About seven minutes on two idle cores, in five parts; finished parts are kept in {folder} "
    "and not repeated."
)


def demo(folder: Path) -> None:
    """Show what diversity does to a model's answers, before and after a short tuning.

    Raises:
        RuntimeError: the model could not be fetched, or a server did not start.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # Of loading weights.
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    console.print(ESTIMATE.format(folder=folder), highlight=False)
    console.print(show.WHAT, highlight=False)
    with _part(1, "the model", console):
        base = smollm2(folder / "smollm2", console.print)
    with _part(2, "its answers", console):
        before = _answers(base, folder / "answers-before.json", folder, console)
    stages = [show.Stage("Before tuning", before)]
    show.on_terminal(stages[0], console)
    with _part(3, "Distribution Fine-Tuning by LoRA on paragraphs of 18 authors", console):
        tuned = _tuned(base, folder, console)
    with _part(4, "the tuned model's answers", console):
        after = _answers(tuned, folder / "answers-after.json", folder, console)
    stages.append(show.Stage("After tuning", after))
    show.on_terminal(stages[1], console)
    with _part(5, "the page", console):
        atomic.write_text(folder / PAGE, show.as_page(stages, _notes(tuned), next_steps(tuned)))
    console.print(f"{folder / PAGE} has all {len(before) + len(after)} answers.", highlight=False)
    for note in _notes(tuned):
        console.print(note, highlight=False)
    console.print(f"{time.monotonic() - start:.0f} s in all.\n", highlight=False)
    console.print(next_steps(tuned), highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _part(number: int, what: str, console: Console) -> Iterator[None]:
    start = time.monotonic()
    console.print(f"\n[bold]{number}/5  {what}[/bold]", highlight=False)
    with _heartbeat(console, start):
        yield
    console.print(f"{number}/5  {time.monotonic() - start:.0f} s", highlight=False)


@contextlib.contextmanager
def _heartbeat(console: Console, start: float) -> Iterator[None]:
    """Print a line now and then, so that a part without output does not seem to hang."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            console.print(f"  … {time.monotonic() - start:.0f} s", highlight=False)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _answers(model: Path, kept: Path, folder: Path, console: Console) -> list[ask.Answer]:
    if (stored := ask.load(kept)) is not None:
        console.print(f"They are already in {kept}.", highlight=False)
        return stored
    log = folder / f"{kept.stem}.log"
    with console.status("Starting vLLM…") as status, _one_thread_each():
        console.print(f"Starting vLLM; its log is {log}.", highlight=False)
        with running(str(model), *serve_flags(), log=log, timeout=900) as server:

            def tick(done: int, total: int) -> None:
                status.update(f"Sampling: {done} of {total} answers")

            client = OpenAI(base_url=server.url, api_key="EMPTY", max_retries=0, timeout=900)
            answers = ask.ask(client, server.model, tick)
    ask.save(answers, kept)
    return answers


def _tuned(base: Path, folder: Path, console: Console) -> Path:
    if (folder / "dft" / FINAL).exists():
        console.print(f"It is already in {folder / 'dft' / FINAL}.", highlight=False)
        return folder / "dft" / FINAL
    from dftserve.demo.tune import tune

    return tune(base, folder, lambda line: console.print(line, highlight=False))


def _notes(tuned: Path) -> list[str]:
    from dftserve.demo.tune import held_out_metrics

    metrics = held_out_metrics(tuned)
    notes = [
        f"Held-out paragraphs: {metrics['untouched_human_nll']:.2f} nats per token before tuning, "
        f"{metrics['human_nll']:.2f} after. Such a small model, tuned on a few pages, still writes "
        "much that makes no sense: this shows how it works, not what quality is possible."
    ]
    if not can_find_errors():
        notes.append("Errors are not marked: harper-py is not installed.")
    return notes


def next_steps(model: Path) -> str:
    """The commands that serve the model and send it one request."""
    host = ("--host", "127.0.0.1")  # By default vLLM listens on all interfaces, without a key.
    serve = shlex.join([".venv/bin/dftserve", "serve", str(model), *host, *serve_flags()])
    asked = json.dumps(ask.body(str(model), ask.PROMPTS[0], 0.5, 1))
    url = "http://localhost:8000/v1/chat/completions"
    post = f"curl -s {url} -H 'content-type: application/json' -d {shlex.quote(asked)}"
    return f"Serve it, and try it yourself:\n\n    {serve}\n    {post}"


def serve_flags() -> tuple[str, ...]:
    """vLLM's flags for a small model, on a GPU or on a CPU."""
    import torch

    return FLAGS if torch.cuda.is_available() else (*FLAGS, *CPU_FLAGS)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """On a CPU, vLLM's processes are fastest with one thread each; a user's own setting is kept."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
