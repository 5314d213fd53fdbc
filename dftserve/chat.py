"""A conversation in the terminal, to hear what `diversity` does.

    dftserve chat --url http://127.0.0.1:8000/v1
    echo 'Tell me a story.' | dftserve chat --model NAME

`/help` lists the commands.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import click

from dftserve.spec import Diversity, parse, parse_json

COMPARED = (0.0, 0.5, 1.0)
COMMANDS: Mapping[str, str] = {
    "diversity": "NUMBER or OBJECT, such as .7; off; default (the server's); nothing shows it",
    "compare": "[MESSAGE]  the same message at 0, .5 and 1, beside the conversation",
    "again": "the last message once more, in place of its answer",
    "system": "[TEXT]  the system message of what follows",
    "reset": "forget the conversation",
    "help": "these lines",
    "quit": "or end of input",
}


@dataclass(frozen=True)
class Command:
    """What one line asks for; a line without a slash is a message: the command `say`."""

    name: str
    text: str


@dataclass(frozen=True)
class Turn:
    said: str
    answered: str


@dataclass(frozen=True)
class Conversation:
    system: str = ""
    turns: tuple[Turn, ...] = ()
    diversity: Diversity | None = None
    """None: nothing is sent, and the server's default holds."""

    def messages(self, said: str) -> list[dict[str, str]]:
        """What the server is asked, in OpenAI's form."""
        pairs = [("system", self.system)] if self.system else []
        for turn in self.turns:
            pairs += [("user", turn.said), ("assistant", turn.answered)]
        return [{"role": role, "content": text} for role, text in [*pairs, ("user", said)]]


def read_command(line: str) -> Command:
    """What one typed line asks for.

    Raises:
        ValueError: a slash and no command of ours.
    """
    line = line.strip()
    if not line.startswith("/"):
        return Command("say", line)
    name, _, text = line[1:].partition(" ")
    if name not in COMMANDS:
        accepted = ", ".join(f"/{command}" for command in COMMANDS)
        raise ValueError(f"got /{name}; accepted: {accepted}, or a message.")
    return Command(name, text.strip())


def read_diversity(text: str) -> Diversity | None:
    """What `/diversity` sets; None is the server's default.

    Raises:
        DiversityError: neither a word of ours nor a diversity.
    """
    if text == "default":
        return None
    if text == "off":
        return parse(0)
    return parse_json(f"0{text}" if text.startswith(".") else text)


def statistics(report: Any) -> str:
    """One line about an answer's `diversity` object."""
    if report is None:
        return "the server said nothing about diversity: is the plug-in active? (dftserve doctor)"
    try:
        return _figures(report)
    except (AttributeError, LookupError, TypeError, ValueError):
        return f"diversity: {report}"


def _figures(report: Mapping[str, Any]) -> str:
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


def chat(
    url: str, *, api_key: str | None = None, model: str | None = None, temperature: float | None
) -> None:
    """Talk until /quit or the end of input.

    Raises:
        click.ClickException: openai is missing, or no model was named and the server names none.
    """
    openai = _openai()
    # The server's error is to be seen as it comes, not after silent retries.
    client = openai.OpenAI(base_url=url, api_key=api_key or "EMPTY", max_retries=0)
    model = model or _first_model(openai, client)
    click.secho(f"{model} at {url}; /help lists the commands.", dim=True)
    Chat(openai, client, model, temperature).run(_lines())


class Chat:
    """A conversation with one model, driven by lines."""

    def __init__(self, openai: Any, client: Any, model: str, temperature: float | None) -> None:
        self.openai = openai
        self.client = client
        self.model = model
        self.temperature = temperature
        self.conversation = Conversation()
        self.last: tuple[tuple[Turn, ...], str] | None = None
        """The last message, and the turns before it."""

    def run(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                command = read_command(line)
                if command.name == "quit":
                    return
                getattr(self, f"_{command.name}")(command.text)
            except (ValueError, OSError, self.openai.OpenAIError) as error:
                click.secho(_as_said(error), fg="red")
            except KeyboardInterrupt:
                click.secho("\ninterrupted", dim=True)

    def _say(self, text: str) -> None:
        if text:
            self._answer(self.conversation.turns, text)

    def _again(self, _: str) -> None:
        turns, said = self._last_message("/again")
        self._answer(turns, said)

    def _answer(self, turns: tuple[Turn, ...], said: str) -> None:
        """An answer that becomes part of the conversation, unless it fails."""
        self.last = turns, said
        asked = replace(self.conversation, turns=turns)
        answered = self._ask(asked, said)
        self.conversation = replace(asked, turns=(*turns, Turn(said, answered)))

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
            f"diversity: {'the server’s default' if now is None else now.as_dict()}", dim=True
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

    def _ask(self, conversation: Conversation, said: str) -> str:
        """Stream one answer to the terminal, and the line about it."""
        diversity = conversation.diversity
        extra = {} if diversity is None else {"diversity": diversity.as_dict()}
        optional = {} if self.temperature is None else {"temperature": self.temperature}
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=conversation.messages(said),
            stream=True,
            extra_body=extra,
            **optional,
        )
        pieces, report = [], None
        with stream, _line_end():
            for chunk in self._chunks(stream):
                report = (chunk.model_extra or {}).get("diversity") or report
                for choice in chunk.choices:
                    pieces.append(choice.delta.content or "")
                    click.echo(pieces[-1], nl=False)
        # An answer to a request that is off has nothing to report.
        if report or not (diversity is None or diversity.is_off):
            click.secho(statistics(report), dim=True)
        return "".join(pieces)

    def _chunks(self, stream: Any) -> Iterator[Any]:
        try:
            yield from stream
        except (ValueError, self.openai.OpenAIError):
            raise
        except Exception as error:  # noqa: BLE001 - some versions let their transport's through
            raise ConnectionError(f"the answer broke off: {error}") from None


@contextlib.contextmanager
def _line_end() -> Iterator[None]:
    try:
        yield
    finally:
        click.echo()


def _openai() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError:
        raise click.ClickException("chat needs the openai package: pip install openai") from None


def _first_model(openai: Any, client: Any) -> str:
    try:
        served = [model.id for model in client.models.list()]
    except openai.OpenAIError as error:
        raise click.ClickException(f"{client.base_url}: {_as_said(error)}") from None
    if not served:
        raise click.ClickException(f"{client.base_url} serves no model; name one with --model.")
    return served[0]


def _as_said(error: Exception) -> str:
    """The server's own message where the error carries one, else the error and its cause."""
    body = getattr(error, "body", None)
    if isinstance(body, Mapping) and "message" in body:
        return str(body["message"])
    if isinstance(body, str) and body not in str(error):
        return f"{error}: {body}"
    return f"{error} ({error.__cause__})" if error.__cause__ else f"{error}"


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("› ")
    click.echo()
