"""Makes the screenshot of docs/playground.md, from a running server.

dftserve serve build/demo/smollm2 --host 127.0.0.1 …     # then, in another terminal:
python tools/playground_image.py --url http://127.0.0.1:8000
"""

import re
import sys
from pathlib import Path

import click
from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser import chromium, playground  # noqa: E402

IMAGE = ROOT / "docs" / "images" / "playground.png"
WAIT_MS = 600_000
PROMPT = "Write the opening paragraph of a story about a lighthouse."


@click.command(help=__doc__)
@click.option("--url", required=True)
@click.option("--output", default=IMAGE, type=click.Path(path_type=Path))
def main(url: str, output: Path) -> None:
    with playground(url) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 900})
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
        output.parent.mkdir(exist_ok=True)
        page.screenshot(path=output, full_page=True)


if __name__ == "__main__":
    main()
