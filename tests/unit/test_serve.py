"""The command that starts a server, and the lifetime of its processes.

The stand-in is a small HTTP server instead of vLLM: only starting and ending are tested.
"""

import json
import os
import shlex
import socket
import sys
import sysconfig
import time
import urllib.request
from contextlib import ExitStack, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dftserve import serve
from dftserve.serve import Launch, launch, running
from dftserve.spec import STYLES_VARIABLE, CheckpointInfo, DiversityError, parse
from tests.local_server import reply, serving

STAND_IN = f"""#!{sys.executable}
import http.server, json, os, signal, subprocess, sys, time

mode = os.environ.get("STAND_IN")
if mode == "dies":
    print("\\n".join(f"line {{i}}" for i in range(100)), flush=True)
    sys.exit(3)
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if mode in ("deaf", "deaf child") else ""
child = subprocess.Popen([sys.executable, "-c", f"import signal, time; {{deaf}} time.sleep(60)"])
print("child", child.pid, flush=True)
if mode == "silent":
    time.sleep(60)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        said = json.dumps({{"argv": sys.argv[1:], "environment": dict(os.environ)}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a `vllm` on PATH and hides the one of this Python; returns the path of its log."""
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(STAND_IN)
    command.chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    monkeypatch.setattr(serve, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(serve, "GRACE_SECONDS", 0.5)  # The child outlives it each time.
    return tmp_path / "log"


def argv_and_environment(server):
    with urllib.request.urlopen(f"{server.url}/anything") as answer:
        return json.load(answer)


def child(log: Path) -> int:
    return int(log.read_text().partition("child ")[2].split()[0])


def is_gone(pid: int) -> bool:
    """Whether the process has ended, even if init has not reaped it yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


# launch


def test_a_styles_folder_is_passed_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "styles").mkdir()
    environment = launch("m", styles="styles").environment
    assert environment == {STYLES_VARIABLE: str(tmp_path / "styles")}
    shown = launch("m", styles=Path("styles")).shell_line()
    assert shown.startswith(f"{STYLES_VARIABLE}={tmp_path / 'styles'} ")
    (tmp_path / "file").touch()
    for wrong in ("file", "nowhere"):
        with pytest.raises(ValueError, match=f"--styles: got '{wrong}'.*dftserve style build"):
            launch("m", styles=wrong)


@given(st.from_regex(r"[a-z0-9-]{1,20}", fullmatch=True), st.lists(words))
def test_the_argv_is_the_model_and_the_unchanged_flags(model, flags):
    command = launch(model, flags)
    assert command.argv[1:] == ("serve", model, *flags)
    assert Path(command.argv[0]).name == "vllm"
    assert command.environment == {}


@given(
    st.lists(words, min_size=1), st.dictionaries(st.from_regex("[A-Z_]+", fullmatch=True), words)
)
def test_a_shell_parses_the_shown_line_to_the_command(argv, environment):
    shown = Launch(tuple(argv), environment).shell_line()
    assert shlex.split(shown) == [*(f"{k}={v}" for k, v in environment.items()), *argv]


@pytest.mark.parametrize("text", ["0.5", "0", '{"law": "budget", "target_entropy": 1.5}'])
def test_a_default_reaches_the_plug_in_as_canonical_json(text):
    environment = launch("m", default_diversity=text).environment
    assert list(environment) == ["DFTSERVE_DEFAULT_DIVERSITY"]
    canonical = environment["DFTSERVE_DEFAULT_DIVERSITY"]
    assert parse(json.loads(canonical)) == parse(json.loads(text))
    assert launch("m", default_diversity=canonical).environment == environment


def test_the_default_can_be_taken_from_the_checkpoint(tmp_path):
    CheckpointInfo(recipe="r", diversity=parse(0.3)).write(tmp_path)
    command = launch(str(tmp_path), default_diversity="checkpoint")
    assert json.loads(command.environment["DFTSERVE_DEFAULT_DIVERSITY"])["level"] == 0.3


def test_the_default_can_be_the_target_entropy_of_the_checkpoint(tmp_path):
    CheckpointInfo(recipe="r", target_entropy=1.25).write(tmp_path)
    environment = launch(str(tmp_path), default_diversity="human").environment
    expected = {"law": "budget", "target_entropy": 1.25}
    assert parse(json.loads(environment["DFTSERVE_DEFAULT_DIVERSITY"])) == parse(expected)
    for entropy in (None, 0.0):
        CheckpointInfo(recipe="r", target_entropy=entropy).write(tmp_path)
        with pytest.raises(ValueError, match=r"diversity human: .* has no target_entropy above 0"):
            launch(str(tmp_path), default_diversity="human")


@pytest.mark.parametrize("text", ["1.5", "half", "null", '{"levle": 1}', "[0.5]", "NaN", ""])
def test_an_invalid_default_is_refused_with_its_option(text):
    with pytest.raises(DiversityError, match="--default-diversity"):
        launch("m", default_diversity=text)


@pytest.mark.parametrize(
    ("field", "value"), [("trace", True), ("group", {"id": "a", "index": 0, "size": 2})]
)
def test_what_only_a_request_can_ask_for_is_refused_as_a_default(tmp_path, field, value):
    """Here, and not only when the server starts."""
    content = {"level": 0.5, field: value}
    CheckpointInfo(recipe="r", diversity=parse(content)).write(tmp_path)
    for model, text in (("m", json.dumps(content)), (str(tmp_path), "checkpoint")):
        with pytest.raises(DiversityError, match=rf"--default-diversity\.{field}: got"):
            launch(model, default_diversity=text)


def test_a_default_whose_canonical_json_the_server_refuses_is_refused():
    """Its escapes make it longer than the text that was given."""
    content = {"dry_multiplier": 1, "dry_sequence_breakers": [f"{n}" + "é" * 60 for n in range(30)]}
    text = json.dumps(content, ensure_ascii=False)
    with pytest.raises(DiversityError, match=r"--default-diversity: got '\d+ characters'"):
        launch("m", default_diversity=text)


def test_a_checkpoint_without_a_default_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a checkpoint folder with a dft\.json"):
        launch("some/model", default_diversity="checkpoint")
    CheckpointInfo(recipe="r").write(tmp_path)
    with pytest.raises(ValueError, match="suggests none"):
        launch(str(tmp_path), default_diversity="checkpoint")
    (tmp_path / "dft.json").write_text('{"recipe": "r", "diversity": 7}')
    with pytest.raises(ValueError, match="from 0 to 1"):
        launch(str(tmp_path), default_diversity="checkpoint")


def test_without_a_vllm_command_the_error_names_what_to_install(stand_in, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="pip install vllm dftserve-vllm"):
        launch("m")


def test_the_engine_of_this_environment_precedes_the_path(stand_in, tmp_path, monkeypatch):
    assert launch("m").argv[0] == str(tmp_path / "bin" / "vllm")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert Path(launch("m").argv[0]).parent == Path(sysconfig.get_path("scripts"))


@pytest.fixture
def without_bf16(tmp_path, monkeypatch):
    """A folder with a model, a vLLM in this environment, no accelerator and a CPU without bf16."""
    command = tmp_path / "vllm"
    command.write_text("")
    command.chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    return folder


def test_a_cpu_without_bfloat16_instructions_serves_in_float32_with_a_warning(without_bf16, caplog):
    command = launch(str(without_bf16), ["--max-model-len", "512"])
    assert command.argv[3:] == ("--max-model-len", "512", "--dtype", "float32")
    assert "--dtype float32" in command.shell_line()
    assert "Give --dtype to choose another" in caplog.text


@pytest.mark.parametrize(
    "flags", [["--dtype", "bfloat16"], ["--dtype=auto"], ["--config", "vllm.yaml"], ["-q", "awq"]]
)
def test_the_users_dtype_is_kept(flags, without_bf16, caplog):
    assert launch(str(without_bf16), flags).argv[3:] == tuple(flags)
    assert not caplog.text


def test_float32_is_chosen_in_no_other_case(without_bf16, tmp_path, monkeypatch):
    def chosen(model: Path | str = without_bf16) -> bool:
        return "float32" in launch(str(model)).argv

    assert chosen()
    assert not chosen("org/model"), "a model that is not here may be quantised"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
        assert not chosen()
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        assert not chosen()
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "nowhere"))
        patch.setenv("PATH", str(tmp_path))
        assert not chosen(), "a vLLM of another environment may have another device"
    (without_bf16 / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert not chosen()


# running


def test_a_server_runs_until_the_end_of_the_block(stand_in):
    with running("org/m", "--seed", "1", log=stand_in, default_diversity="0.5") as server:
        received = argv_and_environment(server)
        port = server.url.removeprefix("http://127.0.0.1:").removesuffix("/v1")
        expected = ["serve", "org/m", "--seed", "1", "--host", "127.0.0.1", "--port", port]
        assert received["argv"] == expected
        assert json.loads(received["environment"]["DFTSERVE_DEFAULT_DIVERSITY"])["level"] == 0.5
        assert server.model == "org/m"
        assert server.pid == os.getpgid(server.pid) != os.getpgid(0)
    assert is_gone(server.pid)
    assert is_gone(child(stand_in))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--served-model-name", "a", "b"], "a"),
        (["--served-model-name=a", "--seed", "1"], "a"),
        (["--served_model_name", "a", "--served-model-name", "b"], "b"),
        (["--served-model-name"], "m"),
    ],
)
def test_the_model_name_is_the_served_name_in_the_flags(stand_in, flags, name):
    with running("m", *flags) as server:
        assert server.model == name


def test_the_error_for_a_dead_server_contains_the_end_of_its_log(stand_in, monkeypatch):
    monkeypatch.setenv("STAND_IN", "dies")
    with pytest.raises(RuntimeError, match="exit code 3") as raised, running("m"):
        pass
    lines = str(raised.value).splitlines()
    assert lines[1:] == [f"line {i}" for i in range(70, 100)]


def test_another_server_on_the_port_is_not_mistaken_for_it(stand_in, monkeypatch):
    """One that took the port first and answers every request with 200."""
    with serving(lambda request: reply(request, 200, b"{}")) as url:
        port = int(url.rpartition(":")[2])
        monkeypatch.setattr(serve, "held_port", lambda: nullcontext(port))
        with (
            pytest.raises(RuntimeError, match=r"(?s)exit code 1 before .*Address already in use"),
            running("m", log=stand_in),
        ):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can hold a port for a server")
def test_a_starting_servers_port_is_given_to_no_other_socket(stand_in, monkeypatch):
    """Each time that the server is asked whether it answers, until it listens."""
    answers, refused = serve._answers, 0

    def bind_and_ask(url: str) -> bool:
        nonlocal refused
        with socket.socket() as other, pytest.raises(OSError, match="already in use"):
            other.bind((serve.HOST, urlsplit(url).port))
        refused += 1
        return answers(url)

    monkeypatch.setattr(serve, "_answers", bind_and_ask)
    with running("m", log=stand_in) as server:
        assert refused
        assert argv_and_environment(server)["argv"][-1] == str(urlsplit(server.url).port)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can hold a port for a server")
def test_held_ports_differ_from_each_other_and_from_free_ones():
    """Without the hold, of 400 draws from the 14,116 ports that Linux draws from, two would be the
    same with a probability of .98 (counting no pair of the last 200)."""
    with ExitStack() as held:
        ports = {held.enter_context(serve.held_port()) for _ in range(200)}
        assert len(ports) == 200
        for _ in range(200):
            with socket.socket() as free:
                free.bind((serve.HOST, 0))
                assert free.getsockname()[1] not in ports


def test_a_server_that_does_not_answer_in_time_is_stopped(stand_in, monkeypatch):
    answers = serve._answers

    def ask_once_it_runs(url: str) -> bool:
        while "\n" not in stand_in.read_text():  # The line with its child.
            time.sleep(0.02)
        return answers(url)

    monkeypatch.setattr(serve, "_answers", ask_once_it_runs)
    environment = {"STAND_IN": "silent"}
    with (
        pytest.raises(RuntimeError, match=r"within 0\.1 s.*\n.*child"),
        running("m", env=environment, log=stand_in, timeout=0.1),
    ):
        pass
    assert is_gone(child(stand_in))


@pytest.mark.parametrize("mode", ["deaf", "deaf child"])
def test_processes_that_ignore_sigterm_are_killed(stand_in, monkeypatch, mode):
    monkeypatch.setattr(serve, "GRACE_SECONDS", 0.5)
    with running("m", env={"STAND_IN": mode}, log=stand_in) as server:
        time.sleep(0.2)  # Until the child ignores SIGTERM.
    assert is_gone(server.pid)
    assert is_gone(child(stand_in))


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError])
def test_an_exception_in_the_block_ends_the_server(stand_in, fault):
    with pytest.raises(fault), running("m", log=stand_in) as server:
        raise fault
    assert is_gone(server.pid)
    assert is_gone(child(stand_in))


@pytest.mark.parametrize("flag", ["--host", "--port=8000", "--uds"])
def test_flags_that_set_the_address_are_refused(flag):
    with pytest.raises(ValueError, match="free loopback port"), running("m", flag):
        pass


def test_an_exported_policy_or_default_applies_only_if_it_is_passed(stand_in, monkeypatch):
    """A server started for measurements follows its requests alone."""
    monkeypatch.setenv("DFTSERVE_POLICY", "policy.yaml")
    monkeypatch.setenv("DFTSERVE_DEFAULT_DIVERSITY", "0.9")
    monkeypatch.setenv("DFTSERVE_STYLES", "styles")
    names = ("DFTSERVE_POLICY", "DFTSERVE_DEFAULT_DIVERSITY", "DFTSERVE_STYLES")
    with running("m") as server:
        environment = argv_and_environment(server)["environment"]
    assert [environment.get(name) for name in names] == [None, None, "styles"]
    with running("m", env={"DFTSERVE_POLICY": "other.yaml"}, default_diversity="0.5") as server:
        environment = argv_and_environment(server)["environment"]
    assert environment["DFTSERVE_POLICY"] == "other.yaml"
    assert json.loads(environment["DFTSERVE_DEFAULT_DIVERSITY"])["level"] == 0.5


@pytest.mark.parametrize(("prefix", "disabled"), [(None, True), ("somewhere", False)])
def test_byte_code_is_written_only_to_a_folder_of_its_own(stand_in, monkeypatch, prefix, disabled):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    added = {"PYTHONPYCACHEPREFIX": str(stand_in.parent / prefix)} if prefix else {}
    with running("m", env=added) as server:
        environment = argv_and_environment(server)["environment"]
    assert ("PYTHONDONTWRITEBYTECODE" in environment) is disabled
    assert environment.items() >= added.items()


@pytest.mark.parametrize(
    "flags", [["--api-key", "sk-1", "sk-2"], ["--api-key=sk-1"], ["--api_key", "sk-1"]]
)
def test_a_key_is_not_shown(flags):
    command = Launch(("vllm", "serve", "m", *flags, "--port", "1"))
    assert "sk-" not in command.shell_line()
    assert command.shell_line().endswith("--port 1")
