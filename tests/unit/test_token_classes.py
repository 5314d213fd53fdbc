"""Token classes compared with Unicode's word segmentation of the decoded text."""

import math
from pathlib import Path
from types import SimpleNamespace

import mistral_common
import numpy as np
import pytest
import regex
import tiktoken
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Mistral
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dftserve.sampling.token_classes import (
    AT_JOINER,
    IN_WORD,
    INSIDE,
    OTHER,
    OUTSIDE_WORD,
    START,
    TokenClasses,
    token_pieces,
)

TEXTS = {
    "English": (
        "It was the best of times, it was the worst of times; we had everything before us. “Don't "
        "go,” said the well-known captain's sister-in-law, who didn't like 1,984 of the old ships' "
        "3rd-rate sails (or so she'd say). In 1805 they'd sailed 12 leagues — twenty-one, perhaps. "
        "“Perhaps,” he said. “Never,” said she. “Go,” they said."
    ),
    "French": (
        "Tous les êtres humains naissent libres et égaux en dignité et en droits. Longtemps, je me "
        "suis couché de bonne heure. L'homme qu'il aperçut aujourd'hui n'était peut-être que "
        "l'ombre d'un garçon : « Où vas-tu ? » demanda-t-elle. Ils étaient là depuis l'été 1793."
    ),
    "German": (
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Über allen Gipfeln ist "
        "Ruh; in allen Wipfeln spürest du kaum einen Hauch. Das Donaudampfschifffahrts-Büro war "
        "schon geschlossen, größer und heißer als im Jahre 1871."
    ),
    "Russian": (
        "Все люди рождаются свободными и равными в своём достоинстве и правах. Все счастливые "
        "семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. Кто-то "
        "спросил: «Который час?» Было 7 часов."
    ),
    "Arabic": (
        "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق، وقد وهبوا عقلاً وضميراً وعليهم أن "
        "يعامل بعضهم بعضاً بروح الإخاء. كان يا ما كان، في قديم الزمان، ١٢ ملكاً."
    ),
    "Hindi": (
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और "
        "अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए। १२ लोग आए।"
    ),
    "Korean": (
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 "
        "천부적으로 이성과 양심을 부여받았으며 서로 형제애의 "
        "정신으로 행동하여야 한다. 1948년 12월 10일에 말했다."
    ),
}
PUBLIC = list(TEXTS.values())


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(PUBLIC, trainer)
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """Like Llama's and Gemma's: ▁ for spaces, and bytes for characters not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "</s>", *fallback], show_progress=False
    )
    # Only ASCII letters get into the vocabulary, so that others are encoded as bytes.
    tokenizer.train_from_iterator([TEXTS["English"].encode("ascii", "ignore").decode()], trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(PUBLIC, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=900, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(PUBLIC, trainer)
    return tokenizer


class Tiktoken:
    """A tiktoken encoding with the ids of a tokenizer of `tokenizers`."""

    def __init__(self, vocabulary: dict[bytes, int]) -> None:
        pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
        special = {"<|end|>": max(vocabulary.values()) + 5}
        self.encoding = tiktoken.Encoding(
            "test", pat_str=pattern, mergeable_ranks=vocabulary, special_tokens=special
        )


def tiktoken_encoding() -> tiktoken.Encoding:
    """Its pattern lets one punctuation mark begin a token of letters, as GPT-4's does."""
    pieces = [piece for piece in token_pieces(byte_level_bpe()) if piece]
    return Tiktoken({piece: rank for rank, piece in enumerate(pieces)}).encoding


TOKENIZERS = {
    make.__name__: make
    for make in (byte_level_bpe, sentencepiece_bpe, unigram, word_piece, tiktoken_encoding)
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


def encode(tokenizer, text: str) -> list[int]:
    encoding = tokenizer.encode(text)
    return encoding if isinstance(encoding, list) else encoding.ids


def classes_by_table(classes: TokenClasses, ids: list[int]) -> list[int]:
    """The class of each token, which depends only on the token before it."""
    states = classes.states()
    after = [classes.classes_after(state) for state in (OUTSIDE_WORD, IN_WORD, AT_JOINER)]
    assigned, state = [], OUTSIDE_WORD
    for token in ids:
        assigned.append(int(after[state][token]))
        state = states[token]
    return assigned


HYPHENS = "-‐‑"


def words_of(text: str) -> list[tuple[int, int]]:
    """(begin, end) of each word or number: Unicode's segments that contain a letter or a digit.

    Unlike in Unicode, hyphens join letters, and other characters than letters and apostrophes do
    not: "e.g" is two words, and so is "1,984".
    """
    segments = [match.span() for match in regex.finditer(r"(?w)\b.+?\b", text, regex.DOTALL)]
    parts: list[tuple[int, int]] = []
    for begin, end in segments:
        for match in regex.finditer(r"[^.,:;٫٬]+", text[begin:end]):
            parts.append((begin + match.start(), begin + match.end()))
    joined: list[tuple[int, int]] = []
    for begin, end in parts:
        if not regex.search(r"[\p{L}\p{Nd}\p{Nl}]", text[begin:end]):
            continue
        last = joined[-1] if joined else None
        between = text[last[1] : begin] if last else ""
        if last and between in [*HYPHENS] and _letters(text, last[1] - 1) and _letters(text, begin):
            joined[-1] = (last[0], end)
        else:
            joined.append((begin, end))
    return joined


def _letters(text: str, index: int) -> bool:
    return regex.match(r"[\p{L}\p{M}\p{Nd}]", text[index]) is not None


def classes_by_text(pieces: list[bytes]) -> list[int]:
    """The class of each token, from the words of the whole text."""
    whole = b"".join(pieces)
    text = whole.decode("utf-8", "replace")
    offset = np.cumsum([0, *(len(character.encode()) for character in text)])
    words = [(offset[begin], offset[end], text[begin]) for begin, end in words_of(text)]
    is_begun = set(offset.tolist())
    assigned, begin = [], 0
    for piece in pieces:
        end = begin + len(piece)
        inside = any(b < begin < e for b, e, _ in words) or begin not in is_begun
        begins = [first for b, _, first in words if begin <= b < end]
        is_start = bool(begins) and not begins[0].isdigit()
        assigned.append(INSIDE if inside else START if is_start else OTHER)
        # It is not known yet whether a letter follows.
        is_joiner = piece.decode("utf-8", "replace") in ("'", "’", *HYPHENS)
        assigned[-1] = OTHER if is_joiner else assigned[-1]
        begin = end
    return assigned


def agreement(tokenizer, ids: list[int]) -> float:
    pieces = token_pieces(tokenizer)
    ids = [i for i in ids if pieces[i] is not None]
    assigned = classes_by_table(TokenClasses.from_tokenizer(tokenizer), ids)
    expected = classes_by_text([pieces[i] or b"" for i in ids])
    return float(np.mean(np.array(assigned) == np.array(expected)))


@pytest.mark.parametrize("language", list(TEXTS))
def test_classes_agree_with_the_words_of_a_text(tokenizer, language):
    ids = encode(tokenizer, TEXTS[language])
    assert len(ids) > 40
    pieces = token_pieces(tokenizer)
    known = [i for i in ids if pieces[i] is not None]
    assigned = classes_by_table(TokenClasses.from_tokenizer(tokenizer), known)
    expected = classes_by_text([pieces[i] or b"" for i in known])
    wrong = [
        (pieces[known[max(n - 1, 0)]], pieces[known[n]], assigned[n], expected[n])
        for n in range(len(known))
        if assigned[n] != expected[n]
    ]
    # One error in a short text may be a byte that letters share with other characters.
    assert len(wrong) <= max(0.005 * len(known), 1), wrong


def test_classes_agree_with_the_words_of_random_tokens(tokenizer):
    """Random tokens make texts that nobody writes."""
    pieces = token_pieces(tokenizer)
    # Random single bytes do not form characters, nor do symbols between letters form words.
    known = [i for i, p in enumerate(pieces) if p and _is_text(p)]
    ids = np.random.default_rng(0).choice(known, 400).tolist()
    assert agreement(tokenizer, ids) >= 0.97


def _is_text(piece: bytes) -> bool:
    try:
        return bool(regex.search(r"[\p{L}\p{Nd}\s]", piece.decode()))
    except UnicodeDecodeError:
        return False


def token_classes(*pieces: str | bytes) -> list[int]:
    """The class of each piece, given those before it."""
    encoded = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    return classes_by_table(TokenClasses.from_pieces([*encoded]), list(range(len(encoded))))


CASES = [
    (["get", "Name"], [START, INSIDE]),
    (["snake", "_case"], [START, INSIDE]),
    (["snake", "_", "case"], [START, INSIDE, INSIDE]),
    ([" don", "'t"], [START, INSIDE]),
    ([" don", "’", "t"], [START, OTHER, INSIDE]),
    ([" '", "tis"], [OTHER, START]),
    ([" -", "x"], [OTHER, START]),
    (["well", "-known"], [START, INSIDE]),
    (["well", "-", "known"], [START, OTHER, INSIDE]),
    (["well", "--", "known"], [START, OTHER, START]),
    ([" 19", "84"], [OTHER, INSIDE]),
    (["19", "-", "84"], [OTHER, OTHER, OTHER]),
    (["3", "rd"], [OTHER, INSIDE]),
    (["GPT", "4"], [START, INSIDE]),
    (["漢字", "漢", "A"], [START, START, START]),
    (["ひらがな", "カタカナ", "。"], [START, START, OTHER]),
    (["สวัส", "ดี", "ครับ"], [START, START, START]),
    (["한국", "어", " 말"], [START, INSIDE, START]),
    (["שלום", " עולם", "ים"], [START, START, INSIDE]),
    (["क", "ि", "त"], [START, INSIDE, INSIDE]),
    (["caf", b"\xc3", b"\xa9", "s"], [START, INSIDE, INSIDE, INSIDE]),
    ([b"\xe6", b"\xbc", b"\xa2"], [START, INSIDE, INSIDE]),
    ([" ", b"\xe2\x80", b"\x9c", "\n\n"], [OTHER, OTHER, INSIDE, OTHER]),
    ([b"\xf0\x9f", b"\x98\x80"], [OTHER, INSIDE]),
    (["\nThe", "(the", ".", " "], [START, START, OTHER, OTHER]),
]


@pytest.mark.parametrize(("pieces", "expected"), CASES)
def test_the_class_of_each_token(pieces, expected):
    assert token_classes(*pieces) == expected


def test_special_tokens_and_ids_without_a_token_are_other(tokenizer):
    pieces, classes = token_pieces(tokenizer), TokenClasses.from_tokenizer(tokenizer)
    absent = [i for i, piece in enumerate(pieces) if piece is None]
    assert absent
    assert not classes.packed_V[absent].any()


def test_one_vocabulary_is_classified_once():
    assert TokenClasses.from_tokenizer(byte_level_bpe()) is TokenClasses.from_tokenizer(
        byte_level_bpe()
    )


def test_a_vocabulary_of_unknown_form_is_refused():
    with pytest.raises(ValueError, match="got object, whose vocabulary is of no known form"):
        TokenClasses.from_tokenizer(object())


MISTRAL = Path(mistral_common.__file__).parent / "data"


@pytest.fixture(scope="module")
def mistral() -> Mistral:
    return Mistral.from_file(str(MISTRAL / "tekken_240911.json"))


def wrapped_as_by_vllm(mistral: Mistral) -> SimpleNamespace:
    return SimpleNamespace(tokenizer=mistral.instruct_tokenizer.tokenizer)


def wrapped_as_by_transformers(mistral: Mistral) -> SimpleNamespace:
    return SimpleNamespace(tokenizer=mistral)


@pytest.mark.parametrize("wrap", [wrapped_as_by_vllm, wrapped_as_by_transformers])
def test_a_tekkenizer_is_read_by_its_bytes_however_it_is_wrapped(mistral, wrap):
    tekkenizer = mistral.instruct_tokenizer.tokenizer
    wrapped = wrap(mistral)
    pieces = token_pieces(wrapped)
    assert len(pieces) == tekkenizer.n_words
    assert {i for i, piece in enumerate(pieces) if piece is None} == tekkenizer.special_ids
    (ing,) = tekkenizer.encode("ing", bos=False, eos=False)
    classes = TokenClasses.from_tokenizer(wrapped)
    assert pieces[ing] == b"ing"
    assert classes.classes_after(IN_WORD)[ing] == INSIDE
    text = "Whoever spells 🎻, 漢字 or naïveté gets them back."
    ids = tekkenizer.encode(text, bos=False, eos=False)
    assert b"".join(pieces[i] or b"" for i in ids).decode() == text


def test_a_sentencepiece_tokenizer_of_mistral_is_read_by_its_spelling():
    inner = Mistral.from_file(str(MISTRAL / "tokenizer.model.v1")).instruct_tokenizer.tokenizer
    vocabulary = {inner.id_to_piece(i): i for i in range(inner.n_words)}
    assert "�" in vocabulary, "else it would not test that a vocabulary may have the character"
    special = [i for i in range(inner.n_words) if inner.is_special(i)]
    pieces = token_pieces(
        SimpleNamespace(tokenizer=inner, get_vocab=lambda: vocabulary, all_special_ids=special)
    )
    ids = inner.encode("Whoever spells 🎻 gets it back.", bos=False, eos=False)
    assert b"".join(pieces[i] or b"" for i in ids) == " Whoever spells 🎻 gets it back.".encode()


@pytest.mark.parametrize("extra", [(), (b"#", b"##", b"###"), (b"</w>",), (b"\xe2\x96\x81",)])
def test_a_vocabulary_of_decoded_text_is_refused(extra):
    """Its tokens' bytes are lost. KimiAudio's tokenizer in vLLM is one."""
    pieces = [piece for piece in token_pieces(byte_level_bpe()) if piece]
    decoded = {piece.decode("utf-8", "replace"): i for i, piece in enumerate((*pieces, *extra))}
    with pytest.raises(ValueError, match="of no known form"):
        token_pieces(SimpleNamespace(get_vocab=lambda: decoded))


def test_a_marker_that_few_tokens_have_is_text():
    words = {f"word{n}": n for n in range(10_000)}
    headings = {"#" * n: 10_000 + n for n in range(1, 9)}
    with pytest.raises(ValueError, match="of no known form"):
        token_pieces(SimpleNamespace(get_vocab=lambda: words | headings))


def test_the_marker_that_most_tokens_have_decides_the_form():
    for make, of in ((byte_level_bpe, "Ġ"), (unigram, "▁"), (word_piece, "##")):
        tokenizer = make()
        vocabulary = tokenizer.get_vocab()
        assert any(of in token for token in vocabulary)
        added = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        slow = SimpleNamespace(get_vocab=vocabulary.copy, all_special_ids=added)
        assert token_pieces(slow) == token_pieces(tokenizer)


def test_a_fourth_class_is_refused():
    with pytest.raises(ValueError, match="accepted: three of each"):
        TokenClasses(np.array([0, 0b1100], np.uint8))


def test_every_piece_of_a_character_has_a_class():
    """No prefix of a UTF-8 character raises, and every continuation of a character is INSIDE."""
    points = [*range(0x80, 0x3000, 37), *range(0x3000, 0x30000, 1009), 0x1F600, 0x10FFFF]
    characters = [chr(p).encode() for p in points if not 0xD800 <= p < 0xE000]
    tails = [character[cut:] for character in characters for cut in range(1, len(character))]
    heads = [character[:cut] for character in characters for cut in range(1, len(character))]
    classes = TokenClasses.from_pieces([*heads, *tails])
    for state in (OUTSIDE_WORD, IN_WORD, AT_JOINER):
        assert (classes.classes_after(state)[len(heads) :] == INSIDE).all()
    assert math.isclose(len(classes.packed_V), len(heads) + len(tails))
