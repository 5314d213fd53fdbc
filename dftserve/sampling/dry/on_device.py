"""Repeated sequences in texts on the logits' device: the same as `repeats`, for many rows at once
and without blocking, since the host does not know the tokens yet."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dftserve.sampling.dry.breaker_sets import BreakerSets
from dftserve.sampling.dry.repeats import HISTORY, MAX_PENALTY, DryControls
from dftserve.sampling.staging import PinnedStaging
from dftserve.sampling.step import Penalties, Texts, chosen_first

ELEMENTS = 1 << 22
"""Number of text tokens processed at once; with about 50 bytes of temporaries each, 200 MB."""

COLUMNS = 5
MULTIPLIER, BASE, ALLOWED_LENGTH, LONGEST, SET = range(COLUMNS)


@dataclass(frozen=True)
class _Sent:
    """The DRY parameters of all slots, on the device."""

    numbers_SC: Tensor
    """float64; the multiplier is 0 for a slot without DRY, and SET is an index into `breaks_BX`."""
    breaks_BX: Tensor
    """uint8, sets of breakers, one bit for each token, lowest bit first."""


@dataclass(frozen=True)
class DevicePenalties:
    """The penalties of a step's rows, computed lazily in parts."""

    texts: Texts
    slot_R: Tensor
    offset_R: Tensor
    place_P: Tensor
    width: int
    """Tokens at the end of each text that are searched."""
    longest: int
    """Match length above which no penalty changes."""
    sent: _Sent

    def __iter__(self) -> Iterator[Penalties]:
        for place_P in self.place_P.split(max(ELEMENTS // self.width, 1)):
            yield self._of(place_P)

    def _of(self, place_P: Tensor) -> Penalties:
        numbers_PC = self.sent.numbers_SC[self.slot_R[place_P]]
        window_PW = _windows(self.texts, self.slot_R, self.offset_R, place_P, self.width)
        breaks_PW = _breaks(window_PW, self.sent.breaks_BX, numbers_PC[:, SET].long())
        nats_PK = _nats(window_PW, breaks_PW, numbers_PC[:, :SET].float(), self.longest)
        return Penalties(window_PW[:, 1:].clamp_min(0), nats_PK, place_P)


class SlotRepeats:
    """DRY parameters of an engine's requests, at most one per slot. Changed slots, and new sets of
    breakers, are sent to the device in one copy each before the next step with DRY."""

    def __init__(
        self, slots: int, device: torch.device | str, staging: PinnedStaging | None = None
    ) -> None:
        self._staging = staging or PinnedStaging(device)
        self._no_dry_C = np.array([0.0, 1.0, 1.0, 1.0, 0.0])
        self._numbers_SC = self._staging.to_device(np.tile(self._no_dry_C, (slots, 1)))
        self._changed: dict[int, NDArray[np.float64]] = {}
        self._sets = BreakerSets(self._staging)
        self._has_S = np.zeros(slots, bool)
        self._longest_S = np.zeros(slots, np.int64)

    def put(self, slot: int, dry: DryControls) -> None:
        self.clear(slot)
        numbers = dry.multiplier, dry.base, dry.allowed_length, dry.longest
        self._changed[slot] = np.array([*numbers, self._sets.take(slot, dry.breaks_V)])
        self._has_S[slot], self._longest_S[slot] = True, dry.longest

    def clear(self, slot: int) -> None:
        if self._has_S[slot]:
            self._has_S[slot] = False
            self._sets.leave(slot)
            self._changed[slot] = self._no_dry_C

    def has(self, slots_R: np.ndarray) -> np.ndarray:
        """bool [R]: which of these slots have DRY."""
        return self._has_S[slots_R]

    def penalties(
        self,
        texts: Texts,
        slot_R: Tensor,
        offset_R: Tensor,
        *,
        slots: np.ndarray,
        most_rows: int,
        longest_text: int = HISTORY,
    ) -> "DevicePenalties":
        """The penalties of each row. A token may occur more than once; its largest penalty applies.

        Args:
            texts: used as a whole, regardless of where the answer begins.
            slot_R, offset_R: of the step's rows.
            slots: the step's slots that have DRY, on the host.
            most_rows: upper limit of the number of rows with DRY, whose indices the host may not
                know.
            longest_text: upper limit of the length of these rows' texts, in tokens.
        """
        sent = self._on_device()
        has_dry_R = sent.numbers_SC[:, MULTIPLIER][slot_R] > 0
        return DevicePenalties(
            texts,
            slot_R,
            offset_R,
            chosen_first(has_dry_R, most_rows),
            width=max(min(longest_text, HISTORY, texts.tokens_SL.shape[1]), 2),
            longest=int(self._longest_S[slots].max()),
            sent=sent,
        )

    def _on_device(self) -> _Sent:
        if self._changed:
            slots = [float(slot) for slot in self._changed]
            changed_NX = np.column_stack([slots, np.array(list(self._changed.values()))])
            self._changed.clear()
            sent_NX = self._staging.to_device(changed_NX)
            self._numbers_SC.index_copy_(0, sent_NX[:, 0].long(), sent_NX[:, 1:])
        return _Sent(self._numbers_SC, self._sets.on_device())


def _windows(texts: Texts, slot_R: Tensor, offset_R: Tensor, place_P: Tensor, width: int) -> Tensor:
    """int64 [P, W]: the W tokens that precede each row's, in text order; −1 before the text begins.
    The last token and the drafts before it are this step's inputs."""
    back_W = torch.arange(width - 1, -1, -1, device=slot_R.device)
    at_PW = texts.at_R[place_P, None] - back_W
    slot_P1 = slot_R[place_P, None]
    known_PW = texts.tokens_SL[slot_P1, at_PW.clamp(0, texts.tokens_SL.shape[1] - 1)]
    input_PW = texts.input_R[(place_P[:, None] - back_W).clamp_min(0)]
    token_PW = torch.where(back_W <= offset_R[place_P, None], input_PW, known_PW)
    return torch.where(at_PW >= 0, token_PW, -1).long()


def _breaks(window_PW: Tensor, breaks_BX: Tensor, set_P: Tensor) -> Tensor:
    """bool [P, W]: whether each token is in the row's set of breakers."""
    is_known_PW = (window_PW >= 0) & (window_PW < 8 * breaks_BX.shape[1])
    token_PW = torch.where(is_known_PW, window_PW, 0)
    byte_PW = breaks_BX[set_P[:, None], token_PW >> 3]
    return is_known_PW & ((byte_PW >> (token_PW & 7)) & 1).bool()


def _nats(window_PW: Tensor, breaks_PW: Tensor, numbers_P4: Tensor, longest: int) -> Tensor:
    """float32 [P, W − 1]: the penalty of the token after each position; 0 for none."""
    multiplier_P1, base_P1, allowed_P1, longest_P1 = numbers_P4.split(1, dim=1)
    width = window_PW.shape[1]
    alive_PK = (window_PW[:, :-1] == window_PW[:, -1:]) & ~breaks_PW[:, -1:]
    length_PK = alive_PK.float()
    for back in range(1, min(longest, width)):
        # Compares the token `back` before position i with the token `back` before the last one.
        same_PK = window_PW[:, : width - 1 - back] == window_PW[:, width - 1 - back, None]
        same_PK &= ~breaks_PW[:, width - 1 - back, None] & (back < longest_P1)
        alive_PK[:, back:] &= same_PK
        alive_PK[:, :back] = False
        length_PK += alive_PK
    nats_PK = multiplier_P1 * base_P1 ** (length_PK - allowed_P1).clamp_min(0.0)
    counts_PK = (length_PK >= allowed_P1) & ~breaks_PW[:, 1:] & (window_PW[:, 1:] >= 0)
    return torch.where(counts_PK, nats_PK.clamp_max(MAX_PENALTY), 0.0)
