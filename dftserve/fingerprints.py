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


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
