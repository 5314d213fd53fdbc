"""The command line: what it passes on, what it refuses, and a fast start."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import dftserve
from dftserve.cli import main
from dftserve.spec import CheckpointInfo, parse
from tests.local_server import reply, serving
from tests.vllm_source import as_wheel, write_vllm

OURS = ("--default-diversity", "--dry-run", "--help")
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"))
flags = words.filter(lambda word: word != "--" and word.partition("=")[0] not in OURS)


def run(*arguments, **more):
    return CliRunner().invoke(main, arguments, **more)


def python(*arguments, **more):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


# Starting


def test_help_imports_neither_torch_nor_vllm():
    code = (
        "import sys; from dftserve.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    result = python("-c", code)
    loaded = set(result.stderr.split())
    assert "Usage:" in result.stdout
    assert "click" in loaded
    assert not loaded & {"torch", "vllm", "numpy", "transformers", "openai", "dftserve_vllm"}


def test_help_is_fast():
    def seconds(*arguments):
        started = time.perf_counter()
        assert python(*arguments).returncode == 0
        return time.perf_counter() - started

    # A ratio, the best of five: a busy machine slows both.
    bare = min(seconds("-c", "pass") for _ in range(5))
    assert min(seconds("-m", "dftserve.cli", "--help") for _ in range(5)) < max(15 * bare, 0.5)


def test_it_runs_as_a_module_under_its_own_name():
    result = python("-m", "dftserve.cli", "--version")
    assert result.stdout == f"dftserve, version {dftserve.__version__}\n"
    assert python("-m", "dftserve.cli", "--help").stdout.startswith("Usage: dftserve ")


def test_every_command_has_help():
    for name in ("serve", "chat", "doctor", "demo"):
        result = run(name, "--help")
        assert result.exit_code == 0
        assert result.output.startswith(f"Usage: main {name}")


# serve


@given(st.lists(flags))
def test_every_other_flag_is_passed_on_unchanged(given_flags):
    result = run("serve", "org/m", *given_flags, "--dry-run")
    assert result.exit_code == 0
    assert shlex.split(result.stderr)[1:] == ["serve", "org/m", *given_flags]
    assert result.stdout == ""


def test_our_options_are_removed_from_vllms():
    result = run(
        "serve", "m", "--seed", "-1", "--default-diversity", "0.5", "-tp", "2", "--dry-run"
    )
    assignment, _, *rest = shlex.split(result.stderr)
    assert rest == ["serve", "m", "--seed", "-1", "-tp", "2"]
    name, _, value = assignment.partition("=")
    assert name == "DFTSERVE_DEFAULT_DIVERSITY"
    assert parse(json.loads(value)) == parse(0.5)


def test_after_two_dashes_everything_is_passed_to_vllm():
    result = run("serve", "m", "--dry-run", "--", "--help")
    assert shlex.split(result.stderr)[1:] == ["serve", "m", "--help"]


def test_the_default_of_the_checkpoint_is_used(tmp_path):
    CheckpointInfo(recipe="r", diversity=parse(0.3)).write(tmp_path)
    result = run("serve", str(tmp_path), "--default-diversity", "checkpoint", "--dry-run")
    assert '"level": 0.3' in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--default-diversity", "7"], "--default-diversity.level: got 7; accepted: a number"),
        (["m", "--default-diversity", "x"], "--default-diversity: got 'x'"),
        (["m", "--default-diversity", "checkpoint"], "a checkpoint folder with a dft.json"),
        (["--port", "8000", "m"], "MODEL first"),
        ([], "Missing argument 'MODEL'"),
    ],
)
def test_invalid_arguments_end_with_code_two(arguments, message):
    result = run("serve", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr


STAND_IN = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([os.getpid(), sys.argv[1:], os.environ["DFTSERVE_DEFAULT_DIVERSITY"]]))
sys.exit(7)
"""


def test_serve_becomes_the_command_that_it_prints(tmp_path):
    command = tmp_path / "vllm"
    command.write_text(STAND_IN)
    command.chmod(0o755)
    # Search only PATH: otherwise the real vllm of this Python would come first.
    code = (
        "import sysconfig; sysconfig.get_path = lambda _: ''\nfrom dftserve.cli import main; main()"
    )
    environment = {**os.environ, "PATH": str(tmp_path)}
    arguments = ["-c", code, "serve", "m", "--seed", "1", "--default-diversity", "1"]
    with subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        stdout, stderr = process.communicate()
    pid, argv, default = json.loads(stdout)
    assert pid == process.pid
    assert argv == ["serve", "m", "--seed", "1"]
    assert parse(json.loads(default)) == parse(1)
    assert process.returncode == 7
    assert shlex.split(stderr) == [
        f"DFTSERVE_DEFAULT_DIVERSITY={default}",
        str(command),
        *argv,
    ]


def test_without_vllm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _: "")
    result = run("serve", "m", env={"PATH": ""})
    assert result.exit_code == 1
    assert "pip install vllm dftserve-vllm" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# doctor


def test_the_doctors_report_and_exit_code():
    result = run("doctor", env={"DFTSERVE_DEFAULT_DIVERSITY": "7"})
    assert result.exit_code == 1
    assert "DFTSERVE_DEFAULT_DIVERSITY.level: got 7" in result.stdout
    listed = json.loads(run("doctor", "--json", env={"DFTSERVE_DISABLE": "1"}).stdout)
    states = {finding["name"]: finding["state"] for finding in listed["findings"]}
    assert states["DFTSERVE_DISABLE"] == "warning"
    assert listed["ok"] == ("error" not in states.values())


def test_the_doctor_also_checks_a_server():
    keys = []

    def answer(request):
        keys.append(request.headers.get("Authorization"))
        reply(request, 401, b"")

    with serving(answer) as url:
        result = run("doctor", "--url", url, "--api-key-env", "K", "--json", env={"K": " secret\n"})
    assert keys == ["Bearer secret"]
    assert result.exit_code == 1
    assert "secret" not in result.output
    assert json.loads(result.stdout)["findings"][-1]["name"] == "server"


def test_a_healthy_server_is_ok_without_a_local_vllm(tmp_path, monkeypatch):
    """As on a laptop, where neither vLLM nor the plug-in is installed."""
    report = {"dftserve": dftserve.__version__, "vllm": "0.32.0", "active": True, "answers": True}
    monkeypatch.setattr("dftserve.doctor.packages.installed", lambda name: None)
    assert run("doctor").exit_code == 1
    with serving(lambda request: reply(request, 200, json.dumps(report).encode())) as url:
        result = run("doctor", "--url", url, "--json")
    assert result.exit_code == 0, result.output
    listed = json.loads(result.stdout)
    states = {finding["name"]: finding["state"] for finding in listed["findings"]}
    assert listed["ok"]
    assert states["vllm"] == states["dftserve-vllm"] == "warning"
    assert states["server"] == "ok"


@pytest.mark.parametrize("option", ["--vllm", "--wheel"])
def test_the_doctor_checks_only_the_given_vllm(tmp_path, option):
    write_vllm(tmp_path, version="0.33.0")
    path = tmp_path if option == "--vllm" else as_wheel(tmp_path)
    result = run("doctor", option, str(path), "--json", env={"DFTSERVE_DEFAULT_DIVERSITY": "7"})
    assert result.exit_code == 0
    assert [finding["name"] for finding in json.loads(result.stdout)["findings"]] == [
        "vllm",
        "hooks",
    ]


def test_the_doctors_exit_code_is_one_only_if_a_required_symbol_is_missing(tmp_path):
    for module, code in (("vllm.triton_utils.dispatcher", 0), ("vllm.exceptions", 1)):
        folder = tmp_path / module
        folder.mkdir()
        write_vllm(folder, version="0.33.0", without=module)
        result = run("doctor", "--vllm", str(folder))
        assert result.exit_code == code
        assert module in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--vllm", ".", "--url", "http://x"], 2, "accepted: one of them"),
        (["--vllm", ".", "--wheel", "a.whl"], 2, "accepted: one of them"),
        (["--vllm", "."], 1, "no vLLM there"),
        (["--wheel", "a.whl"], 2, "not a wheel; accepted: a .whl of vLLM"),
        (["--wheel", "."], 2, "is a directory"),
        (["--vllm", "gone"], 2, "does not exist"),
    ],
)
def test_the_doctor_refuses_invalid_vllm_arguments(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.whl").write_text("no zip")
    result = run("doctor", *arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "localhost"], "--url: got 'localhost'; accepted: http://HOST:PORT"),
        (["--url", "http://x", "--api-key-env", "UNSET"], "UNSET is not set"),
        (
            ["--url", "http://x", "--api-key-env", "ODD"],
            "ODD has non-ASCII or unprintable characters",
        ),
    ],
)
def test_the_doctor_refuses_invalid_server_arguments(arguments, message):
    result = run("doctor", *arguments, env={"UNSET": "", "ODD": "secret\nsecond"})
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "secret" not in result.output


@pytest.mark.parametrize("command", ["chat", "verify"])
def test_an_address_without_http_is_refused_as_it_was_given(command):
    result = run(command, "--url", "127.0.0.1:8000")
    assert result.exit_code == 2
    assert "got '127.0.0.1:8000'; accepted: http://HOST:PORT or https://HOST." in " ".join(
        result.stderr.split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "train.model: got nothing; accepted: a folder, a .gguf file, or a name on the hub"),
        (["empty.yaml"], "empty.yaml: got nothing; accepted: keys and values."),
        (["list.yaml"], "list.yaml: got a list; accepted: keys and values."),
    ],
)
def test_train_refuses_what_lacks_its_settings(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "list.yaml").write_text("- a\n")
    result = run("train", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_the_command_is_installed():
    installed = Path(sys.executable).with_name("dftserve")
    result = subprocess.run([installed, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("dftserve, version")
