"""The letter that an answer to a multiple-choice question gives.

Standard library only, as `extract`.
"""

import html
import itertools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from dftserve.evaluate.accuracy.extract.takes import last_answer
from dftserve.evaluate.text.thinking import after_thinking, before_next_question

LATEX_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mathit|bf|rm|operatorname)\s*"
    r"\{\s*([^{}]*?)\s*\}"
)
_ROLE = re.compile(r"^\s*assistant\b\s*:?\s*", re.IGNORECASE)
_HTML = re.compile(
    r"<(b|strong|em|i|p|span|u|div|code|pre)>(?=[\s\S]*</\1>)|</(?:b|strong|em|i|p|span|u|div|code|pre)>|<br\s*/?>",
    re.IGNORECASE,
)
STRUCK = re.compile(r"~~[^~\n]+~~")
_MARKUP = re.compile(r"\*|`|\$|\\[()\[\]]|(?<!\w)_+|_+(?!\w)|[\"“”‘„«»]|(?<!\w)['’]|['’](?!\w)")
_WORD = r"A-Za-z0-9_À-ɏ'’+#&"
"""Characters that make a letter next to them part of a word; not Chinese, which has no spaces."""
_LETTER = (
    rf"(?<![{_WORD}/.-])(?:[(\[{{<] ?)?([A-Za-z])(?![{_WORD}]|-\w|\.[A-Za-z]\b)(?: ?[)\]}}>])?"
)
"""A letter, group 1, that is not part of a word, of `D.C.`, `C++` or `B-cell`."""
_BOXED_LETTER = re.compile(r"\\(?:boxed|fbox)\s*\{\s*[(\[]?([A-Za-z])[)\]]?\s*(?:[.:),-][^{}]*)?\}")
_FILLERS = (
    r"(?:(?:the|not|option|choice|letter|answer|number|clearly|most|likely|probably|definitely|indeed|"
    r"therefore|thus|still|simply|just|actually|then|again|going|to|be|as|follows|one|"
    r"la|el|opción|letra|lettre|die|"
    r"correct|right|statement|possibly|surely|certainly|obviously|in|fact)\b[\s:,-]*)*"
)
_NOUN = (
    r"(?:answers?|ans|options?|choices?|letter|solution|response|selection|verdict|"
    r"(?:correct|right|best|true)(?:\s+(?:one|statement))?|respuesta|réponse|antwort|risposta|"
    r"resposta|ответ|答案|final)"
)
_LINK = (
    r"(?:(?:\b(?:is|be|was|are|remains|becomes|equals|es|est|ist|è|é|lies|choose|select|pick)\b"
    r"|seems?\s+to\s+be\b|appears?\s+to\s+be\b|(?:should|must)\s+have\s+been\b|"
    r"(?:flips|changes|switches)\s+to\b|是|为|为|：)\s*[:=–—-]*|[:=→–—]+|-+>?|=>)"
)
_STATED = re.compile(
    rf"(?:\b|(?<=[^\W\d_])(?=答))(?P<noun>{_NOUN})(?P<between>[^.\n:?!=→–—]{{0,60}}?)\s*{_LINK}\s*"
    rf"{_FILLERS}(?P<rest>{_LETTER})",
    re.IGNORECASE,
)
_HEADED = re.compile(
    rf"^\W*(?:(?:the|my|final|correct)\s+)*(?:answer|option|choice)\W*\n+\W*?{_LETTER}"
    r"[.:]?(?=\s*(?:\n|$)|[.:)] )",
    re.IGNORECASE | re.MULTILINE,
)
_TAGGED = re.compile(rf"<(?:final_)?answer>\s*{_LETTER}", re.IGNORECASE)
_CALLED = re.compile(
    rf"{_LETTER}(?:[.:)]\s[^.\n?!]{{1,80}}?)?[,\s]+(?:is|must\s+be|would\s+be|seems|looks|has\s+to\s+be)"
    r"\s+(?:also\s+|clearly\s+|indeed\s+|therefore\s+|thus\s+|definitely\s+|probably\s+|most\s+likely\s+)*"
    r"(?:(?:the|our|my)\s+)?(?:only\s+|most\s+|final\s+)?"
    r"(?:correct|right|best|true|accurate|valid|answer|appropriate)\b"
    r"(?!\s+(?:only\s+)?(?:if|when)\b|\s+(?:to|for|of)\s+(?:an?|the|some)?\s*(?:different|other|next|another)\b)",
)
_MARKED = re.compile(
    rf"^\W*(?:option\s+)?{_LETTER}[.:)]?(?:[^\n]*?)\s*[-–—:(]*\s*(?:✓|✔|✅|\b(?i:correct)\b)\W*",
    re.MULTILINE,
)
DENIED = re.compile(
    r"\b(?:not|never|isn['’]?t|wasn['’]?t|aren['’]?t|cannot|can['’]?t|no|neither|incorrect|wrong|"
    r"except|rather\s+than|instead\s+of)\b",
    re.IGNORECASE,
)
_OTHER_ANSWER = re.compile(r"\b(?:incorrect|wrong|false|other|bad|rejected)\W*$", re.IGNORECASE)
_DOUBT = re.compile(
    r"(?:\b(?:not|never|cannot)|n['’]t)\s+(?:\w+\s+){0,2}?(?:think|believe|say|claim|agree|conclude|mean)\b"
    r"[^,;:]*$|\b(?:unlikely|doubt(?:ful)?|impossible|untrue|false|not\s+(?:true|likely|so))\s+"
    r"(?:that\s+)?(?:(?:the|my)\s+)?(?:\w+\s*){0,2}$",
    re.IGNORECASE,
)
_RIGHT = re.compile(r"\b(?:correct|right|best|true|final)\W*$", re.IGNORECASE)
_RELATIVE = re.compile(r"\b(?:that|which)\b[^,]*(?=\s+(?:is|are)\b)", re.IGNORECASE)
"""`that isn't true` in `the option that isn't true is B`, which does not deny B."""
_CONTRASTED = re.compile(
    rf"(?:\b(?:not|nicht|pas|no\s+es|non\s+è|não\s+é)\s+(?:the\s+|la\s+|option\s+|opción\s+)*|不是\s*){_LETTER}"
    r"\s*,?\s*(?:\b(?:but|rather|sondern|sino|mais|ma|mas)\b|而是)\s*(?:rather\s+|la\s+|option\s+)*"
    rf"(?P<meant>{_LETTER})",
    re.IGNORECASE,
)
_IT_IS = re.compile(rf"{_LETTER}\s+it\s+(?:is|must\s+be)\s*(?=[.!\n]|$)")
_TICKED = re.compile(
    rf"^\W*(?:option\s+)?{_LETTER}[^\n]*?[-–—:|(]\s*(?i:yes|true|right)\W*$", re.MULTILINE
)
"""A line of a table or list that ends in `yes`."""
_MORE = re.compile(
    r"\s*[)\]}]?\s*(?:(?P<or>,?\s*(?:and|or|&|/|\+|und|oder|y|et)\s*|,\s*)"
    r"(?:option\s+|both\s+)?[(\[]?(?P<more>[A-Z])(?![\w'’-]))"
)
_CORRECTED = re.compile(
    r"\s*,?\s*(?:but|it\s+is|it['’]s|rather|instead)\b[^.\n?!]{0,30}?" + _LETTER, re.IGNORECASE
)
OTHERS = re.compile(
    r"\b(?:students?|some|people|many|most|one|you|they|others|someone|everyone|everybody|beginners)\b"
    r"[^.\n]{0,40}"
    r"\b(?:think|say|assume|believe|claim|guess|argue|pick|choose|thought|said|expect)\w*\b",
    re.IGNORECASE,
)
CONDITION = re.compile(r"\b(?:if|had|were|unless|suppose|assuming|when)\b", re.IGNORECASE)
_HEDGED = re.compile(
    r"\b(?:seems?|appears?|might|could|may|perhaps|first|initially)\b", re.IGNORECASE
)
_REASON = (
    r"(?:because|since|as|for|due|given|by|which|that|where|and|with|but|so|in|from|on|-|–|—|,|=)"
)
_ALONE = re.compile(
    r"^(?:[^\w(\[{<]|\d+[.)]\s)*(?:(?:so|thus|therefore|hence|probably|maybe|perhaps|definitely|likely|clearly|"
    r"obviously|i\s+think|i\s+guess|my\s+guess|i['’]d\s+say)\W+)*(?:option\s+|choice\s+|answer\s+)?"
    r"[(\[{<]*\s?([A-Za-z])\s?[)\]}>]*[^\w]*$",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"^[\s>#+*-]*(?:(?:option|choice|answer)\s+)?(?:[(\[{]\s?([A-Za-z])\s?[)\]}]|([A-Za-z])"
    r"(?=\s*[.):,;–—]|\s+-|\s+(?:because|since|as\b)))(?!\.[A-Za-z]\b)",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"\s+(?:is|was)\s+not\b"
    r"|[\s.):]*(?:(?:wrong|incorrect)(?=\W*$|\W+(?:because|since|as)\b)"
    r"|(?:is|was)\s+(?:(?:wrong|incorrect|false)\b|out\W*$)"
    r"|(?:(?:is|was)\s+not|isn['’]?t|wasn['’]?t)\s+(?:the\s+)?"
    r"(?:correct|right|true|best|answer|it)\b)"
    r"|\s*[-–—]\s*(?:wrong|incorrect)\W*$"
    r"|\W*\w.*(?:\s-|[–—])\s*(?:no|wrong|incorrect|false)\W*$",
    re.IGNORECASE,
)
"""After a label: the option is not the answer. A later negation belongs to the option's text:
`B. The covenant is not enforceable`, `B. is not liable`, `B. No`, `B. Wrong, Not wrong`."""
_NUMBER = r"[$€£]?(-?\d(?:[\d.,]*\d)?)(?!\s*[×+/=^-])"
_STATED_NUMBER = re.compile(rf"\b(?:correct\s+)?answer\s+(?:is|was)\s+{_NUMBER}", re.IGNORECASE)
_CONCLUDED = re.compile(
    r"(?:\b|(?=[选選]))(?:it['’]s|it\s+is|it\s+(?:must|should|would)\s+be|it\s+should\s+have\s+been|it\s+has\s+to\s+be|that['’]s|that\s+is|this\s+is|so|"
    r"therefore|thus|hence|choose|pick|select|selecting|chose|going\s+with|go\s+with|goes\s+with|"
    r"选择?|選擇?|say|guess|vote\s+for|settle\s+on|leaves|leaving|left\s+with|i\s+think|i\s+believe|must\s+be|"
    rf"points\s+to)(?:\b|(?<=[选選择擇]))[\s,:]*{_FILLERS}{_LETTER}(?=\s*(?:[.,;:!)\]–—]|$|\n|because\b|since\b|as\b))",
    re.IGNORECASE,
)


def choice(answer: str, letters: str = "ABCD") -> str | None:
    """The letter that an answer to a multiple-choice question gives, in upper case.

    Args:
        letters: the question's. An answer that gives another letter cannot be read.
    """
    text = _plain(after_thinking(answer))
    letter = _last_letter(before_next_question(text), letters) or _last_letter(text, letters)
    return letter if letter and letter in letters.upper() else None


def _plain(answer: str) -> str:
    """The answer without markup, which does not affect the letter."""
    text = without_runs(unicodedata.normalize("NFKC", answer))
    while (simpler := LATEX_TEXT.sub(r"\1", text)) != text:
        text = simpler
    text = _HTML.sub("", _ROLE.sub("", html.unescape(text)))
    # Without the markup between them, more marks are in one run.
    return without_runs(_MARKUP.sub("", STRUCK.sub("", text)))


def without_runs(text: str) -> str:
    """Shorten runs of one punctuation mark or blank to ten, and of several to 200, since patterns
    are slow on long runs."""
    text = re.sub(r"([^\w])\1{10,}", lambda run: run[0][:10], text)
    return re.sub(r"\W{201,}", lambda run: run[0][:100] + run[0][-100:], text)


def _last_letter(text: str, letters: str) -> str | None:
    return last_answer(text, lambda take_text, is_full: _letter(take_text, letters, is_full))


def _letter(text: str, letters: str, is_full: bool) -> str | None:
    """By the clearest kind of evidence that is found; empty if it names no single letter.

    Args:
        is_full: also use the weaker kinds: a label at the beginning, or the only option mentioned.
    """
    for letter in (_stated_letter(text, letters), _letter_alone(text)):
        if letter is not None:
            return letter
    if is_full and (leading := _leading_letter(text, letters)) is not None:
        return leading
    if (concluded := _concluded_letter(text)) is not None:
        return concluded
    return _mentioned_letter(text) if is_full else None


@dataclass(frozen=True)
class _Statement:
    """A statement that some letter is the answer."""

    start: int
    end: int
    letter: str
    """Empty if it names several."""
    hedged: bool = False


def _stated_letter(text: str, letters: str) -> str | None:
    """The letter of the writer's last statement, preferably of one that is not hedged.

    Empty if the statement names several letters.
    """
    statements = sorted(_statements(text, letters), key=lambda each: each.start)
    if not statements:
        return None
    sure = [each for each in statements if not each.hedged]
    last = (sure or statements)[-1]
    if not sure:
        after = text[last.end :]
        return _letter_alone(after) or _concluded_letter(after) or last.letter
    return last.letter


def _statements(text: str, letters: str) -> Iterator[_Statement]:
    for pattern in (_BOXED_LETTER, _TAGGED, _HEADED, _CONTRASTED, _IT_IS):
        for match in pattern.finditer(text):
            yield _Statement(*match.span(), match[match.lastindex or 1].upper())
    for match in _STATED.finditer(text):
        yield from _stated(text, match, letters)
    for match in _CALLED.finditer(text):
        before = sentence_before(text, match.start())
        another = re.search(r"(?:^|\s)(?:and|or|nor|neither)\s*(?:option\s*)?$", before)
        doubted = another or OTHERS.search(before) or CONDITION.search(before)
        if match[1].isupper() and not doubted and not DENIED.search(match[0][len(match[1]) :]):
            yield _Statement(*match.span(), match[1], bool(_HEDGED.search(match[0])))
    for pattern, hedged in ((_MARKED, False), (_TICKED, True)):
        marked = [match for match in pattern.finditer(text) if match[1].isupper()]
        marked = [match for match in marked if not _doubted(match[0])]
        if len({match[1] for match in marked}) == 1:
            yield _Statement(*marked[-1].span(), marked[-1][1], hedged)


def _doubted(statement: str) -> bool:
    return bool(DENIED.search(statement) or CONDITION.search(statement))


def _stated(text: str, match: re.Match[str], letters: str) -> Iterator[_Statement]:
    """The statement of a match such as `answer is B`, if its context does not rule it out."""
    before, after = sentence_before(text, match.start()), text[match.end() :]
    letter = match["rest"].strip("()[]{}<> ")
    is_bracketed = match["rest"].endswith((")", "]", "}", ">"))
    if not (is_bracketed or _is_letter(letter, text[match.end("rest") :])) or OTHERS.search(before):
        return
    if CONDITION.search(before) or CONDITION.search(match["between"]):
        return
    if _OTHER_ANSWER.search(before) or _DOUBT.search(before + match["noun"] + match["between"]):
        return
    is_list = re.match(r"(?:options|choices)\s+are\b", match[0], re.IGNORECASE)
    if is_list and not _RIGHT.search(before):
        return
    if re.match(r"[^.\n!]{0,30}\?", after) and not re.match(r"\s*[.\n!]", after):
        return  # A question.
    said = _RELATIVE.sub("", match[0][: match.start("rest") - match.start()])
    if DENIED.search(said):
        if corrected := _CORRECTED.match(after):
            yield _Statement(*match.span(), corrected[1].upper())
        return
    if (more := _MORE.match(after)) and more["more"] in letters.upper() and more["more"] != letter:
        yield _Statement(*match.span(), "")
        return
    hedged = _HEDGED.search(said) or _HEDGED.search(before)
    yield _Statement(*match.span(), letter.upper(), bool(hedged))


def _is_letter(letter: str, after: str) -> bool:
    """Whether it is an option, no article or word: `the answer is a car`, `A field is a ring`."""
    follows = re.match(r"\s*(\S*)", after)
    word = follows[1] if follows and not after.startswith(("\n", ")", "]", ".")) else ""
    if not word or not re.match(r"[\w$\\]", word):
        return True
    if letter.islower():
        return bool(re.fullmatch(r"because|since", word))
    return letter not in "AI" or bool(re.match(rf"{_REASON}\b", word))


def sentence_before(text: str, position: int) -> str:
    """What a sentence has before a position, of the last 300 characters."""
    return re.split(r"[.\n!?;]", text[max(0, position - 300) : position])[-1]


def _letter_alone(text: str) -> str | None:
    """The letter of the last line that has nothing else, or of such a sentence after a question.

    Empty if different letters are on consecutive lines: no choice was made.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    alone = [
        (index, match[1].upper())
        for index, line in enumerate(lines)
        if (match := _ALONE.match(line))
    ]
    if not alone:
        asked = re.search(r"[?!]\s+[(\[]?([A-Za-z])[)\]]?[.!]*\s*$", text)
        return asked[1].upper() if asked else None
    if alone[0][0] == 0 and len(lines) > 1 and not re.search(r"\b[Ww]ait\b|\b[Aa]ctually\b", text):
        under = len(alone) > 1 and alone[1][0] == 1 and alone[1][1] != alone[0][1]
        return "" if under else alone[0][1]
    near = [
        b for (a, first), (b, second) in itertools.pairwise(alone) if b == a + 1 and first != second
    ]
    return "" if near else alone[-1][1]


def _leading_letter(text: str, letters: str) -> str | None:
    """The letter of the first line, such as `B) four`, unless it begins a list of the options."""
    lines = [line for line in text.splitlines() if line.strip()]
    labels = [match for line in lines if (match := _LEADING.match(line))]
    if not lines or not (first := _LEADING.match(lines[0])):
        return None
    letter = (first[1] or first[2]).upper()
    rest = lines[0][first.end() :]
    more = re.match(r"\s*(?:,|and|or|&|/)\s*(?:and\s+|or\s+)?[(\[]?([A-Z])(?![\w'’-])", rest)
    if more and more[1] in letters.upper():
        return ""
    listed = [(match[1] or match[2]).upper() for match in labels]
    is_list = len(set(listed)) >= 3 or bool(_LEADING.match("".join(lines[1:2])))
    if is_list and listed[:2] == sorted(letters.upper())[:2]:
        others = [line for line in lines[1:] if _LEADING.match(line)]
        if not all(DENIED.search(line) for line in others):
            return ""
    if _REFUSED.match(rest):
        return ""
    stated = _STATED_NUMBER.search(text, text.index(lines[0]) + len(lines[0]))
    own = re.match(rf"[\s.):,;–—-]*{_NUMBER}", rest)
    if stated and own and stated[1].replace(",", "") != own[1].replace(",", ""):
        return ""
    return letter


def _concluded_letter(text: str) -> str | None:
    """The letter of the last conclusion such as `so it is B`."""
    conclusions = []
    for match in _CONCLUDED.finditer(text):
        before = re.split(r",", sentence_before(text, match.start()))[-1]
        letter = match[match.lastindex or 1]
        if (
            DENIED.search(match[0])
            or DENIED.search(before)
            or not _is_letter(letter, text[match.end() :])
        ):
            continue
        more = _MORE.match(text[match.end() :])
        conclusions.append("" if more and more["more"] != letter.upper() else letter.upper())
    return conclusions[-1] if conclusions else None


def _mentioned_letter(text: str) -> str | None:
    """The letter of a short line such as `B Paris`, or of the only option that is mentioned."""
    short = re.fullmatch(r"\s*([B-H])\s+(\S+)(?:\s+\S+){0,6}\s*", text)
    if short and not re.match(r"(?:is|was|are|has|and|or|will|can|may|does|in|of)\b", short[2]):
        return short[1]
    if DENIED.search(text):
        return None
    mentioned = re.findall(r"[(\[]([A-Z])[)\]]|\b[Oo]ption\s+([A-Z])\b", text)
    several = {first or second for first, second in mentioned}
    return several.pop() if len(several) == 1 else None
