"""The codes of an engine's requests between steps, and the stage that samples by them after the
law.

A row of a group is replaced by its token: 0 for the token and -inf elsewhere, so that any sampler
of the engine selects it. The rows of a speculative step are drawn one after another, each
continuing from the tokens drawn for the rows before it; if a draft differs from the drawn token,
the engine rejects it and all drafts after it.

As in `slots.py`, a code is staged until its row's token is accepted: chunks of a prompt and
rejected drafts have no effect. The codes of a preempted request are read from the snapshot of its
last step.

Plain torch on every device. It does not block, and runs only while some row of the batch is still
drawn by its code.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dftserve.sampling.group.codes import Cdf, GroupRow, cut, survivors
from dftserve.sampling.host_copy import HostCopy
from dftserve.sampling.slots import NOTHING_WAITS
from dftserve.sampling.staging import PinnedStaging
from dftserve.sampling.step import Step, chosen_first

Array = np.ndarray[Any, Any]

TOKENS, BASE, BITS, SCALE, TOP_K, TOP_P, MIN_P, CODES = range(8)
"""The columns of a slot's state: the number of accepted tokens, the position of the first waiting
row, and the request's parameters; then pairs of a code and its used bits, first for the accepted
text and then after each waiting row."""
PAIR = 2
CODE, USED = range(PAIR)
"""The columns of such a pair."""

ELEMENTS = 1 << 22
"""Size of the float64 matrix of rows that are drawn at once: 32 MiB, and several such matrices."""


@dataclass(frozen=True)
class CodesSnapshot:
    """All slots' states after one step, on the host."""

    copy: HostCopy

    def read(self, slot: int) -> Array:
        """A copy of one slot's state."""
        return self.copy.array[slot].copy()


class GroupCodes:
    """The codes of up to `slots` requests, each with up to `rows_per_request` rows per step."""

    def __init__(self, slots: int, rows_per_request: int, device: torch.device | str) -> None:
        self._rows_per_request = rows_per_request
        self._closed_X = np.array([0, NOTHING_WAITS, 0, 1, 0, 1, 0, *self._codes(0.0, math.inf)])
        states_SX = np.tile(self._closed_X, (slots, 1))
        self._staging = PinnedStaging(device)
        self._states_SX = self._staging.to_device(states_SX)
        self._changed: dict[int, Array] = {}
        self._cuts: dict[int, bool] = {}
        """For each slot that draws, whether the request has its own cuts."""
        self._draws_S = np.zeros(slots, bool)
        self._watched: CodesSnapshot | None = None
        """The snapshot that is checked for used-up codes once its transfer is complete."""
        self._opened: set[int] = set()
        """Slots opened since that snapshot, which it therefore does not describe."""

    def _codes(self, code: float, used: float) -> list[float]:
        return [code, used] * (1 + self._rows_per_request)

    def open(
        self, slot: int, row: GroupRow, resumed: Array | None = None, produced: int = 0
    ) -> None:
        """Begin a request in a slot.

        Args:
            resumed: its state when it was preempted, from `CodesSnapshot.read`.
            produced: the number of tokens accepted before. If there are some but `resumed` is None,
                the code is unknown, and the engine's sampler takes over.
        """
        code, used = (row.code, 0.0) if produced == 0 else (0.0, math.inf)
        if produced and resumed is not None:
            accepted = min(max(produced - int(resumed[TOKENS]), 0), self._rows_per_request)
            codes_KP = resumed[CODES:].reshape(-1, PAIR)[: 1 + accepted]
            # Once the bits are used up no rows are staged any more, and so the pairs beyond are of
            # earlier steps, or of none.
            if (codes_KP[:, USED] < row.bits).all():
                code, used = codes_KP[-1]
        self.close(slot)
        if used < row.bits:
            own = (row.bits, row.scale, row.top_k, row.top_p, row.min_p)
            state = [produced, NOTHING_WAITS, *own, *self._codes(code, used)]
            self._changed[slot], self._cuts[slot] = np.array(state), row.cuts
            self._draws_S[slot] = True
            self._opened.add(slot)

    def close(self, slot: int) -> None:
        """Stop drawing for a slot, whose request has left it or used up its bits."""
        if self._draws_S[slot]:
            self._draws_S[slot] = False
            self._changed[slot] = self._closed_X
            del self._cuts[slot]

    def draws(self, slots_R: Array) -> Array:
        """bool [R]: for which of these slots the code draws the next token, as far as the host
        knows; remains True for a few steps after the bits are used up."""
        return self._draws_S[slots_R]

    def snapshot(self) -> CodesSnapshot:
        """A copy of all states on the host; from a GPU it is asynchronous."""
        self._flush()
        return CodesSnapshot(HostCopy.of(self._states_SX))

    def _flush(self) -> None:
        """Send the states of slots that were opened or closed, in one copy."""
        if self._changed:
            slots = [float(slot) for slot in self._changed]
            changed_NX = np.column_stack([slots, np.array(list(self._changed.values()))])
            self._changed.clear()
            sent_NX = self._staging.to_device(changed_NX)
            self._states_SX.index_copy_(0, sent_NX[:, 0].long(), sent_NX[:, 1:])

    def draw(self, logits_XV: Tensor, step: Step, most_rows: int) -> CodesSnapshot:
        """Draw the tokens of rows written by the law, in place; rows without a group are unchanged.

        Args:
            logits_XV: float32.
            most_rows: upper limit of the number of the step's rows whose slots draw.

        Returns:
            The states after the step.
        """
        self._flush()
        chosen_N = chosen_first((self._states_SX[:, BITS] > 0)[step.slot_R], most_rows)
        row_N = chosen_N if step.rows_R is None else step.rows_R[chosen_N]
        slot_N, offset_N = step.slot_R[chosen_N], step.offset_R[chosen_N].long()
        begin_N = step.position_R[chosen_N] - offset_N
        state_NX = self._accept(slot_N, begin_N)
        after_NP = state_NX[:, CODES : CODES + PAIR].clone()
        cuts = any(self._cuts.values())
        at_once = max(ELEMENTS // logits_XV.shape[1], 1)
        for first in range(0, len(row_N), at_once):
            part = slice(first, first + at_once)
            cdf = _cdf(logits_XV, row_N[part], state_NX[part], cuts=cuts)
            token_N, after_NP[part] = self._drawn(
                cdf, after_NP, part, offset_N[part], state_NX[part, BITS]
            )
            _write(logits_XV, row_N[part], token_N, cdf)
        self._stage(slot_N, begin_N, offset_N, step.samples_R()[chosen_N], after_NP)
        snapshot = self.snapshot()
        self._close_used(snapshot)
        return snapshot

    def _close_used(self, snapshot: CodesSnapshot) -> None:
        """Close the slots whose bits are used up; the engine's sampler handles them from now on.
        They are found in snapshots whose transfer is complete, so that this does not block."""
        if self._watched is None:
            self._watched = snapshot
            self._opened.clear()
        if self._watched.copy.is_there():
            states_SX, self._watched = self._watched.copy.array, None
            is_used_S = self._draws_S & (states_SX[:, CODES + USED] >= states_SX[:, BITS])
            for slot in np.flatnonzero(is_used_S).tolist():
                if slot not in self._opened:
                    self.close(slot)

    def _accept(self, slot_N: Tensor, begin_N: Tensor) -> Tensor:
        """The slots' states at the step's start, for each row, with the code after the last
        accepted waiting row. They are equal for all rows of a request."""
        state_NX = self._states_SX[slot_N]
        accepted_N = (begin_N - state_NX[:, BASE]).clamp(0, self._rows_per_request)
        codes_NKP = state_NX[:, CODES:].unflatten(1, (-1, PAIR))
        rows_N = torch.arange(len(slot_N), device=slot_N.device)
        code_NP = codes_NKP[rows_N, accepted_N.long()]
        state_NX[:, TOKENS] += accepted_N
        state_NX[:, BASE] = NOTHING_WAITS
        state_NX[:, CODES : CODES + PAIR] = code_NP
        self._states_SX.index_copy_(0, slot_N, state_NX)
        return state_NX

    def _drawn(
        self, cdf: Cdf, codes_NP: Tensor, part: slice, offset_N: Tensor, bits_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The token of each row of a part, -1 if none is drawn, and the code after it.

        `codes_NP`: one pair for each row of the step: the code after the row for rows before the
        part, and the code at the step's start for the others. The rows of a request are adjacent.
        """
        before_NP = codes_NP[part]
        ahead_P = codes_NP[max(part.start - 1, 0)][None]
        token_N, after_NP = torch.full_like(offset_N, -1), before_NP
        for place in range(self._rows_per_request):
            if place:
                row_before_NP = torch.cat((ahead_P, after_NP[:-1]))
                before_NP = torch.where((offset_N == place)[:, None], row_before_NP, before_NP)
            found_N, code_N, taken_N = cdf.pick(before_NP[:, CODE])
            is_drawn_N = cdf.is_valid_R & (before_NP[:, USED] < bits_N)
            next_NP = torch.stack((code_N, before_NP[:, USED] + taken_N), dim=1)
            token_N = torch.where(is_drawn_N, found_N, -1)
            after_NP = torch.where(is_drawn_N[:, None], next_NP, before_NP)
        return token_N, after_NP

    def _stage(
        self, slot_N: Tensor, begin_N: Tensor, offset_N: Tensor, samples_N: Tensor, after_NP: Tensor
    ) -> None:
        codes_SKP = self._states_SX[:, CODES:].unflatten(1, (-1, PAIR))
        codes_SKP[slot_N, 1 + offset_N] = after_NP
        self._states_SX[slot_N, BASE] = torch.where(samples_N, begin_N, NOTHING_WAITS).double()


def _cdf(logits_XV: Tensor, row_N: Tensor, state_NX: Tensor, *, cuts: bool) -> Cdf:
    value_NK, token_NK = survivors(logits_XV, row_N)
    log_p_NK = value_NK * state_NX[:, SCALE, None]
    if cuts:
        log_p_NK = cut(log_p_NK, state_NX[:, MIN_P], state_NX[:, TOP_K], state_NX[:, TOP_P])
    return Cdf.of(log_p_NK, token_NK)


def _write(logits_XV: Tensor, row_N: Tensor, token_N: Tensor, cdf: Cdf) -> None:
    is_drawn_N = token_N >= 0
    if cdf.token_RK.shape[1] < logits_XV.shape[1]:  # The other tokens are -inf already.
        row_D = row_N[is_drawn_N]
        logits_XV[row_D[:, None], cdf.token_RK[is_drawn_N]] = -torch.inf
        logits_XV[row_D, token_N[is_drawn_N]] = 0.0
        return
    only_NV = logits_XV.new_full((len(row_N), logits_XV.shape[1]), -torch.inf)
    only_NV.scatter_(1, token_N.clamp_min(0)[:, None], 0.0)
    logits_XV.index_copy_(0, row_N, torch.where(is_drawn_N[:, None], only_NV, logits_XV[row_N]))
