"""Write a story, or decide whether a text is one.

`parse` accepts exactly the texts that `generate` can write, so the share of valid stories among a
model's samples is a fact and not a judgement. Standard library only.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from dftserve.stories.narrators import NARRATORS
from dftserve.stories.words import LISTS, WOMEN

ANY_STORY = "Tell me a story."
PROMPTS: Mapping[str, Mapping[str, str]] = {
    ANY_STORY: {},
    "Tell me a story about a lost key.": {"thing": "key"},
    "Tell me a story about a lost bell.": {"thing": "bell"},
    "Tell me a story about a lost lantern.": {"thing": "lantern"},
    "Tell me a story with a fox in it.": {"animal": "fox"},
    "Tell me a story with a heron in it.": {"animal": "heron"},
    "Tell me a story for a winter night.": {"season": "winter"},
    "Tell me a story for a summer night.": {"season": "summer"},
}
"""The supported prompts, and the choices that each one fixes in the answer."""


@dataclass(frozen=True)
class Story:
    """A text of the grammar and the choices that produce it."""

    narrator: str
    choices: tuple[tuple[str, str], ...]
    """(slot, choice) in the order of first use; no slot occurs twice."""
    text: str

    @property
    def opening(self) -> str:
        """The first sentence, with its full stop or exclamation mark."""
        return re.split(r"(?<=[.!]) ", self.text, maxsplit=1)[0]


def generate(rng: random.Random, prompt: str = ANY_STORY) -> Story:
    """Write a story that answers `prompt`; every open choice is uniform over its options.

    Raises ValueError when `prompt` is not one of PROMPTS.
    """
    fixed = _fixed_choices(prompt)
    narrator = rng.choice(list(NARRATORS))
    chosen: dict[str, str] = {}
    text = ""
    parts = _TEMPLATES[narrator]
    while parts:
        part, parts = parts[0], parts[1:]
        if isinstance(part, str):
            text += part
            continue
        if part.name not in chosen:
            chosen[part.name] = fixed.get(part.name) or rng.choice(_OPTIONS[part.name])
        parts = _parts(part.show(chosen[part.name])) + parts
    return Story(narrator, tuple(chosen.items()), text)


def parse(text: str) -> Story | None:
    """The story that `text` is, or None where no choices produce exactly this text."""
    for narrator, template in _TEMPLATES.items():
        chosen = _read(template, text, {})
        if chosen is not None:
            return Story(narrator, tuple(chosen.items()), text)
    return None


def valid(prompt: str, text: str) -> bool:
    """Whether `text` is a story and contains what `prompt` asks for.

    Raises ValueError when `prompt` is not one of PROMPTS.
    """
    fixed = _fixed_choices(prompt)
    story = parse(text)
    return story is not None and fixed.items() <= dict(story.choices).items()


def options(slot: str) -> int:
    """How many choices `slot` has when the prompt leaves it open; "narrator" counts the narrators.

    Raises KeyError when no narrator uses the slot.
    """
    return len(NARRATORS) if slot == "narrator" else len(_OPTIONS[slot])


def _fixed_choices(prompt: str) -> Mapping[str, str]:
    if prompt not in PROMPTS:
        raise ValueError(f"unknown prompt {prompt!r}; the grammar answers: {', '.join(PROMPTS)}")
    return PROMPTS[prompt]


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _gendered(hers: str, his: str) -> Callable[[str], str]:
    return lambda hero: hers if hero in WOMEN else his


_FORMS: Mapping[str | None, Callable[[str], str]] = {
    None: str,
    "a": _article,
    "he": _gendered("she", "he"),
    "He": _gendered("She", "He"),
    "his": _gendered("her", "his"),
    "child": _gendered("daughter", "son"),
    "aunt": _gendered("aunt", "uncle"),
    "Miss": _gendered("Miss", "Mister"),
}


@dataclass(frozen=True)
class _Slot:
    name: str
    form: str | None

    def show(self, choice: str) -> str:
        return _FORMS[self.form](choice)


_Parts = tuple[str | _Slot, ...]


@cache
def _parts(template: str) -> _Parts:
    """The literals and the slots of a template, in order."""
    first, *pieces = re.split(r"\{(?:(\w+) )?([\w.]+)\}", template)
    parts: list[str | _Slot] = [first]
    for form, name, literal in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        parts += [_Slot(name, form), literal]
    return tuple(part for part in parts if part != "")


def _read(parts: _Parts, text: str, chosen: dict[str, str]) -> dict[str, str] | None:
    """The choices for which `parts` produce `text`, given those already `chosen`."""
    if not parts:
        return None if text else chosen
    head, rest = parts[0], parts[1:]
    if isinstance(head, str):
        return _read(rest, text[len(head) :], chosen) if text.startswith(head) else None
    if head.name in chosen:
        return _read(_parts(head.show(chosen[head.name])) + rest, text, chosen)
    for choice in _OPTIONS[head.name]:
        found = _read(_parts(head.show(choice)) + rest, text, {**chosen, head.name: choice})
        if found is not None:
            return found
    return None


def _compiled() -> tuple[dict[str, _Parts], dict[str, tuple[str, ...]]]:
    """Every narrator's parts, and every slot's options. Each `[a|b]` becomes its own slot."""
    templates: dict[str, _Parts] = {}
    slots: dict[str, tuple[str, ...]] = dict(LISTS)
    for narrator, template in NARRATORS.items():
        first, *pieces = re.split(r"\[([^]]*)\]", " ".join(template.split()))
        for number, own in enumerate(pieces[::2], start=1):
            slots[f"{narrator}.{number}"] = tuple(option.strip() for option in own.split("|"))
            first += f"{{{narrator}.{number}}}" + pieces[2 * number - 1]
        templates[narrator] = _parts(first)
    return templates, slots


_TEMPLATES, _OPTIONS = _compiled()
