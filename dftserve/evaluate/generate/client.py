"""The model that is measured: where it is served, and how it is asked."""

from dataclasses import dataclass
from typing import Any

from dftserve.serve import base_url


@dataclass(frozen=True)
class Served:
    """A model behind an OpenAI-compatible server."""

    url: str
    """Ends in /v1."""
    model: str
    api_key: str = "EMPTY"
    temperature: float = 1.0
    at_once: int = 16
    is_chat: bool = True
    """Else it is asked to continue the text of the question."""
    max_tokens: int | None = None
    """Of an answer; None: what the task says."""

    def client(self) -> Any:
        """An `openai.OpenAI`."""
        import openai

        return openai.OpenAI(base_url=self.url, api_key=self.api_key, timeout=1200)


def find(url: str, model: str | None, api_key: str | None, **asked: Any) -> Served:
    """The server at a URL, with or without /v1, and its first model where none is named.

    Raises:
        ValueError: it cannot be reached, serves no such model, or does not honour `diversity`,
            a field that vLLM without the plug-in ignores, so that all levels would be one.
    """
    import httpx

    url = base_url(url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(headers=headers, timeout=60) as client:
            models = client.get(f"{url}/models")
            capabilities = client.get(f"{url}/dft/capabilities")
    except httpx.HTTPError as error:
        raise ValueError(f"{url}: {error}; accepted: the address of a running server.") from None
    if models.status_code != 200:
        raise ValueError(f"{url}/models answered {models.status_code}: {models.text[:200]}")
    names = [each["id"] for each in models.json()["data"]]
    if not names or (model is not None and model not in names):
        raise ValueError(f"model: got {model!r}; accepted: {', '.join(names) or 'none served'}.")
    if capabilities.status_code != 200 or not capabilities.json().get("active"):
        raise ValueError(
            f"{url}: this server does not honour `diversity`: pip install dftserve-vllm beside its "
            "vLLM and restart it; `dftserve doctor --url` says what is wrong."
        )
    return Served(url, model or names[0], api_key or "EMPTY", **asked)
