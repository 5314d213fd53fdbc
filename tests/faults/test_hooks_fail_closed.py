"""If vLLM differs from what the plug-in expects, the field is honoured or refused, never ignored.

Every hook of the plug-in (hooks.py lists them) is tested with every fault of
tests/shim/hook_faults.py. Servers start, requests without the field are unaffected, and a request
with it gets a 400 with the reason.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from dftserve import doctor
from tests.client import chat_body, gather, post
from tests.conftest import FEW_BLOCKS, KEY, SHIM, engine_running

sys.path.insert(0, str(SHIM))

from hook_faults import FAULTS, HOOKS, INJECTED

IN_MAKE_TEST = [
    "OutputProcessor.process_outputs:moved",
    "ChatCompletionRequest.to_sampling_params:renamed",
    "CompletionRequest.to_sampling_params:signature",
    "ParentRequest.get_child_info:lost",
    "WorkerWrapperBase.execute_model:raises",
    "build_app:decorated",
    "_rebind_kernels:raises",
]
"""One of each kind, for `make test`."""
ONLY_LIVE = "WorkerWrapperBase.sample_tokens:renamed"
"""vLLM's class does not define it, so the fault shows only when the method is called."""
LIVE = [*(fault for fault in IN_MAKE_TEST if not fault.startswith("_")), ONLY_LIVE]
REQUESTS = [
    ("/v1/chat/completions", chat_body(max_tokens=8, n=2)),
    ("/v1/completions", {"model": "demo", "prompt": "Once", "max_tokens": 8}),
    ("/v1/responses", {"model": "demo", "input": "Once", "max_output_tokens": 8}),
]
NOT_NEEDED = (
    "BaseServing._maybe_get_adapters",
    "_rebind_kernels",
    "GPUModelRunner._sample",
    "GPUModelRunner._bookkeeping_sync",
)
"""The field does not need these. The first selects a style's adapter, which is refused without it;
the others fix vLLM itself on a CPU."""

Find = Callable[[str], dict]


@pytest.fixture(scope="module")
def find() -> Iterator[Find]:
    """Returns the findings of tests/faults/hooks_driver.py for a fault."""
    command = [sys.executable, "-m", "tests.faults.hooks_driver"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None

        def findings(fault: str) -> dict:
            print(fault, file=driver.stdin, flush=True)
            return json.loads(driver.stdout.readline())

        yield findings
        driver.stdin.close()


def test_without_a_fault_there_is_no_problem(find):
    findings = find("")
    assert findings["error"] is None
    assert findings["problems"] == {}
    assert findings["refusal"] is None
    assert findings["stock"] == {}
    refused = {name for name, message in findings["refused"].items() if message is not None}
    assert refused == {name for name in findings["refused"] if name.endswith("beam_search_params")}


def _faults():
    faults = [fault for fault in FAULTS if fault != ONLY_LIVE]
    marks = {fault: () if fault in IN_MAKE_TEST else (pytest.mark.long,) for fault in faults}
    return [pytest.param(fault, marks=marks[fault]) for fault in faults]


@pytest.mark.parametrize("fault", _faults())
def test_a_fault_closes_the_field_and_nothing_else(find, fault, record_values):
    findings = find(fault)
    hook, _, kind = fault.partition(":")
    record_values(
        starts=findings["error"] is None,
        stock_unchanged=findings.get("stock") == {},
        field="refused" if findings.get("refusal") else "honoured",
    )
    assert findings["error"] is None, findings["error"]
    assert findings["stock"] == {}
    if hook in NOT_NEEDED:
        assert findings["refusal"] is None
        assert findings["in_place"] or _names(findings["problems"], hook)
    elif _is_honoured(findings, hook, kind):
        assert findings["problems"] == {}
    else:
        _check_refused(findings, hook, kind)


def _is_honoured(findings: dict, hook: str, kind: str) -> bool:
    """The hook is in place despite the fault. With another signature it only looks so, except for
    build_app, whose arguments are passed on unchanged."""
    is_app = HOOKS[hook].path == "build_app"
    return findings["refusal"] is None and findings["in_place"] and (kind != "signature" or is_app)


def _check_refused(findings: dict, hook: str, kind: str) -> None:
    assert _names(findings["problems"], hook), findings["problems"]
    assert findings["refusal"], "the field is ignored"
    if kind == "raises":
        assert INJECTED in findings["refusal"]
    for name, message in findings["refused"].items():
        assert message is not None, findings["refused"]
        assert message.startswith("diversity"), message
        if not name.endswith("beam_search_params"):  # Beam search itself is refused first.
            assert findings["refusal"] in message


def _names(problems: dict[str, str] | None, hook: str) -> bool:
    """Whether the problems name the hooked module or function."""
    text = json.dumps(problems)
    hooked = HOOKS[hook]
    return hooked.module in text or hooked.path.removesuffix(".__init__") in text


@pytest.mark.long
@pytest.mark.parametrize("fault", LIVE)
def test_a_server_with_a_fault(v1_stock, model_folder, tmp_path, fault, record_values):
    plain = [chat_body(seed=seed, max_tokens=16, n=1 + seed % 2) for seed in range(16)]
    paths = [("/v1/chat/completions", body) for body in plain]
    expected = [_content(answer) for answer in gather(v1_stock, paths)]
    env = {"TEST_HOOK_FAULT": fault}
    with engine_running("v1", model_folder, tmp_path, FEW_BLOCKS, env=env) as engine:
        got = [_content(answer) for answer in gather(engine, paths)]
        answers = [post(engine, path, body | {"diversity": 0.5}) for path, body in REQUESTS]
        findings = doctor.ask(engine.url, KEY)
    same = sum(a == b for a, b in zip(expected, got, strict=True))
    statuses = {answer.status_code for answer in answers}
    record_values(requests=len(plain), identical=same, statuses=sorted(statuses))
    assert got == expected
    if statuses == {200}:
        for answer in answers:
            assert None not in answer.json()["diversity"]["choices"]
        assert doctor.exit_code(findings) == 0
    else:
        assert statuses == {400}
        for answer in answers:
            assert answer.json()["error"]["param"] == "diversity"
        errors = " ".join(finding.text for finding in findings if finding.state == "error")
        assert _names({"errors": errors}, fault.partition(":")[0])


def _content(answer) -> dict:
    """An answer without the members that differ for each request."""
    assert answer.status_code == 200, answer.text
    return {name: value for name, value in answer.json().items() if name not in ("id", "created")}
