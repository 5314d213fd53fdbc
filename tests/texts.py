"""English-like texts by many authors from a small grammar, for tests without real data.

Each author has habits: function words, punctuation, the length of sentences. All share the same
topics.
"""

import math
import random
from itertools import accumulate

_NOUNS = """
river garden window teacher machine letter mountain kitchen soldier captain orchard bottle engine
village doctor harbor candle winter brother morning shadow market forest island painter bridge
ladder station mirror blanket sailor desert museum tower novel basket hammer farmer cottage thunder
meadow pocket widow statue carpet tunnel pilot rabbit copper lantern saddle wagon temple needle
beggar singer anchor barrel chapel dragon falcon glacier helmet infant jungle kettle
"""
_VERBS = """
opened carried forgot painted followed noticed repaired watched sold found kept built broke lost
drew remembered touched moved hid brought crossed feared left saw burned knew met wanted held chose
reached turned heard cleaned covered gathered
"""
_ADJECTIVES = """
old quiet bright narrow heavy golden broken gentle distant bitter sudden wooden empty patient clever
frozen hollow humble modern royal silent tender useful yellow careless graceful nervous helpless
fading burning
"""
_HABITS = {
    "article": "the a this that his her my our some every no another",
    "pronoun": "i he she we they it you nobody",
    "joint": "and but or so yet because although while when until since as",
    "place": "in with at by from on into over under about through between behind beyond",
    "manner": "never always often perhaps very too quite almost only still again slowly",
    "opening": "then however once still now here there perhaps well oh",
    "end": ". . . ! ? ...",
}
NOUNS = _NOUNS.split()
VERBS = _VERBS.split()
ADJECTIVES = _ADJECTIVES.split()
NOUN_INDEX = {noun: index for index, noun in enumerate(NOUNS)}
HABITS = {name: known.split() for name, known in _HABITS.items()}
HABITS["between"] = [",", ";", " —", ":", ""]


def human_like(count: int, words: int = 160, seed: int = 0) -> list[str]:
    """Texts of at least `words` words, each by another author."""
    return [write(f"{seed} {number}", f"{seed} {number}", words) for number in range(count)]


def write(author: str, text: str, words: int = 160) -> str:
    """One text; both names are seeds."""
    writer = _Writer(author, text)
    written = ""
    while len(written.split()) < words + 10:  # Some more, as a dash is not a word.
        written += writer.sentence() + ("\n\n" if writer.chance("paragraph", 0.2) else " ")
    return written.strip()


def soup(text: str, seed: int = 0) -> str:
    """The text's words in random order."""
    words = text.split()
    random.Random(f"soup {seed}").shuffle(words)
    return " ".join(words)


class _Writer:
    def __init__(self, author: str, text: str) -> None:
        habits = random.Random(f"author {author}")
        self.draw = random.Random(f"text {text}")
        self.weights = {
            name: list(accumulate(math.exp(1.2 * habits.gauss(0, 1)) for _ in known))
            for name, known in HABITS.items()
        }
        names = ("paragraph", "more", "adjective", "place", "manner", "opening", "quote", "pronoun")
        self.often = {name: habits.random() for name in names}

    def chance(self, name: str, most: float = 0.8) -> bool:
        return self.draw.random() < most * self.often[name]

    def one(self, name: str) -> str:
        return self.draw.choices(HABITS[name], cum_weights=self.weights[name])[0]

    def sentence(self) -> str:
        text = f"{self.one('opening')}, " if self.chance("opening", 0.4) else ""
        text += self.clause()
        while self.chance("more", 0.7):
            text += f"{self.one('between')} {self.one('joint')} {self.clause()}"
        text = text[0].upper() + text[1:] + self.one("end")
        return f'"{text}"' if self.chance("quote", 0.3) else text

    def clause(self) -> str:
        who = self.one("pronoun") if self.chance("pronoun") else self.thing()
        manner = f" {self.one('manner')}" if self.chance("manner", 0.5) else ""
        where = f" {self.one('place')} {self.thing()}" if self.chance("place") else ""
        # Verbs depend on nouns, and nouns on adjectives, so that word order carries information.
        start = NOUN_INDEX.get(who.split()[-1], 0)
        verb = VERBS[(5 * start + self.draw.randrange(4)) % len(VERBS)]
        return f"{who}{manner} {verb} {self.thing()}{where}"

    def thing(self) -> str:
        if not self.chance("adjective", 0.6):
            return f"{self.one('article')} {self.draw.choice(NOUNS)}"
        which = self.draw.randrange(len(ADJECTIVES))
        noun = NOUNS[(7 * which + self.draw.randrange(5)) % len(NOUNS)]
        return f"{self.one('article')} {ADJECTIVES[which]} {noun}"
