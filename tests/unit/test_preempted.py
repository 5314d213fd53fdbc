"""What is kept of requests that left their slots: the last ones, each as it was, in one array."""

from collections import OrderedDict

import numpy as np
from dftserve_vllm import preempted
from hypothesis import given
from hypothesis import strategies as st

MOST = 4
CALLS = st.lists(st.tuples(st.sampled_from(["put", "take"]), st.sampled_from("abcdefgh")))


@given(CALLS)
def test_it_is_a_dictionary_that_forgets_what_was_put_first(calls):
    reference: OrderedDict[str, np.ndarray] = OrderedDict()
    with_few = preempted.MOST
    preempted.MOST = MOST
    try:
        kept = preempted._Store[np.ndarray]()
        for number, (call, identity) in enumerate(calls):
            if call == "put":
                state = np.array([number, -number], np.float32)
                kept.put(identity, state)
                reference.pop(identity, None)
                reference[identity] = state.copy()
                state[:] = 9  # What was put is a copy.
                if len(reference) > MOST:
                    reference.popitem(last=False)
            else:
                found, wanted = kept.take(identity), reference.pop(identity, None)
                assert (found is None) == (wanted is None)
                if found is not None:
                    np.testing.assert_array_equal(found, wanted)
                    found[:] = 7  # What is taken is a copy.
    finally:
        preempted.MOST = with_few
