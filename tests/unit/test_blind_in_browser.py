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
"""A text of a page and more, with a word that no phone is wide enough for."""
PAIRS = [
    Pair(f"prompt {i}\nof two lines", f"system {i} {LONG}", f"human {i} <b>") for i in range(4)
]


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def file(tmp_path):
    out = tmp_path / "blind.html"
    write(PAIRS, out, seed=1, title="Stories")
    return out


@contextmanager
def opened(browser, file, **context):
    """The page; what it asked of anyone, and what went wrong in it, are kept on it."""
    with browser.new_context(**{"viewport": DESKTOP, "accept_downloads": True} | context) as around:
        found = around.new_page()
        asked, wrong = [], []
        found.on("request", lambda request: asked.append(request.url))
        found.on("pageerror", lambda error: wrong.append(str(error)))
        found.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        found.goto(file.as_uri())
        yield found
        assert not wrong
        assert {url for url in asked if not url.startswith("blob:")} == {file.as_uri()}


def sides(page) -> list[str]:
    """Whose text is on the left and on the right."""
    return [page.text_content(f"#{side}").split()[0] for side in ("left", "right")]


def downloaded(page, folder):
    with page.expect_download() as waiting:
        page.click("#download")
    place = folder / waiting.value.suggested_filename
    waiting.value.save_as(place)
    return place


def test_keys_and_buttons_answer_and_the_file_is_what_the_verdict_reads(browser, file, tmp_path):
    human = 0
    with opened(browser, file) as page:
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
        given = downloaded(page, tmp_path)
    found = verdict([given], tmp_path / "blind.html.key.json")
    assert (found.judgments, found.human) == (4, human)


def test_a_page_that_is_opened_again_goes_on(browser, file):
    with opened(browser, file) as page:
        page.keyboard.press("2")
        left = sides(page), page.text_content("#prompt")
        page.reload()
        assert page.text_content("#progress") == "1 of 4"
        assert (sides(page), page.text_content("#prompt")) == left


def test_it_is_used_by_tab_and_enter_alone(browser, file):
    with opened(browser, file) as page:
        reached = []
        for _ in range(3):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
        assert reached == ["choose-left", "choose-right", "download"]
        page.focus("#choose-right")
        page.keyboard.press("Enter")
        assert page.text_content("#progress") == "1 of 4"


def test_texts_are_shown_as_they_are(browser, file):
    with opened(browser, file) as page:
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
def test_anyone_can_use_it(browser, file, scheme, viewport):
    """axe's rules while it asks and when it is over; nothing wider than the screen; a dark page
    where the system is dark."""
    # axe's script is put into the page, which the page's own policy forbids.
    options = {"viewport": viewport, "color_scheme": scheme, "bypass_csp": True}
    with opened(browser, file, **options) as page:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        brightness = sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3
        assert (brightness < 128) == (scheme == "dark"), colour
        for presses in (0, len(PAIRS)):
            for _ in range(presses):
                page.keyboard.press("1")
            assert_accessible(page)


def test_without_javascript_it_says_so(browser, file):
    with opened(browser, file, java_script_enabled=False) as page:
        assert "needs JavaScript" in page.inner_text("noscript")


def test_a_browser_that_keeps_nothing_warns(browser, file):
    with opened(browser, file) as page:
        page.evaluate("void (Storage.prototype.setItem = () => { throw new Error('full'); })")
        page.keyboard.press("1")
        assert "download before you close" in page.text_content("#warning")
        assert page.text_content("#progress") == "1 of 4"
