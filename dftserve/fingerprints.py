"""What decides how a model reads text, in one word each: its tokenizer, its chat template.

Standard library only: a tokenizer is looked at, not loaded.
"""

import hashlib
import json
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides a text's tokens: vocabulary, merges, special tokens.

    Args:
        tokenizer: of `transformers`, fast or slow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = (
        json.loads(backend.to_str())
        if backend is not None
        else sorted(tokenizer.get_vocab().items())
    )
    if isinstance(core, dict):
        # How one call pads and cuts is not what the tokenizer is.
        core = {name: core[name] for name in core if name not in ("truncation", "padding")}
    specials = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return _digest([core, specials])


def template_fingerprint(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template; None where there is none."""
    return _digest(tokenizer.chat_template) if tokenizer.chat_template else None


def mismatch(
    built: str,
    *,
    tokenizer: tuple[str, str],
    template: tuple[str | None, str | None],
    vocabulary: tuple[int, int],
) -> str | None:
    """Why something that was built with one model's tokenizer cannot be used with another model;
    None if it can.

    Args:
        built: what was built, as the message names it.
        tokenizer, template, vocabulary: what it was built with, and what the model has. A template
            of None: it does not depend on one.
    """
    ours, models = tokenizer
    if ours != models:
        return (
            f"{built} was built with another tokenizer ({ours[:12]}…) than the model's "
            f"({models[:12]}…); build one with the model's."
        )
    if template[0] not in (None, template[1]):
        return (
            f"{built} was built with another chat template than the model's; build one with the "
            "model's."
        )
    largest, columns = vocabulary[0] - 1, vocabulary[1]
    if largest >= columns:
        return (
            f"{built} has token ids up to {largest}; the model has {columns} columns of logits. "
            "Build one with the model's tokenizer."
        )
    return None


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
