"""A real browser, accessibility checks of a page, and the playground in front of a server."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def playground(url: str, key: str | None = None) -> Iterator[str]:
    """Run the user's command in front of the server at `url`; yields the address of its page."""
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
        # Chromium's own sandbox needs privileges that root in a container does not have.
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def assert_accessible(page: Any) -> None:
    """Check that axe finds no violations and that nothing is wider than the screen."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
