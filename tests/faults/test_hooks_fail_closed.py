"""vLLM is not as the plug-in expects: the field is honoured or refused, never ignored.

Every place where the plug-in meets vLLM (hooks.py lists them) meets every fault of
tests/shim/hook_faults.py. Servers start, requests without the field do not notice, a request with
it gets a 400 that says why.
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

BRIEF = [
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
"""vLLM's class does not have it, and what our change is put around shows only when it is called."""
LIVE = [*(fault for fault in BRIEF if not fault.startswith("_")), ONLY_LIVE]
ASKING = [
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
"""The first takes a style's adapter, which is refused without it; the others mend vLLM itself on a
CPU. The field does not need them."""

Find = Callable[[str], dict]


@pytest.fixture(scope="module")
def find() -> Iterator[Find]:
    """What tests/faults/hooks_driver.py finds under a fault."""
    command = [sys.executable, "-m", "tests.faults.hooks_driver"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None

        def found(fault: str) -> dict:
            print(fault, file=driver.stdin, flush=True)
            return json.loads(driver.stdout.readline())

        yield found
        driver.stdin.close()


def test_without_a_fault_there_is_no_problem(find):
    found = find("")
    assert found["error"] is None
    assert found["problems"] == {}
    assert found["refusal"] is None
    assert found["stock"] == {}
    refused = {name for name, said in found["refused"].items() if said is not None}
    assert refused == {name for name in found["refused"] if name.endswith("beam_search_params")}


def _faults():
    faults = [fault for fault in FAULTS if fault != ONLY_LIVE]
    marks = {fault: () if fault in BRIEF else (pytest.mark.long,) for fault in faults}
    return [pytest.param(fault, marks=marks[fault]) for fault in faults]


@pytest.mark.parametrize("fault", _faults())
def test_a_fault_closes_the_field_and_nothing_else(find, fault, figure):
    found = find(fault)
    hook, _, kind = fault.partition(":")
    figure(
        starts=found["error"] is None,
        stock_unchanged=found.get("stock") == {},
        field="refused" if found.get("refusal") else "honoured",
    )
    assert found["error"] is None, found["error"]
    assert found["stock"] == {}
    if hook in NOT_NEEDED:
        assert found["refusal"] is None
        assert found["in_place"] or _names(found["problems"], hook)
    elif _is_honoured(found, hook, kind):
        assert found["problems"] == {}
    else:
        _check_refused(found, hook, kind)


def _is_honoured(found: dict, hook: str, kind: str) -> bool:
    """The change is there in spite of the fault. With another signature it only looks so, but for
    an app, whose arguments are passed on as they come."""
    is_asked = HOOKS[hook].path == "build_app"
    return found["refusal"] is None and found["in_place"] and (kind != "signature" or is_asked)


def _check_refused(found: dict, hook: str, kind: str) -> None:
    assert _names(found["problems"], hook), found["problems"]
    assert found["refusal"], "the field is ignored"
    if kind == "raises":
        assert INJECTED in found["refusal"]
    for name, said in found["refused"].items():
        assert said is not None, found["refused"]
        assert said.startswith("diversity"), said
        if not name.endswith("beam_search_params"):  # That is refused for its own sake first.
            assert found["refusal"] in said


def _names(problems: dict[str, str] | None, hook: str) -> bool:
    """Whether somebody who reads the problems finds the place."""
    said = json.dumps(problems)
    place = HOOKS[hook]
    return place.module in said or place.path.removesuffix(".__init__") in said


@pytest.mark.long
@pytest.mark.parametrize("fault", LIVE)
def test_a_server_with_a_fault(v1_stock, model_folder, tmp_path, fault, figure):
    plain = [chat_body(seed=seed, max_tokens=16, n=1 + seed % 2) for seed in range(16)]
    paths = [("/v1/chat/completions", body) for body in plain]
    expected = [_said(answer) for answer in gather(v1_stock, paths)]
    env = {"TEST_HOOK_FAULT": fault}
    with engine_running("v1", model_folder, tmp_path, FEW_BLOCKS, env=env) as engine:
        got = [_said(answer) for answer in gather(engine, paths)]
        answers = [post(engine, path, body | {"diversity": 0.5}) for path, body in ASKING]
        findings = doctor.ask(engine.url, KEY)
    same = sum(a == b for a, b in zip(expected, got, strict=True))
    statuses = {answer.status_code for answer in answers}
    figure(requests=len(plain), identical=same, statuses=sorted(statuses))
    assert got == expected
    if statuses == {200}:
        for answer in answers:
            assert None not in answer.json()["diversity"]["choices"]
        assert doctor.exit_code(findings) == 0
    else:
        assert statuses == {400}
        for answer in answers:
            assert answer.json()["error"]["param"] == "diversity"
        told = " ".join(finding.text for finding in findings if finding.state == "error")
        assert _names({"told": told}, fault.partition(":")[0])


def _said(answer) -> dict:
    """All of it but what is new for each request."""
    assert answer.status_code == 200, answer.text
    return {name: value for name, value in answer.json().items() if name not in ("id", "created")}
