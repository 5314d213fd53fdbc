"""The `llm` command, with its own models and with those of llm-dftserve."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ways import KEY, MODEL, PROMPT, RefusedError, Seen, Way, ask_all

COMMAND = Path(sys.executable).with_name("llm")


def make_ask(models: str, folder: Path) -> Callable[[str, Any, bool], Seen]:
    def ask(url: str, value: Any, stream: bool) -> Seen:
        folder.mkdir(exist_ok=True)
        entry = {"model_id": "served", "model_name": MODEL, "api_base": url, "api_key_name": "here"}
        (folder / models).write_text(json.dumps([entry]))  # JSON is YAML.
        (folder / "keys.json").write_text(json.dumps({"here": KEY}))
        options = ["-o", "max_tokens", "8", "-o", "diversity", str(value)]
        llm(folder, "-m", "served", *options, *([] if stream else ["--no-stream"]), PROMPT)
        logged = json.loads(llm(folder, "logs", "--count", "1", "--json"))[0]
        return Seen(logged["response_json"].get("diversity"))

    return ask


def llm(folder: Path, *arguments: str) -> str:
    """The stdout of the command.

    Raises:
        RefusedError: the command failed; with its stderr.
    """
    done = subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"LLM_USER_PATH": str(folder)},
    )
    if done.returncode != 0:
        raise RefusedError(f"exit code {done.returncode}", done.stderr)
    return done.stdout


if __name__ == "__main__":
    place = Path(sys.argv[2]).parent
    ask_all(
        [
            Way(name, "`-o`", make_ask(models, place / models.split("-", 1)[0]))
            for name, models in {
                "extra-openai-models.yaml": "extra-openai-models.yaml",
                "llm-dftserve": "dftserve-models.yaml",
            }.items()
        ]
    )
