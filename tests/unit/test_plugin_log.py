"""Messages of the library and the plug-in reach vLLM's log."""

import io
import logging

import pytest
from dftserve_vllm import log


@pytest.mark.parametrize("root_handlers", [[], [logging.StreamHandler(io.StringIO())]])
def test_library_warnings_are_shown_once_in_vllms_log(monkeypatch, root_handlers):
    shown = io.StringIO()
    vllm = logging.getLogger("vllm")
    # As in vLLM's processes, the root logger and its handlers have the level ERROR.
    monkeypatch.setattr(logging.root, "handlers", root_handlers)
    monkeypatch.setattr(logging.root, "level", logging.ERROR)
    for handler in root_handlers:
        handler.setLevel(logging.ERROR)
    monkeypatch.setattr(vllm, "handlers", [logging.StreamHandler(shown)])
    level = vllm.level
    vllm.setLevel(logging.INFO)
    try:
        log.show_library_messages()
        log.show_library_messages()  # vLLM may load its plug-ins twice.
        logging.getLogger("dftserve.sampling.backends").warning("the kernels fail")
        logging.getLogger("dftserve.sampling.backends").debug("not at vLLM's level")
    finally:
        vllm.setLevel(level)
    assert shown.getvalue() == "the kernels fail\n"
    assert all(not handler.stream.getvalue() for handler in root_handlers)


def test_a_fault_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(log, "_logged", set())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for _ in range(3):
        with log.logged_once("no statistics"):
            raise ValueError("x")
    assert caplog.text.count("no statistics") == 1
