"""The playground's command before a server, and a real browser that opens its page."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def playground(url: str, key: str | None = None) -> Iterator[str]:
    """The command of a user, before the server at `url`; the address of its page."""
    command = [sys.executable, "-m", "dftserve.cli", "playground", "--url", url, "--port", "0"]
    environment = dict(os.environ) if key is None else {**os.environ, "OPENAI_API_KEY": key}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            (address,) = re.findall(r"http://\S+", process.stdout.readline())
            yield address
        finally:
            process.terminate()


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's Browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        # Chromium's own sandbox needs rights that root in a container does not have.
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()
