"""A client for OpenAI-compatible servers: the key, the retries, errors that a user can act on.

    server = Server("http://127.0.0.1:8000/v1", key_variable="MY_KEY")
    with server.client() as client, server.errors():
        client.chat.completions.create(…)

Connections, retries and their pauses are left to the `openai` package.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

Item = TypeVar("Item")

KEY = "OPENAI_API_KEY"
NO_KEY = "EMPTY"
"""Sent if there is no key: the package requires one, and vLLM without a key ignores it."""
RETRIES = 4
"""How often a request is sent again after an error that may pass."""
TIMEOUT_S = 600.0
"""For one answer, unless the caller sets another."""


class ServerError(RuntimeError):
    """A server cannot be reached, fails or gives an unexpected answer; the message says what to
    do."""


@dataclass(frozen=True)
class Server:
    """A server's address, and how to call it."""

    url: str
    """As the `openai` package takes it, with /v1."""
    key_variable: str | None = None
    """The environment variable that holds the API key; None: OPENAI_API_KEY, if it is set."""
    retries: int = RETRIES
    """Further attempts, with growing pauses, if the server is busy, fails or is unreachable."""
    timeout_s: float = TIMEOUT_S
    """For one attempt."""
    name: str = "the server"
    """Used in error messages."""
    if_slow: str = "ask less at once, or when it has less to do"
    """Advice in the error message after `timeout_s`."""

    def client(self) -> "OpenAI":
        """A blocking client of the openai package.

        Raises:
            ValueError: the key's variable is not set.
        """
        from openai import OpenAI

        return OpenAI(**self._options())

    def async_client(self) -> "AsyncOpenAI":
        """Raises as `client`."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(**self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "base_url": self.url,
            "api_key": key_of(self.key_variable) or NO_KEY,
            "max_retries": self.retries,
            "timeout": self.timeout_s,
        }

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Convert the package's exceptions in the body to errors that a user can act on.

        Raises:
            ValueError: the server refuses the request (400, 422).
            ServerError: anything else.
        """
        import openai

        at, tried = f"{self.name} at {self.url}", _tried(self.retries + 1)
        try:
            yield
        except openai.APITimeoutError:
            raise ServerError(
                f"{at} did not answer within {self.timeout_s:g} s; {self.if_slow}. {tried}"
            ) from None
        except openai.APIConnectionError as error:
            raise ServerError(
                f"{at} is unreachable ({error.__cause__ or error}); is the server running, and is "
                f"this its address? {tried}"
            ) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise ValueError(f"{at} refuses the request: {_message(error)}") from None
        except openai.AuthenticationError as error:
            raise ServerError(
                f"{at} refuses the API key (401: {_message(error)}); name the environment variable "
                "that holds the right one."
            ) from None
        except openai.RateLimitError as error:
            raise ServerError(
                f"{at} is busy or the account is used up (429: {_message(error)}); ask less at "
                f"once, or later. {tried}"
            ) from None
        except openai.APIStatusError as error:
            raise ServerError(
                f"{at} answers {error.status_code} ({_message(error)}); see its log, and whether "
                "it serves this model."
            ) from None
        except (openai.APIResponseValidationError, ValueError) as error:
            raise self._no_completion(f" ({error})") from None
        except openai.APIError as error:  # In the middle of a stream, after its status.
            raise ServerError(
                f"{at} fails in its answer: {_message(error)}; see its log."
            ) from None
        except openai.OpenAIError as error:
            raise self._no_completion(f" ({error})") from None

    def choices(self, completion: Any) -> list[Any]:
        """The choices of a completion or chat completion.

        Raises:
            ServerError: it has none.
        """
        choices = getattr(completion, "choices", None)
        if not choices:
            raise self._no_completion("")
        return choices

    def _no_completion(self, why: str) -> ServerError:
        return ServerError(
            f"{self.name} at {self.url} did not answer with a completion{why}; does the address "
            "end in /v1?"
        )

    def models(self) -> list[str]:
        """The names of the models that it serves, in its order.

        Raises:
            ValueError, ServerError: as `errors`, or it lists no model.
        """
        with self.client() as client, self.errors():
            # Not parsed: the package's own type fails on an answer of another shape.
            once_more = client.with_options(max_retries=min(self.retries, 1))
            listed: Any = once_more.get("/models", cast_to=object)
        try:
            names = [str(model["id"]) for model in listed["data"]]
        except (KeyError, TypeError):
            names = []
        if not names:
            raise ServerError(
                f"{self.name} at {self.url} names no model; name one, or see {self.url}/models."
            )
        return names

    def capabilities(self) -> Mapping[str, Any] | None:
        """What the server's plug-in reports of itself; None if it has no plug-in.

        Raises:
            ValueError, ServerError: as `errors`.
        """
        import openai

        with self.client() as client, self.errors():
            try:
                answer: Any = client.get("/dft/capabilities", cast_to=object)
            except openai.NotFoundError:
                return None
        return answer if isinstance(answer, Mapping) else None


def key_of(variable: str | None) -> str | None:
    """The API key that an environment variable holds; None: OPENAI_API_KEY's, if it is set.

    Raises:
        ValueError: the named variable holds none, or something that cannot be a key. If it were
            sent, it would end up in an error message.
    """
    key = os.environ.get(variable or KEY, "").strip()
    if not key and variable is None:
        return None
    if not (key and key.isascii() and key.isprintable()):
        raise ValueError(
            f"the environment variable {variable or KEY} holds no API key; accepted: one line of "
            "printable ASCII. Export it first."
        )
    return key


def ask_all(
    server: Server,
    items: Iterable[Item],
    ask: "Callable[[AsyncOpenAI, Item], Awaitable[None]]",
    at_once: int,
) -> None:
    """Run `ask(client, item)` for each item, in order, `at_once` at a time. The first error, or
    Ctrl-C, cancels those that are running.

    Raises:
        ValueError: the key's variable is not set.
        Exception: as `ask` raised it.
    """

    async def every() -> None:
        waiting = iter(items)
        async with server.async_client() as client:

            async def work() -> None:
                for item in waiting:
                    await ask(client, item)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(at_once):
                        group.create_task(work())
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None

    _run(every())


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    # A notebook already runs an event loop in this thread.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _tried(times: int) -> str:
    return "Tried once." if times == 1 else f"Tried {times} times."


def _message(error: Any) -> str:
    """The server's message, shortened."""
    body = error.body
    text = body.get("message", body) if isinstance(body, Mapping) else body or error
    return re.sub(r"\s+", " ", f"{text}")[:300]
