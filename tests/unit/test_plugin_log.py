"""What the library and the plug-in say reaches vLLM's log."""

import io
import logging

from dftserve_vllm import log


def test_warnings_of_the_library_are_shown_where_vllm_shows_its_own(monkeypatch):
    shown = io.StringIO()
    library, vllm = logging.getLogger("dftserve"), logging.getLogger("vllm")
    # The root logger as it is in vLLM's processes: level ERROR, no handler.
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.ERROR)
    monkeypatch.setattr(vllm, "handlers", [logging.StreamHandler(shown)])
    monkeypatch.setattr(library, "handlers", [])
    levels = library.level, vllm.level
    vllm.setLevel(logging.INFO)
    try:
        log.show_library_messages()
        log.show_library_messages()  # vLLM may load its plug-ins twice.
        logging.getLogger("dftserve.sampling.backends").warning("the kernels fail")
        logging.getLogger("dftserve.sampling.backends").debug("not at vLLM's level")
    finally:
        library.setLevel(levels[0])
        vllm.setLevel(levels[1])
    assert shown.getvalue() == "the kernels fail\n"


def test_a_fault_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(log, "_logged", set())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for _ in range(3):
        with log.logged_once("no figures"):
            raise ValueError("x")
    assert caplog.text.count("no figures") == 1
