"""Tokenises the texts of a corpus, plain texts and conversations."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from dftserve.corpus.text import Text
from dftserve.targets import conversation
from dftserve.targets.chat_template import special_tokens
from dftserve.targets.conversation import Answers, Encoded, Spelled, UnfitError
from dftserve.targets.document import Document, beginning


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    spelled: Spelled = "text",
    answers: Answers = "all",
) -> Encoded:
    """Tokenise a text and mark the tokens to train on.

    Args:
        spelled: how to read special tokens spelled out in the text: as `text`, or `keep` them as
            special tokens; `drop` leaves the text out.
        answers: which answers of a conversation to train on, `all` or the `last`.

    Raises:
        UnfitError: the text is to be left out.
        TemplateError: the chat template refused the conversation.
    """
    if text.messages is not None:
        return conversation.encode(
            tokenizer, text.messages, text.tools, spelled=spelled, answers=answers
        )
    spelled_tokens = [token for token in special_tokens(tokenizer) if token in text.content]
    if spelled_tokens and spelled == "drop":
        raise UnfitError(f"spells the special token {spelled_tokens[0]}")
    document = encode_text(tokenizer, text.content, spelled=spelled)
    ended = document.tokens_N[-1] == tokenizer.eos_token_id and len(document.tokens_N) > 2
    if not text.ends and ended:
        # Only the last piece of a text ends with the end token.
        document = Document(document.tokens_N[:-1], document.trained_N[:-1])
    noted = spelled_tokens and spelled == "text"
    return Encoded(document, (conversation.READ_AS_TEXT,) if noted else ())


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, spelled: Spelled = "text"
) -> Document:
    """Tokenise a plain text: what the tokenizer puts before a text, the text, and the end token.

    The end token is trained on, so it is added even if the tokenizer does not add it. A begin token
    that the tokenizer has but does not add (the first token of a chat, say) is not.

    Raises:
        UnfitError: fewer than two tokens.
    """
    tokens = tokenizer(
        text, add_special_tokens=False, truncation=False, split_special_tokens=spelled == "text"
    )["input_ids"]
    start = beginning(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens_N = np.array([*start, *tokens, *end], dtype=np.int32)
    if len(tokens_N) < 2:
        raise UnfitError("fewer than two tokens")
    trained_N = np.ones(len(tokens_N), dtype=bool)
    trained_N[:1] = False
    return Document(tokens_N, trained_N)
