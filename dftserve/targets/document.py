"""Tokenised texts, with marks for the tokens to train on.

Shapes: N tokens of a document, T trained positions among them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dftserve.hub import folder_of
from dftserve.model_folder import check_model_folder


@dataclass(frozen=True, eq=False)
class Document:
    """A tokenised text."""

    tokens_N: np.ndarray
    """int32."""
    trained_N: np.ndarray
    """bool: the tokens to train on. Never the first, which has nothing before it."""
    group: str = ""
    """An identifier shared by documents of one text, of its copies, or of answers to one prompt;
    empty: it belongs to no group. Not saved in a store."""
    has_prompt: bool = False
    """Whether it is a conversation, so that the tokens before its first trained one are a prompt
    that other documents may share. Not saved in a store."""

    def __post_init__(self) -> None:
        if len(self.tokens_N) < 2 or self.tokens_N.shape != self.trained_N.shape:
            raise ValueError(
                f"a document of {self.tokens_N.shape} tokens and {self.trained_N.shape} marks; "
                "accepted: two tokens or more, and a mark for each."
            )
        if self.trained_N[0]:
            raise ValueError("the first token of a document is marked as trained; it cannot be.")

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return int(np.count_nonzero(self.trained_N))

    @property
    def positions_T(self) -> np.ndarray:
        """int64: positions of the trained tokens; each is predicted from all tokens before it.

        Recomputed at each access: cached, it would take 8 of 13 bytes per token in memory.
        """
        return np.flatnonzero(self.trained_N)

    @property
    def labels_T(self) -> np.ndarray:
        """int32: the trained tokens."""
        return self.tokens_N[self.positions_T]

    def window(self, start: int, stop: int) -> "Document":
        """Tokens `start` to `stop`; the first serves only as context."""
        trained_N = self.trained_N[start:stop].copy()
        trained_N[0] = False
        has_prompt = self.has_prompt and start == 0
        return Document(self.tokens_N[start:stop], trained_N, self.group, has_prompt)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first trained one."""
        first = int(self.trained_N.argmax())  # 0 where none is trained.
        return tuple(self.tokens_N[:first].tolist())

    @property
    def digest(self) -> bytes:
        """BLAKE3 of the tokens and their marks."""
        content = self.tokens_N.astype(np.int32).tobytes() + self.trained_N.tobytes()
        return blake3(content).digest()

    @property
    def tokens_digest(self) -> bytes:
        """BLAKE3 of the tokens alone."""
        return blake3(self.tokens_N.astype(np.int32).tobytes()).digest()

    @property
    def identifier(self) -> bytes:
        """Of the group; of the document, if it belongs to none."""
        return self.group.encode() if self.group else self.digest

    @property
    def question(self) -> tuple[str, tuple[int, ...]]:
        """A key that is equal for documents that answer the same prompt, if they have one.

        It includes the group, which is always within one split: a chat template may render
        different questions to the same tokens.
        """
        return self.group, self.prompt


def spans(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of windows that cover `count` tokens, each of 2 to `size` tokens.

    Consecutive windows share one token: the last of one is the context of the next, so each token
    but the first is predicted once.
    """
    for start in range(0, count - 1, size - 1):
        yield start, min(start + size, count)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, given by its folder or by its name on a hub.

    Raises:
        ValueError: no such folder or name, no tokenizer in it, or files that `model_folder`
            refuses.
    """
    folder = folder_of(model)
    check_model_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Config classes, which validate config.json, raise any kind.
        why = " ".join(str(error).split())[:200]
        if "trust_remote_code" in why:
            why = "it needs code of its own (auto_map), which dftserve never runs"
        raise ValueError(
            f"model: got {model!r}: no tokenizer that can be loaded ({why}); accepted: a "
            "folder with a tokenizer.json, or a model's name where there is a hub."
        ) from error


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer's post-processor puts before a text, such as a begin token."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = (n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
    return list(whole[: next(starts, 0)])
