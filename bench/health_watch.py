"""How long a server's /health takes, asked over and over by a process that does nothing else.

    python bench/health_watch.py http://127.0.0.1:8000

until its standard input ends. Prints a list of seconds, null where there was no answer of 200.

A client that is busy with requests would measure itself: its garbage collector alone stops it for
most of a second.
"""

import json
import select
import sys
import time
import urllib.error
import urllib.request

EVERY = 0.25
"""Seconds between an answer and the next question."""
PATIENCE = 600.0
"""Seconds for an answer."""


def main(url: str) -> None:
    found: list[float | None] = []
    while not select.select([sys.stdin], [], [], EVERY)[0]:
        start = time.monotonic()
        is_well = answers(url)
        found.append(round(time.monotonic() - start, 4) if is_well else None)
    print(json.dumps(found))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=PATIENCE) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


if __name__ == "__main__":
    main(sys.argv[1])
