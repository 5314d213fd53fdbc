"""A conversation in the terminal, to try out `diversity`.

    dftserve chat --url http://127.0.0.1:8000/v1
    echo 'Tell me a story.' | dftserve chat --model NAME

`/help` lists the commands.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import click

from dftserve.openai_client import Server
from dftserve.spec import HUMAN, Diversity, parse, parse_json

if TYPE_CHECKING:
    from openai import OpenAI

Asked = Diversity | Literal["human"]
"""What is sent as `diversity`: the server resolves HUMAN."""

COMPARED = (0.0, 0.5, 1.0)
COMMANDS: Mapping[str, str] = {
    "diversity": "NUMBER or OBJECT, such as .7; off; human (the entropy in the model's dft.json); "
    "default (the server's); without an argument, show it",
    "compare": "[MESSAGE]  answer the message at 0, .5 and 1, outside the conversation",
    "again": "send the last message again and replace its answer",
    "system": "[TEXT]  set the system message for what follows",
    "reset": "forget the conversation",
    "help": "show this list",
    "quit": "end the chat, as does the end of the input",
}


@dataclass(frozen=True)
class Command:
    """The command in one line; a line without a slash is a message: the command `say`."""

    name: str
    text: str


@dataclass(frozen=True)
class Turn:
    """One message of the user and the model's answer to it."""

    message: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """What a chat has so far, from which each request is made. Commands replace it by a changed
    one."""

    system: str = ""
    turns: tuple[Turn, ...] = ()
    diversity: Asked | None = None
    """None: the field is not sent, and the server's default applies."""

    def messages(self, message: str) -> list[dict[str, str]]:
        """The request's messages in OpenAI's form, ending with this one."""
        pairs = [("system", self.system)] if self.system else []
        for turn in self.turns:
            pairs += [("user", turn.message), ("assistant", turn.answer)]
        return [{"role": role, "content": text} for role, text in [*pairs, ("user", message)]]


def read_command(line: str) -> Command:
    """Parse one typed line.

    Raises:
        ValueError: a slash that is not followed by one of our commands, or a line that was not
            UTF-8.
    """
    line = line.strip()
    try:
        line.encode()
    except UnicodeEncodeError:
        raise ValueError("this line is not UTF-8, and was not sent; convert the input.") from None
    if not line.startswith("/"):
        return Command("say", line)
    name, _, text = line[1:].partition(" ")
    if name not in COMMANDS:
        accepted = ", ".join(f"/{command}" for command in COMMANDS)
        raise ValueError(f"got /{name}; accepted: {accepted}, or a message.")
    return Command(name, text.strip())


def read_diversity(text: str) -> Asked | None:
    """Parse the argument of `/diversity`; None is the server's default.

    Raises:
        DiversityError: neither one of our words nor a diversity.
    """
    if text == "default":
        return None
    if text == "off":
        return parse(0)
    return HUMAN if text == HUMAN else parse_json(text)


def as_sent(diversity: Asked) -> Any:
    """The field's value in a request."""
    return diversity.as_dict() if isinstance(diversity, Diversity) else diversity


def statistics(report: Any) -> str:
    """One line about an answer's `diversity` object."""
    if report is None:
        return "the server reports no diversity: is the plug-in active? (dftserve doctor)"
    try:
        return _statistics(report)
    except (AttributeError, LookupError, TypeError, ValueError):
        return f"diversity: {report}"


def _statistics(report: Mapping[str, Any]) -> str:
    level, choice = report.get("level"), report["choices"][0]
    effective = report["law"] if level is None else f"{report['law']} {level:g}"
    if choice is None:
        return "off" if level == 0 else f"{effective}, no statistics"
    before, after = choice["mean_entropy_before"], choice["mean_entropy_after"]
    return (
        f"{effective} · entropy {before:.2f} → {after:.2f} nats"
        f" · temperature {choice['mean_temperature']:.2f}"
        f" · {choice['tokens_changed']:.0%} of tokens changed"
    )


def chat(server: Server, *, model: str | None = None, temperature: float | None = None) -> bool:
    """Chat until /quit or the end of the input; returns whether every line succeeded.

    Raises:
        click.ClickException: openai is missing.
        ValueError, ServerError: the key's variable is not set, or no model was named and the
            server names none.
    """
    if importlib.util.find_spec("openai") is None:
        raise click.ClickException("chat needs the openai package: pip install openai")
    model = model or server.models()[0]
    click.secho(f"{model} at {server.url}; /help lists the commands.", dim=True)
    with server.client() as client:
        return Chat(server, client, model, temperature).run(_lines())


class Chat:
    """A conversation with one model, driven by lines."""

    def __init__(
        self, server: Server, client: "OpenAI", model: str, temperature: float | None
    ) -> None:
        self.server = server
        self.client = client
        self.model = model
        self.temperature = temperature
        self.conversation = Conversation()
        self.last: tuple[tuple[Turn, ...], str] | None = None
        """The last message, and the turns before it."""

    def run(self, lines: Iterable[str]) -> bool:
        """Run each line; returns whether all succeeded. Errors are printed to stderr, and the
        conversation continues."""
        all_done = True
        for line in lines:
            try:
                command = read_command(line)
                if command.name == "quit":
                    break
                getattr(self, f"_{command.name}")(command.text)
            except BrokenPipeError:
                raise  # Nobody reads the answers any longer.
            except (ValueError, OSError, RuntimeError) as error:
                click.secho(f"{error}", fg="red", err=True)
                all_done = False
            except KeyboardInterrupt:
                click.secho("\ninterrupted", dim=True, err=True)
                all_done = False
        return all_done

    def _say(self, text: str) -> None:
        if text:
            self._answer(self.conversation.turns, text)

    def _again(self, _: str) -> None:
        turns, message = self._last_message("/again")
        self._answer(turns, message)

    def _answer(self, turns: tuple[Turn, ...], message: str) -> None:
        """Get an answer; unless this fails, it becomes part of the conversation."""
        self.last = turns, message
        conversation = replace(self.conversation, turns=turns)
        answer = self._ask(conversation, message)
        self.conversation = replace(conversation, turns=(*turns, Turn(message, answer)))

    def _compare(self, text: str) -> None:
        turns = self.conversation.turns
        if not text:
            turns, text = self._last_message("/compare")
        for level in COMPARED:
            click.secho(f"diversity {level:g}", bold=True)
            self._ask(replace(self.conversation, turns=turns, diversity=parse(level)), text)

    def _diversity(self, text: str) -> None:
        if text:
            diversity = read_diversity(text)
            self.conversation = replace(self.conversation, diversity=diversity)
        now = self.conversation.diversity
        click.secho(
            f"diversity: {'the server’s default' if now is None else as_sent(now)}", dim=True
        )

    def _system(self, text: str) -> None:
        self.conversation = replace(self.conversation, system=text)

    def _reset(self, _: str) -> None:
        self.conversation = Conversation(self.conversation.system, (), self.conversation.diversity)
        self.last = None

    def _help(self, _: str) -> None:
        for name, text in COMMANDS.items():
            click.echo(f"  /{name:<10} {text}")

    def _last_message(self, command: str) -> tuple[tuple[Turn, ...], str]:
        if self.last is None:
            raise ValueError(f"{command}: there is no message yet; write one first.")
        return self.last

    def _ask(self, conversation: Conversation, message: str) -> str:
        """Stream one answer to the terminal, followed by a line of statistics."""
        diversity = conversation.diversity
        pieces, report = [], None
        with _line_end(), contextlib.closing(self._chunks(conversation, message)) as chunks:
            for chunk in chunks:
                report = (chunk.model_extra or {}).get("diversity") or report
                for choice in chunk.choices:
                    pieces.append(choice.delta.content or "")
                    click.echo(pieces[-1], nl=False)
        # With diversity off there is nothing to report.
        is_asked = not diversity.is_off if isinstance(diversity, Diversity) else bool(diversity)
        if report or is_asked:
            click.secho(statistics(report), dim=True)
        return "".join(pieces)

    def _chunks(self, conversation: Conversation, message: str) -> Generator[Any, None, None]:
        """The chunks of the streamed answer to a message.

        Raises:
            ValueError, ServerError: as `Server.errors`.
            ConnectionError: the answer broke off.
        """
        diversity = conversation.diversity
        messages: Any = conversation.messages(message)
        optional: dict[str, Any] = {}
        if self.temperature is not None:
            optional["temperature"] = self.temperature
        with self.server.errors():
            stream = self.client.chat.completions.create(
                model=self.model,
                messages=messages,
                stream=True,
                extra_body={} if diversity is None else {"diversity": as_sent(diversity)},
                **optional,
            )
            with stream, _breaks():
                yield from stream


@contextlib.contextmanager
def _breaks() -> Iterator[None]:
    """Turn a connection that breaks off while the answer is read into an error of the chat.

    Raises:
        ConnectionError: for an error of the HTTP transport, which some versions of openai let
            through.
    """
    import httpx

    try:
        yield
    except httpx.HTTPError as error:
        raise ConnectionError(f"the answer broke off: {error}") from None


@contextlib.contextmanager
def _line_end() -> Iterator[None]:
    try:
        yield
    finally:
        click.echo()


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        # Bytes, so that a line in another encoding fails alone, whatever the locale is. Not `yield
        # from`, which closes stdin with this generator, at /quit.
        for line in iter(sys.stdin.buffer.readline, b""):
            yield line.decode(errors="surrogateescape")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - adds line editing to input()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("› ")
    click.echo()
