"""The chat: its commands, its requests, and faults of the server.

The server of these tests implements only OpenAI's streaming format.
"""

import io
import json
import sys

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dftserve.chat import COMMANDS, Command, read_command, read_diversity, statistics
from dftserve.cli import main
from dftserve.spec import DiversityError, parse
from tests.local_server import reply, serving

REPORT = {
    "law": "gated",
    "level": 0.7,
    "choices": [
        {
            "mean_entropy_before": 0.517,
            "mean_entropy_after": 1.209,
            "mean_temperature": 1.43,
            "tokens_changed": 0.312,
        }
    ],
}
STATISTICS = "gated 0.7 · entropy 0.52 → 1.21 nats · temperature 1.43 · 31% of tokens changed"


# Commands


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("Hello there", Command("say", "Hello there")),
        ("  \n", Command("say", "")),
        ("/again\n", Command("again", "")),
        ("/diversity   .7 ", Command("diversity", ".7")),
        ("/system You are terse.", Command("system", "You are terse.")),
        ("/compare", Command("compare", "")),
    ],
)
def test_a_line_is_a_command_or_a_message(line, command):
    assert read_command(line) == command


@given(st.text().filter(lambda text: not text.strip().startswith("/")))
def test_a_line_without_a_slash_is_a_message(line):
    assert read_command(line) == Command("say", line.strip())


@pytest.mark.parametrize("line", ["/", "/diverse 1", "/Again", "/say x"])
def test_an_unknown_command_is_refused_with_the_known_ones(line):
    with pytest.raises(ValueError, match="accepted: /diversity, ") as raised:
        read_command(line)
    assert all(f"/{name}" in str(raised.value) for name in COMMANDS)


@pytest.mark.parametrize(
    ("text", "diversity"),
    [
        (".7", parse(0.7)),
        ("0.7", parse(0.7)),
        ("1", parse(1)),
        ("off", parse(0)),
        ("default", None),
        ("human", "human"),
        (
            '{"law": "budget", "target_entropy": 1.5}',
            parse({"law": "budget", "target_entropy": 1.5}),
        ),
    ],
)
def test_a_diversity_is_a_number_an_object_or_a_word(text, diversity):
    assert read_diversity(text) == diversity


@pytest.mark.parametrize("text", ["much", "1.5", ".", ".5.5", "[1]", '{"levle": 1}', "NaN"])
def test_an_invalid_diversity_is_refused(text):
    with pytest.raises(DiversityError):
        read_diversity(text)


# Statistics


def test_the_statistics_line_of_an_answer():
    assert statistics(REPORT) == STATISTICS


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (None, "is the plug-in active?"),
        ({**REPORT, "choices": [None]}, "gated 0.7, no statistics"),
        ({"law": "gated", "level": 0, "choices": [None]}, "off"),
        ({**REPORT, "law": "budget", "level": None}, "budget · entropy 0.52"),
        ({"law": "gated"}, "diversity: {'law': 'gated'}"),
        ([1], "diversity: [1]"),
        ({**REPORT, "choices": []}, "diversity: {"),
        ({**REPORT, "level": "much"}, "diversity: {"),
    ],
)
def test_the_statistics_line_of_an_incomplete_report(report, expected):
    assert expected in statistics(report)


# The conversation, with a server


class Server:
    """Answers each chat request with the next of `answers`, then the last; records the requests."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.bodies = []
        self.keys = set()

    def __call__(self, request):
        self.keys.add(request.headers.get("Authorization"))
        if request.path == "/v1/models":
            models = [{"id": "storyteller", "object": "model", "created": 0, "owned_by": "us"}]
            listed = json.dumps({"object": "list", "data": models}).encode()
            reply(request, 200, listed, **{"Content-Type": "application/json"})
            return
        length = int(request.headers["Content-Length"])
        self.bodies.append(json.loads(request.rfile.read(length)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        answer(request)


def chunk(text=None, **more):
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
    content = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    return {**content, "choices": choices, **more}


def stream(*chunks, end=b"data: [DONE]\n\n"):
    """An answer that streams the chunks."""

    def answer(request):
        events = b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks)
        reply(request, 200, events + end, **{"Content-Type": "text/event-stream"})

    return answer


def refuse(status, content):
    return lambda request: reply(request, status, json.dumps(content).encode())


def break_off(request):
    """Half an answer, then the connection is closed."""
    request.send_response(200)
    request.send_header("Content-Type", "text/event-stream")
    request.send_header("Content-Length", "100000")
    request.end_headers()
    request.wfile.write(b"data: " + json.dumps(chunk("Once")).encode() + b"\n\n")
    request.close_connection = True


STORY = stream(chunk("Once "), chunk("upon."), chunk(diversity=REPORT))


def talk(server, *lines, options=(), environment=None, code=0):
    """The output of a conversation in which these lines are typed."""
    return run_chat(server, *lines, options=options, environment=environment, code=code).output


def run_chat(server, *lines, options=(), environment=None, code=0):
    with serving(server) as url:
        result = CliRunner().invoke(
            main,
            ["chat", "--url", f"{url}/v1", *options],
            input="".join(f"{line}\n" for line in lines),
            env=environment,
            catch_exceptions=False,
        )
    assert result.exit_code == code, result.output
    return result


def sent(server):
    """Diversity and messages of each request."""
    return [
        (body.get("diversity"), [message["content"] for message in body["messages"]])
        for body in server.bodies
    ]


def test_an_answer_is_streamed_and_followed_by_its_statistics():
    server = Server(STORY)
    output = talk(server, "/diversity .7", "Tell me.", options=["--temperature", "0.9"])
    assert output.splitlines()[-2:] == ["Once upon.", STATISTICS]
    (body,) = server.bodies
    assert body["model"] == "storyteller"
    assert body["temperature"] == 0.9
    assert parse(body["diversity"]) == parse(0.7)


def test_human_is_sent_as_the_word_and_missing_statistics_cause_a_warning():
    server = Server(STORY, stream(chunk("Yes.")))
    output = talk(server, "/diversity human", "Tell me.", "/diversity", "Well?")
    assert "diversity: human" in output
    assert [body["diversity"] for body in server.bodies] == ["human"] * 2
    assert output.count("is the plug-in active?") == 1


def test_without_a_diversity_none_is_sent_and_there_is_no_warning():
    server = Server(stream(chunk("Yes.")))
    output = talk(server, "Well?", options=["--model", "other"])
    assert output.splitlines()[-1] == "Yes."
    assert server.bodies[0].keys() == {"model", "messages", "stream"}
    assert server.bodies[0]["model"] == "other"


def test_a_server_that_ignores_the_field_causes_a_warning():
    server = Server(stream(chunk("Yes.")))
    output = talk(server, "/diversity 0.5", "Well?", "/diversity off", "Well?")
    assert output.count("is the plug-in active?") == 1


def test_the_conversation_grows_and_again_replaces_its_end():
    server = Server(STORY)
    talk(server, "/system Be brief.", "A", "B", "/diversity 1", "/again", "C", "/reset", "D")
    high = parse(1).as_dict()
    assert sent(server) == [
        (None, ["Be brief.", "A"]),
        (None, ["Be brief.", "A", "Once upon.", "B"]),
        (high, ["Be brief.", "A", "Once upon.", "B"]),
        (high, ["Be brief.", "A", "Once upon.", "B", "Once upon.", "C"]),
        (high, ["Be brief.", "D"]),
    ]


def test_compare_requests_three_levels_outside_of_the_conversation():
    server = Server(STORY)
    output = talk(server, "A", "/compare B", "/compare", "C")
    levels = [parse(level).as_dict() for level in (0, 0.5, 1)]
    assert sent(server) == [
        (None, ["A"]),
        *((level, ["A", "Once upon.", "B"]) for level in levels),
        *((level, ["A"]) for level in levels),
        (None, ["A", "Once upon.", "C"]),
    ]
    headings = [line for line in output.splitlines() if line.startswith("diversity ")]
    assert headings == ["diversity 0", "diversity 0.5", "diversity 1"] * 2


@pytest.mark.parametrize("line", ["/again", "/compare", "/what", "/diversity 7", "/diversity x"])
def test_a_wrong_line_is_refused_and_the_conversation_continues(line):
    server = Server(STORY)
    result = run_chat(server, line, "A", "/quit", "never sent", code=1)
    assert "Once upon." in result.stdout
    assert result.stderr
    assert sent(server) == [(None, ["A"])]


def test_a_pipe_that_goes_on_after_quit_is_left_open(capsys, monkeypatch):
    server = Server(STORY)
    lines = io.TextIOWrapper(io.BytesIO(b"/what\n/quit\nnever sent\n"))
    monkeypatch.setattr(sys, "stdin", lines)
    with serving(server) as url, pytest.raises(SystemExit) as ended:
        main(["chat", "--url", f"{url}/v1"])
    assert ended.value.code == 1
    assert "Traceback" not in capsys.readouterr().err
    assert not lines.closed


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (refuse(400, {"error": {"message": "diversity: got 7", "code": 400}}), "diversity: got 7"),
        (refuse(401, {"error": "Unauthorized"}), "Unauthorized"),
        (refuse(500, ["?"]), "answers 500"),
        (stream(chunk("On"), {"error": {"message": "engine is dead"}}), "engine is dead"),
        (stream(chunk("On"), end=b"data: {half\n\n"), "Expecting property name"),
        (break_off, "closed"),
    ],
)
def test_a_fault_is_shown_unchanged_and_the_conversation_continues(fault, message):
    server = Server(fault, STORY)
    result = run_chat(server, "A", "/again", "B", code=1)
    assert message in result.stderr
    assert message not in result.stdout
    assert sent(server) == [(None, ["A"]), (None, ["A"]), (None, ["A", "Once upon.", "B"])]


def test_help_names_every_command():
    output = talk(Server(STORY), "/help", "/diversity")
    assert all(f"/{name}" in output for name in COMMANDS)
    assert "the server’s default" in output


def test_the_key_comes_from_the_named_variable():
    server = Server(STORY)
    talk(server, "A", options=["--api-key-env", "MY_KEY"], environment={"MY_KEY": "secret\n"})
    assert server.keys == {"Bearer secret"}


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_in_another_encoding_fails_alone(capsys, monkeypatch, errors):
    """Whatever the locale says of the pipe."""
    server = Server(STORY)
    lines = io.TextIOWrapper(io.BytesIO(b"A\ncaf\xe9\nB\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", lines)
    with serving(server) as url, pytest.raises(SystemExit) as ended:
        main(["chat", "--url", f"{url}/v1"])
    assert ended.value.code == 1
    assert "this line is not UTF-8, and was not sent" in capsys.readouterr().err
    assert [messages[-1] for _, messages in sent(server)] == ["A", "B"]


def test_a_closed_output_ends_the_conversation(monkeypatch):
    """The rest of a pipe's lines are not sent: nobody would read the answers."""
    server = Server(STORY)

    echo = click.echo

    def until_the_answer(message=None, *args, nl=True, **kwargs):
        if not nl:
            raise BrokenPipeError
        echo(message, *args, **kwargs)

    monkeypatch.setattr(click, "echo", until_the_answer)
    with serving(server) as url:
        CliRunner().invoke(main, ["chat", "--url", f"{url}/v1"], input="A\nB\nC\n")
    assert len(server.bodies) == 1


# Before the conversation


def start(*options):
    return CliRunner().invoke(main, ["chat", *options], input="A\n")


def test_an_unreachable_server_ends_the_chat_in_one_line():
    with serving(lambda _: None) as url:
        pass
    result = start("--url", url)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: the server at {url}/v1 is unreachable")
    assert len(result.output.splitlines()) == 1


def test_a_server_without_models_requires_a_name():
    empty = json.dumps({"object": "list", "data": []}).encode()
    with serving(lambda request: reply(request, 200, empty)) as url:
        result = start("--url", f"{url}/v1")
    assert result.exit_code == 1
    assert "names no model; name one" in result.output


def test_a_missing_package_is_named_with_its_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    result = start()
    assert result.exit_code == 1
    assert result.output == "Error: chat needs the openai package: pip install openai\n"
