"""Do answers under the laws keep the form and language that the prompt asks for?

    python bench/real_answers.py --model FOLDER --only forms     # first: the answers
    python bench/forms.py [--folder build/real]

Tasks in four forms and three languages; the other benches have English prose. Answers are cut after
128 tokens. A form counts as kept by these rules:
    dialogue    at least two lines that begin with a speaker's name, or two quotations
    list        at least three lines that begin with a number or a bullet
    code        Python, between the fences or the whole answer, that defines a function and parses
                after lines left incomplete by the cut are removed
    poem        at least four lines of at most twelve words each
    French, German, Chinese    py3langid detects this language, and no character is broken (U+FFFD)
Also self-BLEU between the answers to one task. Intervals are Wilson's, 95 %, which treat the five
answers to a task as independent. The last line is one JSON document.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from real import RESULTS, by_setting, rounded
from real_answers import FORMS, Answer, answers_by_prompt, form_tasks, read_answers

from dftserve.corpus.filters import language_of
from dftserve.evaluate.metrics import lexical
from dftserve.evaluate.metrics.intervals import wilson
from dftserve.evaluate.text.tokenize import tokens

from provenance import machine, versions

LANGUAGES = {"French": "fr", "German": "de", "Chinese": "zh"}
SPEAKER = re.compile(r"^\W*[A-Z][\w .'’-]{0,30}(\([^)]*\))?\W{0,3}:", re.MULTILINE)
QUOTATION = re.compile(r"[\"“][^\"“”\n]{2,}[\"”]")
ITEM = re.compile(r"^\s*(\d+[.)]|[-*•])\s+\S", re.MULTILINE)
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
LONGEST_LINE = 12
"""Words in a line of a poem."""


@click.command()
@click.option("--folder", default=Path("build/real"), type=click.Path(path_type=Path))
@click.option("--output", default=RESULTS / "forms.json", type=click.Path(path_type=Path))
def main(folder: Path, output: Path) -> None:
    tasks = form_tasks()
    settings = {
        name: _by_form(tasks, answers)
        for name, answers in by_setting(read_answers(folder), FORMS).items()
    }
    document = {
        "what": "forms and languages kept by SmolLM2-135M-Instruct; 95 % intervals",
        "machine": machine(),
        "versions": versions("vllm", "transformers", "py3langid"),
        "tasks": {form: len(each) for form, each in tasks.items()},
        "rows": {
            name: {form: measured(form, texts_P) for form, texts_P in forms.items()}
            for name, forms in settings.items()
        },
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def _by_form(
    tasks: Mapping[str, Sequence[str]], answers: Sequence[Answer]
) -> dict[str, list[list[str]]]:
    """Texts by form and task; the answers are in the order of the tasks."""
    texts = iter(answers_by_prompt(answers))
    return {form: list(islice(texts, len(asked))) for form, asked in tasks.items()}


def measured(form: str, texts_P: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Measures of the answers to P tasks of one form."""
    texts = [text for texts in texts_P for text in texts]
    share = wilson(sum(is_kept(form, text) for text in texts), len(texts))
    similar = [lexical.self_bleu([tokens(text) for text in each]) for each in texts_P]
    return {
        "answers": len(texts),
        **rounded({"kept": share}),
        "self_bleu": round(float(np.mean(similar)), 2),
    }


def is_kept(form: str, text: str) -> bool:
    if form in LANGUAGES:
        return "\ufffd" not in text and language_of(text).startswith(LANGUAGES[form])
    return RULES[form](text)


def is_dialogue(text: str) -> bool:
    return len(SPEAKER.findall(text)) >= 2 or len(QUOTATION.findall(text)) >= 2


def is_list(text: str) -> bool:
    return len(ITEM.findall(text)) >= 3


def is_poem(text: str) -> bool:
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return len(lines) >= 4 and sum(len(line) <= LONGEST_LINE for line in lines) >= 4


def is_code(text: str) -> bool:
    fenced = FENCE.search(text)
    lines = (fenced[1] if fenced else text).rstrip().splitlines()
    # The cut may leave a line or a bracket incomplete, so shorter and shorter beginnings are tried.
    return any(_defines("\n".join(lines[:end])) for end in range(len(lines), 0, -1))


def _defines(source: str) -> bool:
    try:
        return any(isinstance(each, ast.FunctionDef) for each in ast.parse(source).body)
    except (SyntaxError, ValueError):
        return False


RULES: Mapping[str, Callable[[str], bool]] = {
    "dialogue": is_dialogue,
    "list": is_list,
    "code": is_code,
    "poem": is_poem,
}


if __name__ == "__main__":
    main()
