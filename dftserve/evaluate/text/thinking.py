"""Extracts the text of an answer, without the thinking before it or a next question after it.

Standard library only, because `accuracy.extract` is loaded without this package's dependencies.
"""

import re

CUT_NOTE = "cut: answers that ended in their thinking; give them more tokens (--max-tokens)."
"""Note below a table with a column `cut`."""
_THINKING = r"think|thinking|thought|reasoning|reflection|scratchpad"
_OPENED = re.compile(rf"<(?:{_THINKING})>", re.IGNORECASE)
_CLOSED = re.compile(rf"</(?:{_THINKING})>", re.IGNORECASE)


def after_thinking(answer: str | None) -> str:
    """The text after the last thinking block; empty if that block is not closed.

    The opening tag may be part of the prompt, and absent here.
    """
    text = answer or ""
    for closed in reversed(list(_CLOSED.finditer(text))):
        text = text[closed.end() :]
        break
    if (opened := _OPENED.search(text)) and not text[: opened.start()].strip():
        return ""
    return text if opened is None else text[: opened.start()]


_NEXT_QUESTION = re.compile(r"\n[\s*#]*(?:question|problem|q)\s*\d*\s*:", re.IGNORECASE)


def before_next_question(text: str) -> str:
    """The text before a next question, which a base model may go on to write."""
    match = _NEXT_QUESTION.search(text, re.match(r"\s*", text).end())  # type: ignore[union-attr]
    return text if match is None else text[: match.start()]


def is_cut(answer: str | None) -> bool:
    """Whether an answer ended inside its thinking, so that there is no text to judge.

    Args:
        answer: as the server returned it; None where `message.content` is null.
    """
    return answer is None or (bool(answer.strip()) and not after_thinking(answer).strip())
