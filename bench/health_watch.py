"""Measures how long a server's /health takes, repeatedly, in a process that does nothing else.

    python bench/health_watch.py http://127.0.0.1:8000

Runs until its standard input ends. Prints a list of seconds, null where the answer was not a 200.

A client that is busy with requests would measure its own delays: its garbage collector alone stops
it for most of a second.
"""

import json
import select
import sys
import time
import urllib.error
import urllib.request

EVERY = 0.25
"""Seconds between an answer and the next request."""
PATIENCE = 600.0
"""Timeout in seconds."""


def main(url: str) -> None:
    found: list[float | None] = []
    while not select.select([sys.stdin], [], [], EVERY)[0]:
        start = time.monotonic()
        is_healthy = answers(url)
        found.append(round(time.monotonic() - start, 4) if is_healthy else None)
    print(json.dumps(found))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=PATIENCE) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


if __name__ == "__main__":
    main(sys.argv[1])
