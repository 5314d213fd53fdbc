"""Checks that the installed packages can serve. Run it with the Python of their environment.

    build/release-env/bin/python tools/smoke.py

It serves a small untrained model and sends one valid and one invalid field.
"""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import click

import dftserve
from dftserve import doctor
from dftserve.serve import Server, running

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
VOCABULARY = 4096
PATIENCE = 1200.0
"""Timeout in seconds for the server to answer."""


def main() -> None:
    if not Path(dftserve.__file__).is_relative_to(sys.prefix):
        sys.exit(f"smoke.py: dftserve is {dftserve.__file__}, not what {sys.prefix} has installed.")
    sys.path.insert(0, str(ROOT / "bench"))
    import tiny_model

    with (
        tiny_model.saved(VOCABULARY) as model,
        running(model, *FLAGS, env=ENVIRONMENT, timeout=PATIENCE) as server,
    ):
        findings = doctor.ask(server.url)
        click.echo(doctor.as_text(findings))
        problems = [each.text for each in findings if each.state == "error"]
        problems += [problem for problem in (_honoured(server), _refused(server)) if problem]
    if problems:
        sys.exit("smoke.py: " + "; ".join(problems))
    print("smoke.py: the field is honoured, and a wrong one is refused.")


def _honoured(server: Server) -> str | None:
    status, answer = _asked(server, 0.5)
    stats = answer.get("diversity", {})
    is_honoured = status == 200 and stats.get("level") == 0.5 and stats["choices"][0]["tokens"] > 0
    return None if is_honoured else f"diversity 0.5 was answered {status}: {str(answer)[:500]}"


def _refused(server: Server) -> str | None:
    status, answer = _asked(server, 2)
    parameter = answer.get("error", {}).get("param")
    is_refused = (status, parameter) == (400, "diversity.level")
    return None if is_refused else f"diversity 2 was answered {status}: {str(answer)[:500]}"


def _asked(server: Server, diversity: float) -> tuple[int, dict[str, Any]]:
    body = {"model": server.model, "prompt": "w1 w2", "max_tokens": 8, "diversity": diversity}
    headers = {"content-type": "application/json"}
    content = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}/completions", content, headers)
    # Loopback requests must not go through a proxy that the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


if __name__ == "__main__":
    main()
