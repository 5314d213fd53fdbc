"""The model behind a server: its name, its weights where they are known, and the settings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve.hub import folder_of, weights_digest
from dftserve.openai_client import Server, ServerError
from dftserve.serve import base_url

TIMEOUT_S = 1200.0
"""For one answer; many are requested at once."""


@dataclass(frozen=True)
class Served:
    """A model behind an OpenAI-compatible server."""

    url: str
    """Ends in /v1."""
    model: str
    key_variable: str | None = None
    """The environment variable that holds the API key; None: OPENAI_API_KEY, where it is set."""
    temperature: float = 1.0
    at_once: int = 16
    is_chat: bool = True
    """Whether to use chat completions; else the model continues the text of the question."""
    max_tokens: int | None = None
    """Per answer; None: set by the task."""

    @property
    def server(self) -> Server:
        return Server(self.url, self.key_variable, timeout_s=TIMEOUT_S)


def weights_of(model: str, say: Callable[[str], object]) -> str | None:
    """Identifies a checkpoint's weights: a digest of those in a folder, or the commit of a model on
    the hub. None if neither is available; the reason goes to `say`."""
    try:
        return weights_digest(Path(model)) if Path(model).is_dir() else folder_of(model).name
    except (ValueError, OSError) as error:
        say(f"{model}: its weights cannot be identified ({f'{error}'.rstrip('.')}).")
        return None


def first_model(server: Server, kept: str | None, say: Callable[[str], object]) -> str:
    """The name of the first model that a server serves now.

    Args:
        kept: the model whose answers are complete, so that no server is needed; it is returned if
            the server fails, with a message to `say`. None: answers are missing.

    Raises:
        ValueError: no API key where one was named.
        ServerError: the server cannot be reached, or fails, and answers are missing.
    """
    try:
        return server.models()[0]
    except ServerError as error:
        if kept is None:
            raise
        say(f"{error} Whether it still serves {kept} is not known; its answers are there.")
        return kept


def find(url: str, model: str | None, key_variable: str | None, **asked: Any) -> Served:
    """The server at a URL, with or without /v1, and its first model if none is named.

    Raises:
        ServerError: it cannot be reached, or fails.
        ValueError: it does not serve the model, or does not honour `diversity`, a field that vLLM
            without the plug-in ignores, so that all levels would be the same.
    """
    url = base_url(url)
    server = Server(url, key_variable, retries=0, timeout_s=60)
    names = server.models()
    if model is not None and model not in names:
        raise ValueError(f"model: got {model!r}; accepted: {', '.join(names)}.")
    if not (server.capabilities() or {}).get("active"):
        raise ValueError(
            f"{url}: this server does not honour `diversity`: pip install dftserve-vllm next to "
            "its vLLM and restart it; `dftserve doctor --url` says what is wrong."
        )
    return Served(url, model or names[0], key_variable, **asked)
