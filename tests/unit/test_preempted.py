"""The store of states of requests that left their slots, which keeps the most recent ones."""

from collections import OrderedDict

import numpy as np
from dftserve_vllm import preempted
from hypothesis import given
from hypothesis import strategies as st

MOST = 4
CALLS = st.lists(st.tuples(st.sampled_from(["put", "take"]), st.sampled_from("abcdefgh")))


@given(CALLS)
def test_the_store_is_a_dictionary_that_drops_the_oldest_entry(calls):
    reference: OrderedDict[str, np.ndarray] = OrderedDict()
    original_most = preempted.MOST
    preempted.MOST = MOST
    try:
        store = preempted._Store[np.ndarray]()
        for number, (call, identity) in enumerate(calls):
            if call == "put":
                state = np.array([number, -number], np.float32)
                store.put(identity, state)
                reference.pop(identity, None)
                reference[identity] = state.copy()
                state[:] = 9  # What was put is a copy.
                if len(reference) > MOST:
                    reference.popitem(last=False)
            else:
                stored, expected = store.take(identity), reference.pop(identity, None)
                assert (stored is None) == (expected is None)
                if stored is not None:
                    np.testing.assert_array_equal(stored, expected)
                    stored[:] = 7  # What is taken is a copy.
    finally:
        preempted.MOST = original_most
