"""The served model whose accuracy is measured, and its sampling settings."""

from dataclasses import dataclass
from typing import Any

from dftserve.openai_client import Server
from dftserve.serve import base_url

TIMEOUT_S = 1200.0


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
    """Else it is asked to continue the text of the question."""
    max_tokens: int | None = None
    """Of an answer; None: what the task says."""

    @property
    def server(self) -> Server:
        return Server(self.url, self.key_variable, timeout_s=TIMEOUT_S)


def find(url: str, model: str | None, key_variable: str | None, **asked: Any) -> Served:
    """The server at a URL, with or without /v1, and its first model where none is named.

    Raises:
        ServerError: it cannot be reached, or fails.
        ValueError: it serves no such model, or does not honour `diversity`, a field that vLLM
            without the plug-in ignores, so that all levels would be one.
    """
    url = base_url(url)
    server = Server(url, key_variable, retries=0, timeout_s=60)
    names = server.models()
    if model is not None and model not in names:
        raise ValueError(f"model: got {model!r}; accepted: {', '.join(names)}.")
    if not (server.capabilities() or {}).get("active"):
        raise ValueError(
            f"{url}: this server does not honour `diversity`: pip install dftserve-vllm beside its "
            "vLLM and restart it; `dftserve doctor --url` says what is wrong."
        )
    return Served(url, model or names[0], key_variable, **asked)
