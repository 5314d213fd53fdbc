"""What the plug-in changes in vLLM beside the field, in a process of its own."""

import subprocess
import sys

SEARCH = """
import numba
from dftserve_vllm import register
register()
from vllm.triton_utils import dispatcher
kept, original, wrapper = lambda: None, object(), object()
kept.kernel = original
dispatcher.kept = kept
dispatcher._rebind_kernels([(original, wrapper)])
assert kept.kernel is wrapper
numba.njit(lambda x: x + 1)(1)
"""


def test_vllms_search_for_kernels_survives_numba_and_still_finds_them():
    """Without the change it ends in an AttributeError, and the engine with it."""
    done = subprocess.run([sys.executable, "-c", SEARCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
