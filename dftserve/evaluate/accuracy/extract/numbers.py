"""The number that an answer to a numerical question gives.

Standard library only, as `extract`.
"""

import html
import re
import unicodedata
from collections.abc import Sequence

from dftserve.evaluate.accuracy.extract.letters import (
    CONDITION,
    DENIED,
    LATEX_TEXT,
    OTHERS,
    STRUCK,
    sentence_before,
    without_runs,
)
from dftserve.evaluate.accuracy.extract.sums import (
    SCALES,
    SUM,
    UNKNOWN,
    plain,
    value_of,
    with_plain_values,
)
from dftserve.evaluate.accuracy.extract.takes import last_answer
from dftserve.evaluate.text.thinking import after_thinking, before_next_question

_BLANKS = "  \u2007\u2009\u200a\u202f"
_MINUS = "-−–‐‑﹣－"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]%.$-])-\s?(?=[$€£¥₹]?\s?[.\d])|(?<=[$€£¥₹])-(?=\d))?(?:[$€£¥₹]\s?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
    r"(?P<under>\s?/\s?\d+(?![\d/]|\.\d))?"
    rf"(?P<scale>\s?(?i:{SCALES})\b)?"
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_HASHES = re.compile(r"^[\s>*]*####+(?!#)[ \t]*(.*)$|####[ \t]*(.*)$", re.MULTILINE)
_HEADING = re.compile(
    r"^\W*(?:step|part|case|phase|stage|day|question|problem|example|method|solution)\s*#?\d+\b"
    r"|^\W*\d+[.)]\s+\W*[^\W\d]|^\W*\d+\s*[:–—]\s*[^\W\d]|^\W*\d+\s*-\s+[^\W\d]",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"^\W*(\d+)[.):]?\W*$")
_TOTAL = re.compile(
    r"(?:\b(?:final\s+|correct\s+|total\s+)?(?:answers?|ans)|答案|\bresult)\b(?P<between>[^.\n:=]{0,60}?)\s*"
    r"(?:\b(?:is|are|was|be|equals|comes\s+to)\b\s*:?|[:=→]|是|为)\s*"
    r"(?=(?P<rest>[^\n]{0,400}(?:\n+[^\n]{0,400}\d[^\n]{0,400})?))",
    re.IGNORECASE,
)
_IS_ANSWER = re.compile(r"\bis\s+(?:the|my|our)\s+(?:final\s+|correct\s+)?answer\b", re.IGNORECASE)
_ANSWER_HEAD = re.compile(
    r"^\W*(?:the\s+|final\s+|my\s+|correct\s+)*answer\W*\n+([^\n]+)", re.IGNORECASE | re.MULTILINE
)
_BARE = re.compile(
    r"^[\s*_`$>\\()\[\]=≈~-]*(?P<number>-?\s?[$€£¥₹]?\s?[\d.,/]*\d)[\s*_`$\\()\[\].,!]*"
    r"(?:%|\\%|[^\W\d]+(?:\s+[^\W\d]+){0,3}|°\w?)?[\s*_`$.!]*$"
)
_REMARK = re.compile(
    r"^[\s*_(>]*(?:note|remark|rounded|this\s+assumes|assuming|assumption|check|verif|explanation|ps|"
    r"p\.s|let\s+me\s+know|i\s+hope|hope|confidence|source|see|disclaimer|hint|tip|remember|"
    r"n\.b|nb|to\s+check|we\s+can\s+check|double-check|sanity|i\s+rounded|i\s+used|i\s+assumed)\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(?:cannot|can['’]?t|could\s+not|unable\s+to|impossible\s+to|not\s+possible\s+to|no\s+way\s+to)"
    r"\s+(?:be\s+)?(?:determined?|solved?|answer(?:ed)?|computed?|calculated?|know|say|tell|find|found)"
    r"|\bnot\s+(?:enough|sufficient)\s+information|\binsufficient\s+(?:information|data)"
    r"|\bi\s+(?:do\s+not|don['’]?t)\s+know",
    re.IGNORECASE,
)
_REJECTED = re.compile(
    r"(?:[,—–-]|\band|\bbut)?\s*\b(?:not|instead\s+of|rather\s+than)\s+[$€£¥₹]?-?\d[\d.,]*",
    re.IGNORECASE,
)
_AMOUNT = rf"[$€£¥₹]?\s*-?(?:\d|{UNKNOWN})"
_SEVERAL = re.compile(
    rf"\s*(?:%|[^\W\d]+\s*)?(?:[^\W\d]+\s*)?,?\s*(?:\b(?:or|and|to)\b|–)\s*{_AMOUNT}"
    rf"|\s*,\s*{_AMOUNT}|\s*[+*×÷]\s*{_AMOUNT}|-\d|\s*\?|\s*['’]\s*\d"
    r"|\s*(?:feet|foot|ft|hours?|hrs?|h|minutes?|pounds?|lbs?|dollars|years?|weeks?|days?|yards?)"
    r"\s*\d+\s*(?:inch|in\b|ft|feet|ounce|oz|min|sec|cent|month|week|day|hour)"
    r"|\s+(?:[^\W\d]+\s+)?(?:less|more|fewer|greater)\s+than\s+\S*\d"
)
"""After a number: shows that it is one of several, or only a part of the value."""
_LABEL = re.compile(
    r"\b(?:step|part|case|question|problem|method|figure|table|page|example|equation|line|"
    r"(?:less|more|fewer|greater)\s+than|(?:third|quarter|fifth|tenth)\s+of)\s*[#$]?$",
    re.IGNORECASE,
)
"""Before a number: shows that it is not the value itself."""
_RESTATED = re.compile(
    r"\b(?:ie|that\s+is|in\s+other\s+words|namely|which\s+(?:is|equals|makes|gives))\b\W*(?=[$€£]?-?\d)",
    re.IGNORECASE,
)
_CLOSE = re.compile(rf"(?:\W|only\b|then\b|now\b|therefore\b|actually\b)*?{_AMOUNT}")
_OR = re.compile(rf",?\s+or\s+(?={_AMOUNT}|\w\s*=)", re.IGNORECASE)
_UNFINISHED = re.compile(r"(?:=|(?<=\s)[+*×÷/])\s*$|\b(?:plus|minus)\s*$")
_CHECKED = re.compile(
    r"\b(?:correct|confirm\w*|verif\w*|match(?:es)?|consistent|checks?\s+out)\b", re.IGNORECASE
)
_IT_IS = re.compile(
    rf"(?:['’]s|\b(?:is|be|are|get|makes?|gives?|costs?|total|makes)\b|=)[\s:*]*({_AMOUNT}[^=]*)$",
    re.IGNORECASE,
)


def number(answer: str) -> str | None:
    """The number that an answer to a numerical question gives, as written: `1,234.00`, `-5`, `3/4`.

    Units and currencies are left out, a Unicode minus becomes `-`, and spaces between thousands are
    removed. A mixed number, a power or a sum is returned as its exact value: `13/4`, `1000`, `8`; a
    scale is kept after its number: `1.5 million`. None if several numbers are given, or one that is
    not a fraction (`2π`).
    """
    text = _with_plain_numbers(after_thinking(answer))
    stated = last_answer(before_next_question(text), _final_number)
    return (last_answer(text, _final_number) if stated is None else stated) or None


def _final_number(text: str, is_full: bool) -> str | None:
    """By the clearest kind of evidence that is found; empty if it gives no single number.

    Args:
        is_full: also use the last number, which may be part of an explanation.
    """
    for find in (_hashed_number, _boxed_number, _stated_number, _number_alone):
        if (found := find(text)) is not None:
            return found
    if _REFUSAL.search(text):
        return None
    return _last_number(text) if is_full else _concluded_number(text)


def _concluded_number(text: str) -> str | None:
    """The number of a last sentence such as `it is 25`, unless it confirms an earlier result."""
    said = _IT_IS.search(re.sub(r"\W+$", "", text).split("\n")[-1])
    return None if said is None or _CHECKED.search(text) else _of_clause(said[1])


def _with_plain_numbers(answer: str) -> str:
    """Normalise digits to ASCII, minus signs to `-`, thousands to no spaces or LaTeX, and fractions
    to one line."""
    text = "".join(
        str(unicodedata.decimal(each)) if not each.isascii() and each.isdecimal() else each
        for each in html.unescape(answer)
    )
    text = STRUCK.sub("", without_runs(text))
    text = re.sub(r"\{,\}|\\,(?=\d{3})", ",", text).replace("\\!", "")
    text = re.sub(r"\\[,;: ]", " ", text).replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"\b(i|e)\.\s?(e|g)\.", r"\1\2", text)
    text = re.sub(
        "[¼½¾⅓⅔⅛⅜⅝⅞]", lambda m: unicodedata.normalize("NFKC", f" {m[0]}").replace("⁄", "/"), text
    )
    text = text.replace("⁄", "/").replace("，", ",").replace("＃", "#").replace("＄", "$")
    text = re.sub(rf"[{_MINUS[1:2]}{_MINUS[6:]}]\s?(?=[$€£¥₹]?[\d.])", "-", text)
    text = re.sub(rf"(?<![\w)])[{_MINUS[2:6]}](?=[$€£¥₹]?\d)", "-", text)
    text = re.sub(
        rf"(?<![\d.,])(\d{{1,3}})((?:[ {_BLANKS}]\d{{3}})+)(?![\d]|[ {_BLANKS}]\d|:\d)",
        _joined,
        text,
    )
    text = re.sub(r"(?<![\d.,])(\d{1,3})((?:['’]\d{3})+)(?!\d)", _joined, text)
    text = re.sub(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?![\d,])", _european, text)
    text = re.sub(
        r"(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,]\d)", lambda m: m[0].replace(".", ""), text
    )
    text = LATEX_TEXT.sub(r" \1 ", text)
    return with_plain_values(_FRACTION.sub(r" \1/\2", text))


def _joined(match: re.Match[str]) -> str:
    return re.sub(r"\D", "", match[0])


def _european(match: re.Match[str]) -> str:
    return match[1].replace(".", "") + "." + match[2]


def _numbers(text: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(re.sub(r"\*\*|__|`", "", text)))


def _shown(match: re.Match[str]) -> str:
    sign = "-" if match["sign"] else ""
    scale = f" {match['scale'].strip().lower()}" if match["scale"] else ""
    return sign + match["digits"] + re.sub(r"\s", "", match["under"] or "") + scale


def _of_clause(text: str) -> str | None:
    """The number that a clause such as `x = 3 * 6 = 18 eggs` gives; empty if it gives two."""
    clause = _REJECTED.sub("", re.sub(r"\*\*|__|`", "", text))
    parts = _OR.split(clause)
    values = [value for part in parts if (value := _of_part(part)) is not None]
    if len(values) > 1:
        first, last = value_of(values[0]), value_of(values[-1])
        is_percent = first is not None and re.search(r"%|percent", parts[0]) is not None
        is_same = first == last or (is_percent and first == (last or 0) * 100)
        return values[0] if is_same else ""
    return values[0] if values else None


def _of_part(text: str) -> str | None:
    if (equal := _of_equation(text)) is not None:
        return equal
    for mark in ("≈", ": "):
        after = text.rpartition(mark)[2] if mark in text else ""
        if _numbers(after):
            return _first_value(after)
    if (value := _first_value(text)) != "":
        return value
    restated = _RESTATED.split(text)[1:]
    return _first_value(restated[-1]) if restated else ""


def _of_equation(text: str) -> str | None:
    """The side of the last `=` that is a number: `3 * 6 = 18`, `18 = 3 * 6`."""
    before, equals, after = text.rpartition("=")
    left = _numbers(before)
    if not equals or not (_numbers(after) or UNKNOWN in after):
        return None
    if SUM.search(after) and left and not SUM.search(before):
        return _shown(left[-1])
    return _first_value(after)


def _first_value(text: str) -> str | None:
    """The first number or sum; empty if it is one of several, or not rational: `2π`."""
    match = _NUMBER.search(text)
    unknown = text.find(UNKNOWN)
    if unknown >= 0 and (match is None or unknown < match.start()):
        return ""
    if match is None:
        return None
    summed = SUM.search(text)
    if summed and summed.start() <= match.start():
        value, end = value_of(summed[0]), summed.end()
        if value is None:
            return ""
        is_fraction = bool(match["under"]) and match.end() >= end
        shown = _shown(match) if is_fraction else plain(value)
    else:
        value, shown, end = value_of(_shown(match)), _shown(match), match.end()
    if _LABEL.search(text[: match.start()]):
        return ""
    if several := _SEVERAL.match(text, end):
        other = _NUMBER.search(text, several.end() - 1)
        return shown if other and value_of(_shown(other)) == value else ""
    return shown


def _hashed_number(text: str) -> str | None:
    """The number after `####`; empty if the answer ends in a `####` line without a number.

    Lines with only a number are preferred to those with words; headings (`#### Step 1`, `#### 1.`)
    do not count. The last of several lines is used, but the first of consecutive ones.
    """
    lines = list(_HASHES.finditer(text))
    if not lines:
        return None
    lines = [match for match in lines if not _is_heading(match, lines)]
    alone = [match for match in lines if _is_number_alone(_hashed(match))]
    chosen = alone or [match for match in lines if _of_clause(_hashed(match)) is not None]
    if not chosen:
        end = lines[-1] if lines else None
        is_end = end is not None and not text[end.end() :].strip()
        return "" if is_end and not _BOXED.search(text) else None
    if not alone:
        return _of_clause(_hashed(chosen[-1]))
    between = text[alone[0].end() : alone[-1].start()]
    return _of_clause(_hashed(alone[-1] if between.strip() else alone[0]))


def _hashed(match: re.Match[str]) -> str:
    said = match[1] if match[1] is not None else match[2]
    boxed = _BOXED.search(said)
    return boxed[1] if boxed else said


def _is_heading(match: re.Match[str], lines: Sequence[re.Match[str]]) -> bool:
    said = _hashed(match)
    if _HEADING.match(said):
        return True
    if not (numbered := _NUMBERED.match(said)) or not re.search(r"\d\s*[.):]\W*$", said):
        return False
    # `#### 1.` and `#### 2.` are numbers of steps; one alone is an answer.
    others = [_hashed(each) for each in lines if each is not match]
    steps = [int(found[1]) for each in others if (found := re.match(r"^\W*(\d+)\s*[.):]", each))]
    return int(numbered[1]) + 1 in steps or int(numbered[1]) - 1 in steps


def _is_number_alone(statement: str) -> bool:
    numbers = _numbers(statement)
    rest = _NUMBER.sub("", re.sub(r"\*\*|__|`", "", statement))
    return len(numbers) == 1 and not re.search(r"\w", rest)


def _boxed_number(text: str) -> str | None:
    """The number of the last box that has one, unless an answer is stated after it."""
    boxed = [(match.end(), _of_box(match[1])) for match in _BOXED.finditer(text)]
    boxed = [(end, value) for end, value in boxed if value is not None]
    if not boxed:
        return None
    end, value = boxed[-1]
    stated = _stated_number(text[end:], is_close=True)
    return value if stated is None else stated


def _of_box(content: str) -> str | None:
    """The number in a box; empty for a factorial, which `4!` is in a box but not in a sentence."""
    return "" if re.fullmatch(r"\s*\d+!\s*", content) else _of_clause(content)


def _stated_number(text: str, is_close: bool = False) -> str | None:
    """The number of the last statement such as `the answer is 18`; empty if it gives two.

    Args:
        is_close: the number must follow immediately, unlike in `the answer is divisible by 3`.
    """
    statements: list[tuple[int, str]] = []
    for match in reversed(list(_TOTAL.finditer(text))):
        before = sentence_before(text, match.start())
        denied = DENIED.search(match["between"]) or re.match(r"\W*not\b", match["rest"])
        if is_close and not _CLOSE.match(match["rest"]):
            continue
        if denied or OTHERS.search(before) or CONDITION.search(before):
            continue
        clause = re.split(r"(?<!\d)\.(?!\d)|\.(?=\s|$)|[;!]", match["rest"].lstrip())[0]
        first = clause.split("\n")[0]
        clause = first if _numbers(first) or first.strip(" *:_`$") else clause
        if (number := _of_clause(clause)) is not None:
            statements.append((match.start(), number))
            break
    for match in _ANSWER_HEAD.finditer(text):
        if (number := _of_clause(match[1])) is not None:
            statements.append((match.start(), number))
    for match in _IS_ANSWER.finditer(text):
        before = text[max(0, match.start() - 300) : match.start()]
        if numbers := _numbers(re.split(r"[\n!?]|\.(?!\d)", before)[-1]):
            statements.append((match.start(), _shown(numbers[-1])))
    return max(statements)[1] if statements else None


def _number_alone(text: str) -> str | None:
    """The number of the last line, or else the first, if that is just a number with its unit."""
    lines = [line for line in _without_remarks(text).splitlines() if line.strip()]
    if not lines:
        return None
    for line in (lines[-1], lines[0]):
        is_item = re.match(r"\s*-\s", line)
        if _BARE.match(line) and not is_item and len(found := _numbers(line)) == 1:
            return _shown(found[0])
    return None


def _last_number(text: str) -> str | None:
    """A number of the last sentence that has one: the one after `=`, or in bold, or the last."""
    kept = _without_remarks(text)
    sentences = [
        each for each in re.split(r"\n|(?<=[^\d\s])[.!?](?=\s|$)|(?<=\d)[.!?](?=\s|$)", kept)
    ]
    for sentence in reversed(sentences):
        if _UNFINISHED.search(sentence):
            return ""
        kept = _REJECTED.sub("", re.sub(r"\*\*(?=[^*]*$)|__|`", "", sentence))
        if not (_numbers(kept) or UNKNOWN in kept):
            continue
        if (equal := _of_equation(kept)) is not None:
            return equal
        bold = re.findall(r"\*\*([^*]*\d[^*]*)\*\*", sentence)
        return _last_value(bold[-1] if bold else re.sub(r"\*\*", "", kept))
    return None


def _last_value(text: str) -> str | None:
    spans = [match.span() for match in SUM.finditer(text)]
    numbers = list(_NUMBER.finditer(text))
    if text.rfind(UNKNOWN) > (numbers[-1].start() if numbers else -1):
        return ""
    if not numbers:
        return None
    if spans and spans[-1][0] <= numbers[-1].start() < spans[-1][1]:
        return _first_value(text[spans[-1][0] : spans[-1][1]])
    return _shown(numbers[-1])


def _without_remarks(text: str) -> str:
    """The text without paragraphs, lines and brackets at its end that are only remarks."""
    lines = text.rstrip().split("\n")
    for index, line in enumerate(lines):
        if index and _REMARK.match(line) and _NUMBER.search("\n".join(lines[:index])):
            lines = lines[:index]
            break
    kept = "\n".join(lines).rstrip()
    while remark := re.search(r"(?<=[\w.!*])\s+\([^()\n]*\)[.!]*\s*$", kept):
        kept = kept[: remark.start()]
    for stop in re.finditer(r"(?<=[.!])\s+(?=[A-Z(])", kept):
        if _REMARK.match(kept[stop.end() :]) and _NUMBER.search(kept[: stop.start()]):
            return kept[: stop.start()]
    return kept
