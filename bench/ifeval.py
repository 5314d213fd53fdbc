"""Checks which of IFEval's instructions each setting's answers follow, by its strict rules.

    make eval-env
    .venv-eval/bin/python bench/ifeval.py DATA [FOLDER]     # build/real by default

Reads FOLDER/answers.jsonl of bench/real_answers.py and DATA/ifeval/prompts.jsonl; writes
FOLDER/ifeval.json: for each setting and prompt key, a list of whether each instruction was
followed. Prompts whose rules need NLTK's data, which is not a package, are left out and counted.
This is a separate script because the rules (`if-verifiable`) need packages that the engine's
environment lacks.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import langdetect
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

langdetect.DetectorFactory.seed = 0


def main(data: Path, folder: Path) -> None:
    samples = list(records(data / "ifeval" / "prompts.jsonl"))
    followed_by: dict[str, dict[int, list[bool]]] = {}
    left_out: set[int] = set()
    for answer in records(folder / "answers.jsonl"):
        if answer["prompt_set"] == "ifeval":
            sample = samples[answer["prompt"]]
            try:
                kept = followed(sample, answer["text"])
            except LookupError:
                left_out.add(sample["key"])
            else:
                followed_by.setdefault(answer["setting"], {})[sample["key"]] = kept
    settings = {
        setting: {key: kept for key, kept in prompts.items() if key not in left_out}
        for setting, prompts in followed_by.items()
    }
    document = {"left_out": sorted(left_out), "settings": settings}
    (folder / "ifeval.json").write_text(json.dumps(document) + "\n")
    for setting, prompts in settings.items():
        share = sum(all(kept) for kept in prompts.values()) / len(prompts)
        print(f"{setting}: {share:.1%} of {len(prompts)} prompts")


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl file; texts may contain other line separators (U+2028)."""
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)


def followed(sample: dict[str, Any], text: str) -> list[bool]:
    """Whether each instruction was followed.

    Raises:
        LookupError: a rule needs NLTK's data.
    """
    found = []
    for name, given in zip(sample["instruction_id_list"], sample["kwargs"], strict=True):
        random.seed(0)  # A rule draws parameters that the prompt does not specify.
        rule = INSTRUCTION_DICT[name](name)
        rule.build_description(**{key: value for key, value in given.items() if value is not None})
        arguments = rule.get_instruction_args()
        if arguments and "prompt" in arguments:
            rule.build_description(prompt=sample["prompt"])
        found.append(bool(text.strip()) and bool(rule.check_following(text)))
    return found


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("ifeval.py: give the folder of the texts (DATA), then that of the answers.")
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "build/real"))
