"""The picture of docs/playground.md, from a server that runs.

dftserve serve build/demo/smollm2 --host 127.0.0.1 …     # then, beside it:
python tools/playground_image.py --url http://127.0.0.1:8000
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
from playwright.sync_api import expect, sync_playwright

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "playground.png"
WAIT_MS = 600_000
PROMPT = "Write the opening paragraph of a story about a lighthouse."


@click.command(help=__doc__)
@click.option("--url", required=True)
@click.option("--output", default=IMAGE, type=click.Path(path_type=Path))
def main(url: str, output: Path) -> None:
    command = [sys.executable, "-m", "dftserve.cli", "playground", "--url", url, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            (address,) = re.findall(r"http://\S+", process.stdout.readline())
            output.parent.mkdir(exist_ok=True)
            picture(address, output)
        finally:
            process.terminate()


def picture(address: str, output: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(WAIT_MS)
        page.goto(address)
        page.fill("#messages", PROMPT)
        page.fill("#max_tokens", "60")
        page.fill("#seed", "1")
        page.fill("#diversity-A", "0.5")
        page.fill("#diversity-B", "1")
        page.click("#generate")
        expect(page.locator("#status")).to_have_text(re.compile("^Done"), timeout=WAIT_MS)
        page.check("[value=temperature]")
        page.screenshot(path=output, full_page=True)


if __name__ == "__main__":
    main()
