"""What of an answer is said: not the thinking before it, nor a next question behind it.

Standard library only: `accuracy.extract` is loaded without this package's dependencies.
"""

import re

CUT_NOTE = "cut: answers that ended in their thinking; give them more tokens (--max-tokens)."
"""Under a table with a column `cut`."""
_THINKING = r"think|thinking|thought|reasoning|reflection|scratchpad"
_OPENED = re.compile(rf"<(?:{_THINKING})>", re.IGNORECASE)
_CLOSED = re.compile(rf"</(?:{_THINKING})>", re.IGNORECASE)


def after_thinking(answer: str | None) -> str:
    """What comes after the last thinking; nothing where the last one has no end.

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
    """A model that continues a text of questions goes on with the next one."""
    found = _NEXT_QUESTION.search(text, re.match(r"\s*", text).end())  # type: ignore[union-attr]
    return text if found is None else text[: found.start()]


def is_cut(answer: str | None) -> bool:
    """Whether an answer ended inside its thinking: nothing was said, right or wrong.

    Args:
        answer: as the server gave it; None where `message.content` is null.
    """
    return answer is None or (bool(answer.strip()) and not after_thinking(answer).strip())
