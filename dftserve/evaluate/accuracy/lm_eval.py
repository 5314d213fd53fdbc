"""Run MMLU and GSM8K on a server with lm-eval, which has its own environment (`make eval-env`).

    prepare("mmlu", data, folder, limit=500, samples=1)
    answered = measure("mmlu", folder, Served(url, model), diversity=0.5)

Every request carries `diversity` and no seed: with lm-eval's default, 1234, all answers to a
question would be the same. Nothing is downloaded: the questions are the user's files, and access to
the hub is disabled.
"""

import json
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dftserve import atomic
from dftserve.bounded_files import json_rows, lines, shaped_as
from dftserve.evaluate.accuracy.compare import Answered, level_text
from dftserve.evaluate.accuracy.grade import NO_CONTENT
from dftserve.evaluate.accuracy.questions import has_text
from dftserve.evaluate.generate.client import Served
from dftserve.openai_client import NO_KEY, key_of
from dftserve.settings import quoted

TASKS = Path(__file__).parent / "tasks"
ENVIRONMENT = "DFTSERVE_EVAL_ENV"
"""The variable that names lm-eval's environment; default: the checkout's .venv-eval."""
MMLU_SHOTS, GSM8K_SHOTS = 5, 8
LARGEST = 1 << 30
"""Maximum size of a file of questions, in bytes."""
LARGEST_LINE = 1 << 20
"""Maximum bytes of one question."""
LOG_LINES = 20
"""Lines at the end of lm-eval's log that an error shows."""
ANSWERLESS = "LMEVAL_MODEL_NONE_ANSWER_PLACEHOLDER"
"""lm-eval's variable for the text that replaces a null `message.content`."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}


def prepare(task: str, data: Path, folder: Path, *, limit: int | None, samples: int) -> int:
    """Write the file that the task's YAML reads to `folder`, and return the number of questions.

    `limit` questions are spread evenly over the set, and so over MMLU's subjects. Each is written
    `samples` times.

    Raises:
        FileNotFoundError: `data` lacks one of the task's files.
        ValueError: a file has too few questions.
    """
    with shaped_as(data, f"the questions of {task}"):
        chosen = spread(list(PREPARED[task](data)), limit)
    if not chosen:
        raise ValueError(f"{task}: got no questions in {data}; accepted: at least one.")
    lines = [
        json.dumps({**row, "sample": sample}) + "\n" for row in chosen for sample in range(samples)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / f"{task}.jsonl", "".join(lines))
    return len(chosen)


def measure(task: str, folder: Path, served: Served, diversity: float) -> tuple[Answered, ...]:
    """Run lm-eval on the questions in `folder`, and return its answers in their order.

    Raises:
        RuntimeError: lm-eval is not installed, or it failed; the message has the end of its log.
    """
    command = executable()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary).resolve()  # Absolute, since lm-eval runs in `folder`.
        config = work / "config.yaml"
        config.write_text(json.dumps(settings(task, served, diversity, work / "out")))
        log = folder / f"{task}-{level_text(diversity)}.log"
        with log.open("wb") as output:
            done = subprocess.run(
                [command, "run", "--config", config],
                cwd=folder,
                env=environment(work, key_of(served.key_variable) or NO_KEY),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        sample_files = list((work / "out").rglob("samples_*.jsonl"))
        if done.returncode or len(sample_files) != 1:
            lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise RuntimeError(f"lm-eval failed on {task}; the end of {log}:\n" + "\n".join(lines))
        return read_samples(sample_files[0])


def executable() -> Path:
    """The path of the command `lm_eval`.

    Raises:
        RuntimeError: there is no such file.
    """
    checkout = Path(__file__).resolve().parents[3] / ".venv-eval"
    command = Path(os.environ.get(ENVIRONMENT) or checkout) / "bin" / "lm_eval"
    if not command.is_file():
        raise RuntimeError(
            f"no lm-eval at {command}: run `make eval-env`, or name an environment that has it "
            f"(lm-eval[api]==0.4.13) in {ENVIRONMENT}."
        )
    return command


def settings(task: str, served: Served, diversity: float, out: Path) -> dict[str, Any]:
    """The configuration for `lm_eval run --config`."""
    endpoint = "chat/completions" if served.is_chat else "completions"
    return {
        "model": f"local-{endpoint.replace('/', '-')}",
        "model_args": {
            "model": served.model,
            "base_url": f"{served.url}/{endpoint}",
            "tokenizer_backend": "none",  # The server applies its own template and tokenizer.
            "num_concurrent": max(2, served.at_once),  # With 1 it would use HTTP proxies.
            "timeout": 1200,
        },
        "tasks": [f"dftserve_{task}"],
        "include_path": str(TASKS),
        "apply_chat_template": served.is_chat,
        "gen_kwargs": {
            "temperature": served.temperature,
            "do_sample": True,
            "diversity": diversity,
            "seed": None,
            **({} if served.max_tokens is None else {"max_gen_toks": served.max_tokens}),
        },
        "log_samples": True,
        "output_path": str(out),
    }


def environment(work: Path, api_key: str) -> dict[str, str]:
    """Our environment without PYTHON* variables, which could make lm-eval import our packages, and
    with access to the hub disabled."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ours = {"HF_HOME": str(work / "hf"), "OPENAI_API_KEY": api_key, ANSWERLESS: NO_CONTENT}
    return inherited | OFFLINE | ours


def read_samples(path: Path) -> tuple[Answered, ...]:
    """Read lm-eval's log of samples, grouped by question in order of first appearance."""
    # Texts may contain characters that only str.splitlines treats as line ends.
    with path.open(encoding="utf-8", newline="\n") as file:
        rows = sorted(map(json.loads, file), key=lambda row: row["doc_id"])
    by_question: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_question[row["doc"]["id"]].append(row)
    return tuple(
        Answered(
            question,
            right=tuple(row["exact_match"] == 1 for row in several),
            said=tuple(_content(row["resps"][0][0]) for row in several),
            judged=tuple(row["filtered_resps"][0] for row in several),
        )
        for question, several in by_question.items()
    )


def _content(text: str) -> str | None:
    return None if text == NO_CONTENT else text


def spread(rows: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` of the rows, at even distances."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def mmlu(data: Path) -> Iterator[dict[str, Any]]:
    """The questions of MMLU, each with its subject's examples.

    Raises:
        ValueError: a subject has too few examples.
    """
    shots: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in read(data / "mmlu_dev.jsonl", is_mmlu, MMLU_ACCEPTED):
        shots[row["subject"]].append(row)
    for number, row in enumerate(read(data / "mmlu_test.jsonl", is_mmlu, MMLU_ACCEPTED)):
        if len(shots[row["subject"]]) < MMLU_SHOTS:
            raise ValueError(
                f"{data / 'mmlu_dev.jsonl'}: got {len(shots[row['subject']])} questions of "
                f"{row['subject']}; accepted: at least {MMLU_SHOTS}."
            )
        yield {**row, "id": f"mmlu/{number}", "shots": shots[row["subject"]][:MMLU_SHOTS]}


def gsm8k(data: Path) -> Iterator[dict[str, Any]]:
    """The questions of GSM8K, each with the same examples."""
    shots = read(data / "gsm8k_train.jsonl", is_gsm8k, GSM8K_ACCEPTED)[:GSM8K_SHOTS]
    for number, row in enumerate(read(data / "gsm8k_test.jsonl", is_gsm8k, GSM8K_ACCEPTED)):
        yield {**row, "id": f"gsm8k/{number}", "shots": shots}


PREPARED: Mapping[str, Callable[[Path], Iterator[dict[str, Any]]]] = {"mmlu": mmlu, "gsm8k": gsm8k}


MMLU_ACCEPTED = (
    'objects of JSON with "subject" and "question", texts, "choices", four texts, and "answer", '
    "the index of the right one, from 0 to 3"
)
GSM8K_ACCEPTED = (
    'objects of JSON with "question" and "answer", texts; the latter ends with "####" and a number'
)


def is_mmlu(row: Mapping[str, Any]) -> bool:
    choices, answer = row.get("choices"), row.get("answer")
    return (
        has_text(row, "subject", "question")
        and isinstance(choices, list)
        and [type(each) for each in choices] == [str] * 4
        and type(answer) is int  # A bool is an int too.
        and 0 <= answer < 4
    )


def is_gsm8k(row: Mapping[str, Any]) -> bool:
    return has_text(row, "question", "answer") and "####" in row["answer"]


def read(
    path: Path, is_question: Callable[[Mapping[str, Any]], bool], accepted: str
) -> list[dict[str, Any]]:
    """The questions of a .jsonl file.

    Raises:
        ValueError: a line is not a question.
    """
    rows = []
    for where, row in json_rows(lines(path, largest=LARGEST, longest=LARGEST_LINE), path):
        if not (isinstance(row, dict) and is_question(row)):
            raise ValueError(f"{where}: got {quoted(row)}; accepted: {accepted}.")
        rows.append(row)
    return rows
