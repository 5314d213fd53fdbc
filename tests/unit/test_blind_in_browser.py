"""The blind test's page in a real browser: what a judge sees, presses and sends back."""

from contextlib import contextmanager

import pytest

from dftserve.evaluate.preference.human_test import page as write
from dftserve.evaluate.preference.human_test import verdict
from dftserve.evaluate.preference.pairs import Pair
from tests.browser import BROWSER, DESKTOP, PHONE, assert_accessible, chromium

pytest.importorskip("playwright.sync_api")
pytest.importorskip("axe_playwright_python.sync_playwright")

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
LONG = "A word that goes on and on, " * 60 + "x" * 400
"""More than a page of text, with a word wider than a phone."""
PAIRS = [
    Pair(f"prompt {i}\nof two lines", f"system {i} {LONG}", f"human {i} <b>") for i in range(4)
]


@pytest.fixture(scope="module")
def browser():
    with chromium() as instance:
        yield instance


@pytest.fixture
def file(tmp_path):
    out = tmp_path / "blind.html"
    write(PAIRS, out, seed=1, title="Stories")
    return out


@contextmanager
def open_page(browser, file, **options):
    """Open the page; at the end, fail if it had an error or requested anything but itself."""
    with browser.new_context(
        **{"viewport": DESKTOP, "accept_downloads": True} | options
    ) as context:
        page = context.new_page()
        requested, errors = [], []
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: errors.append(message.text) if message.type == "error" else None,
        )
        page.goto(file.as_uri())
        yield page
        assert not errors
        assert {url for url in requested if not url.startswith("blob:")} == {file.as_uri()}


def sides(page) -> list[str]:
    """Whose text is on the left and whose on the right."""
    return [page.text_content(f"#{side}").split()[0] for side in ("left", "right")]


def download_answers(page, folder):
    with page.expect_download() as download:
        page.click("#download")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_keys_and_buttons_answer_and_the_verdict_reads_the_file(browser, file, tmp_path):
    human = 0
    with open_page(browser, file) as page:
        for press in ("1", "ArrowRight", "click left", "click right"):
            side = press in ("ArrowRight", "click right")
            human += sides(page)[side] == "human"
            if press.startswith("click"):
                page.click(f"#choose-{press.split()[1]}")
            else:
                page.keyboard.press(press)
        assert page.text_content("#progress") == "4 of 4"
        assert page.is_visible("#done")
        assert not page.is_visible("#trial")
        answers = download_answers(page, tmp_path)
    result = verdict([answers], tmp_path / "blind.html.key.json")
    assert (result.judgments, result.human) == (4, human)


def test_a_reloaded_page_resumes(browser, file):
    with open_page(browser, file) as page:
        page.keyboard.press("2")
        before = sides(page), page.text_content("#prompt")
        page.reload()
        assert page.text_content("#progress") == "1 of 4"
        assert (sides(page), page.text_content("#prompt")) == before


def test_the_page_can_be_used_with_only_tab_and_enter(browser, file):
    with open_page(browser, file) as page:
        reached = []
        for _ in range(3):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
        assert reached == ["choose-left", "choose-right", "download"]
        page.focus("#choose-right")
        page.keyboard.press("Enter")
        assert page.text_content("#progress") == "1 of 4"


def test_texts_are_shown_unchanged(browser, file):
    with open_page(browser, file) as page:
        texts = {page.text_content("#left"), page.text_content("#right")}
        number = page.text_content("#prompt").split()[1]
        assert texts == {f"system {number} {LONG}", f"human {number} <b>"}
        assert page.locator(".text b").count() == 0
        assert page.evaluate("getComputedStyle(document.getElementById('prompt')).whiteSpace") in (
            "pre-wrap",
            "preserve",
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_is_accessible(browser, file, scheme, viewport):
    """By axe's rules, during the trials and at the end; nothing is wider than the screen, and the
    page is dark where the system is."""
    # axe's script is injected into the page, which the page's own policy forbids.
    options = {"viewport": viewport, "color_scheme": scheme, "bypass_csp": True}
    with open_page(browser, file, **options) as page:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        brightness = sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3
        assert (brightness < 128) == (scheme == "dark"), colour
        for presses in (0, len(PAIRS)):
            for _ in range(presses):
                page.keyboard.press("1")
            assert_accessible(page)


def test_without_javascript_the_page_says_so(browser, file):
    with open_page(browser, file, java_script_enabled=False) as page:
        assert "needs JavaScript" in page.inner_text("noscript")


def test_the_page_warns_when_the_browser_stores_nothing(browser, file):
    with open_page(browser, file) as page:
        page.evaluate("void (Storage.prototype.setItem = () => { throw new Error('full'); })")
        page.keyboard.press("1")
        assert "download before you close" in page.text_content("#warning")
        assert page.text_content("#progress") == "1 of 4"
