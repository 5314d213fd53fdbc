"""A text of a corpus, plain or a conversation, as a model reads it."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from dftserve.corpus.text import Text
from dftserve.targets import conversation
from dftserve.targets.chat_template import special_tokens
from dftserve.targets.conversation import Encoded, Learnt, Spelled, UnfitError
from dftserve.targets.document import Document, beginning


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    spelled: Spelled = "text",
    learnt: Learnt = "all",
) -> Encoded:
    """A text's tokens, and which of them are learnt.

    Args:
        spelled: special tokens in the text: read as `text`, or `keep` as special tokens; `drop`
            leaves the text out.
        learnt: of a conversation, `all` answers or the `last`.

    Raises:
        UnfitError: it is to be left out.
        TemplateError: what a conversation's template raised.
    """
    if text.messages is not None:
        return conversation.encode(
            tokenizer, text.messages, text.tools, spelled=spelled, learnt=learnt
        )
    found = [token for token in special_tokens(tokenizer) if token in text.content]
    if found and spelled == "drop":
        raise UnfitError(f"spells the special token {found[0]}")
    document = encode_text(tokenizer, text.content, spelled=spelled)
    ended = document.tokens_N[-1] == tokenizer.eos_token_id and len(document.tokens_N) > 2
    if not text.ends and ended:
        # A piece that goes on elsewhere does not teach a model to stop.
        document = Document(document.tokens_N[:-1], document.trained_N[:-1])
    noted = found and spelled == "text"
    return Encoded(document, (conversation.READ_AS_TEXT,) if noted else ())


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, spelled: Spelled = "text"
) -> Document:
    """A plain text: behind what the tokenizer itself puts before one, and with its end token.

    The end token is learnt, so it is there even where the tokenizer leaves it to its user; a begin
    token that the tokenizer has and does not write (a chat's first mark, say) is not.

    Raises:
        UnfitError: it has no token.
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
