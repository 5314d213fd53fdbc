"""Evaluate numbers as people write them: `3 1/4`, `10^3`, `5 + 3`.

Standard library only, as `extract`.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction

UNKNOWN = "\ue000"
"""Stands for a value that is not a single rational number: `2π`, `√17`, `3:30`, `12,5`."""
MOST_DIGITS = 300
"""Maximum number of digits of a value; a longer one is `UNKNOWN`: powers may be huge, and Python
refuses to print them."""

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_OPERAND = rf"\(*\s*[$€£¥₹]?\s?{_DECIMAL}\s*\)*"
_OPERATOR = (
    r"(?:\s*[*×·÷]\s*|\s*/\s*|\s*\+\s*|\s+[-−–]\s+|\s+x\s+|\s+plus\s+|\s+minus\s+|\s+times\s+"
    r"|\s+multiplied\s+by\s+|\s+divided\s+by\s+)"
)
SUM = re.compile(rf"(?<![\w.,/^])-?{_OPERAND}(?:{_OPERATOR}{_OPERAND})+(?![\w/^]|[.,]\d)")
"""Numbers with operators between them. A hyphen without spaces is not a minus: `10-12` is a
range."""
_POWERS = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "billion": 9, "trillion": 12}
SCALES = "|".join(_POWERS)
_WORDS = {
    "plus": "+", "minus": "-", "times": "*", "multiplied by": "*", "divided by": "/", "×": "*",
    "·": "*", "x": "*", "÷": "/", "−": "-", "–": "-",
}  # fmt: skip
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def plain(value: Fraction) -> str:
    """`18`, `-5`, `13/4`."""
    return str(value)


def meanings(text: str) -> frozenset[Fraction]:
    """The values a number may stand for: `4 million` is 4000000, or 4 if millions are asked for."""
    digits = re.sub(rf"\s+(?:{SCALES})$", "", text.strip())
    return frozenset({value_of(digits), value_of(text)} - {None})  # type: ignore[arg-type]


def value_of(text: str) -> Fraction | None:
    """The exact value of a number or a sum; None if it has none."""
    if scaled := re.fullmatch(rf"(.*\d)\s+({SCALES})", text.strip()):
        value = value_of(scaled[1])
        return None if value is None else value * 10 ** _POWERS[scaled[2]]
    for word, sign in _WORDS.items():
        text = re.sub(rf"\s{word}\s" if word.isascii() else word, f" {sign} ", text)
    text = re.sub(r"[$€£¥₹,]", "", text)
    # Python does not accept leading zeros.
    source = re.sub(r"\s+", " ", re.sub(r"(?<![\d.])0+(?=\d)", "", text)).strip()
    try:
        value = _evaluated(ast.parse(source, mode="eval").body, source)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value if max(abs(value.numerator), value.denominator) < 10**MOST_DIGITS else None


def _evaluated(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.BinOp) and (operation := _OPERATIONS.get(type(node.op))) is not None:
        return operation(_evaluated(node.left, source), _evaluated(node.right, source))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand, source)
    if isinstance(node, ast.Constant):
        return Fraction(ast.get_source_segment(source, node) or str(node.value))
    raise ValueError("no sum")


def with_plain_values(text: str) -> str:
    """Replace mixed numbers, powers and roots by one number each, or by `UNKNOWN`."""
    text = re.sub(rf"\d{{{MOST_DIGITS},}}", UNKNOWN, text)
    text = re.sub(r"\^\s*\{?\\circ\}?", "°", text)
    text = re.sub(r"\\(?:times|cdot)\b", "×", text).replace("\\div", "÷")
    text = re.sub(r"(?<=\d)[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + m[0].translate(_SUPERSCRIPTS), text)
    text = re.sub(r"(?<![\w.,/])(\d+)(?:\s+|\s+and\s+)(\d+)/(\d+)(?![\d/.])", _mixed, text)
    text = re.sub(r"(?:\\sqrt\s*\{|√\s*[({]?\s*)(\d+)(?!\d|\.\d)\s*[})]?", _root, text)
    text = re.sub(r"\\sqrt\s*(?:\[\d+\])?\s*\{[^{}]*\}|√\S+", UNKNOWN, text)
    text = re.sub(
        r"(?<![\w.,^)])(\d+(?:\.\d+)?)\s?\^\s?(?:\{\s*(-?\d+)\s*\}|\(\s*(-?\d+)\s*\)|(-?\d+))(?!\s*\^)",
        _power,
        text,
    )
    text = re.sub(r"(?<![\w.,])(\d+(?:\.\d+)?)[eE]\+?(-?\d+)\b", _scientific, text)
    # Bounded, as the time would be quadratic in the length of `1,1,1,…`.
    text = re.sub(rf"\d[\d.,]{{0,{MOST_DIGITS}}}\s?\^\S*", UNKNOWN, text)
    text = re.sub(rf"-?\d[\d.,/]{{0,{MOST_DIGITS}}}\s?(?:π|\\pi\b)", UNKNOWN, text)
    text = re.sub(r"(?<![\d.,])\d+(?:,\d{1,2})+(?![\d,]|\.\d)", UNKNOWN, text)
    # Of a time after `####` only the hour is read, since the format asks for one number.
    text = re.sub(
        r"(####[^\n]*|\b(?:week|day|month|year|step|part|case|hour|round|stage|person|group)\s+\d+:)"
        r"|(?<![\d.:])\d+:\d+(?![\d:])",
        lambda m: m[1] or UNKNOWN,
        text,
        flags=re.IGNORECASE,
    )
    text = re.sub(r"(?<!\d)(\d+/\d+)\s+of\s+(?=[$€£]?\d)", r"\1 * ", text)
    text = re.sub(r"(?<!\d)(\d+(?:\.\d+)?)\s?%\s+of\s+(?=[$€£]?\d)", r"\1 / 100 * ", text)
    text = re.sub(r"\bhalf\s+of\s+(?=[$€£]?\d)", "1/2 * ", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:twice|double)\s+(?=[$€£]?\d)", "2 * ", text, flags=re.IGNORECASE)
    return re.sub(
        r"(^|[=:(]|\b(?:is|was|to|of|at|equals|be|by|answer|reaches|gives|gets?))(\W*)"
        r"(?:minus|negative)\s+(?=[$€£]?\d)",
        r"\1\2-",
        text,
        flags=re.IGNORECASE | re.MULTILINE,
    )


def _mixed(match: re.Match[str]) -> str:
    whole, over, under = map(int, match.groups())
    return plain(whole + Fraction(over, under)) if 0 < over < under else match[0]


def _root(match: re.Match[str]) -> str:
    root = math.isqrt(int(match[1]))
    return str(root) if root * root == int(match[1]) else UNKNOWN


def _power(match: re.Match[str]) -> str:
    base, exponent = Fraction(match[1]), int(match[2] or match[3] or match[4])
    if abs(exponent) * len(match[1]) > MOST_DIGITS or not base:
        return UNKNOWN
    return plain(base**exponent)


def _scientific(match: re.Match[str]) -> str:
    if abs(int(match[2])) > MOST_DIGITS:
        return UNKNOWN
    return plain(Fraction(match[1]) * Fraction(10) ** int(match[2]))
