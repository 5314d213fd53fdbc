"""Writing errors: what counts as one, and what does not."""

import pytest

from dftserve.evaluate.metrics import errors
from dftserve.evaluate.metrics.errors import check


@pytest.fixture(scope="module")
def linter():
    pytest.importorskip("harper", reason="harper-py is not installed")
    return errors.linter()


@pytest.mark.parametrize(
    ("text", "marks", "unknown"),
    [
        ("The old man walks into the room and takes off his hat.", 0, 0),
        ("Zorblax walked in. Mara greeted Zorblax.", 0, 0),
        ("He have a hat.", 1, 0),
        ("She wore a gloopish hat and a blarvy coat.", 2, 2),
        ("", 0, 0),
    ],
)
def test_writing_errors_are_counted_and_names_are_not(linter, text, marks, unknown):
    found = check(text, linter)
    assert (found.marks, found.unknown) == (marks, unknown)


@pytest.mark.parametrize("apostrophe", ["'", "’"])
def test_words_do_not_depend_on_the_kind_of_apostrophe(linter, apostrophe):
    assert check(f"They don{apostrophe}t know that it{apostrophe}s late.", linter).words == 6


@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_a_text_may_end_without_a_full_stop(linter, end):
    """In harper-py 0.2.0 a rule panics at the end of a text, after these two words."""
    assert check(f"He looked for reasons in both two{end}", linter).words == 7
