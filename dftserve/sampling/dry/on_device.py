"""Repeated sequences of texts that lie on the logits' device: `repeats`, for many rows at once and
without a wait, since the host does not know the tokens yet."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dftserve.sampling.dry.repeats import HISTORY, MAX_PENALTY, DryControls
from dftserve.sampling.staging import PinnedStaging
from dftserve.sampling.step import Penalties, Texts, chosen_first

ELEMENTS = 1 << 22
"""Tokens of texts that are looked at at once, at some 46 bytes each for all that is made of them:
193 MB."""

NUMBERS = 4
MULTIPLIER, BASE, ALLOWED_LENGTH, LONGEST = range(NUMBERS)


@dataclass(frozen=True)
class _Sent:
    """Of all slots, on the device."""

    numbers_S4: Tensor
    """float32; multiplier 0 where a slot has no DRY."""
    set_S: Tensor
    """int64: each slot's breakers, a row of `breaks_BV`."""
    breaks_BV: Tensor
    """bool; the last column is False, for tokens that are in no set."""


@dataclass(frozen=True)
class DevicePenalties:
    """The penalties of a step's rows in parts, each made when it is asked for."""

    texts: Texts
    slot_R: Tensor
    offset_R: Tensor
    place_P: Tensor
    width: int
    """Of a text's end that is looked at, in tokens."""
    longest: int
    """Tokens of a match that change a penalty, at most."""
    sent: _Sent

    def __iter__(self) -> Iterator[Penalties]:
        for place_P in self.place_P.split(max(ELEMENTS // self.width, 1)):
            yield self._of(place_P)

    def _of(self, place_P: Tensor) -> Penalties:
        sent, slot_P = self.sent, self.slot_R[place_P]
        window_PW = _windows(self.texts, self.slot_R, self.offset_R, place_P, self.width)
        nats_PK = _nats(
            window_PW, sent.numbers_S4[slot_P], sent.breaks_BV, sent.set_S[slot_P], self.longest
        )
        return Penalties(window_PW[:, 1:].clamp_min(0), nats_PK, place_P)


class SlotRepeats:
    """DRY of an engine's requests, one a slot at most. What changed goes to the device by one copy
    before the next step that has any."""

    def __init__(
        self, slots: int, device: torch.device | str, staging: PinnedStaging | None = None
    ) -> None:
        self._staging = staging or PinnedStaging(device)
        self._controls: dict[int, DryControls] = {}
        self._has_S = np.zeros(slots, bool)
        self._longest_S = np.zeros(slots, np.int64)
        self._sent: _Sent | None = None

    def put(self, slot: int, dry: DryControls) -> None:
        self._controls[slot], self._has_S[slot], self._sent = dry, True, None
        self._longest_S[slot] = dry.longest

    def clear(self, slot: int) -> None:
        if self._controls.pop(slot, None) is not None:
            self._has_S[slot], self._sent = False, None

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
        """Of each row's text, with duplicates: the largest of a token's penalties is the one.

        Args:
            texts: their whole tokens: where an answer begins is not looked at.
            slot_R, offset_R: of the step's rows.
            slots: those of the step that have DRY, on the host.
            most_rows: rows that these have at most, of which the host may not know the places.
            longest_text: tokens that the text of none of these rows exceeds.
        """
        sent = self._on_device()
        has_dry_R = sent.numbers_S4[:, MULTIPLIER][slot_R] > 0
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
        if self._sent is None:
            sets = {id(dry.breaks_V): dry.breaks_V for dry in self._controls.values()}
            width = 1 + max(len(breaks_V) for breaks_V in sets.values())
            breaks_BV = np.zeros((len(sets), width), bool)
            for row_V, breaks_V in zip(breaks_BV, sets.values(), strict=True):
                row_V[: len(breaks_V)] = breaks_V
            rows = {key: row for row, key in enumerate(sets)}
            numbers_S4 = np.ones((len(self._has_S), NUMBERS), np.float32)
            numbers_S4[:, MULTIPLIER] = 0
            set_S = np.zeros(len(self._has_S), np.int64)
            for slot, dry in self._controls.items():
                numbers = dry.multiplier, dry.base, dry.allowed_length, dry.longest
                numbers_S4[slot], set_S[slot] = numbers, rows[id(dry.breaks_V)]
            sent = self._staging.to_device_together(numbers_S4, set_S, breaks_BV)
            self._sent = _Sent(*sent)
        return self._sent


def _windows(texts: Texts, slot_R: Tensor, offset_R: Tensor, place_P: Tensor, width: int) -> Tensor:
    """int64 [P, W]: the last tokens before each row's, the last of them last; −1 before the text.
    The last token and the drafts before it are this step's inputs."""
    back_W = torch.arange(width - 1, -1, -1, device=slot_R.device)
    at_PW = texts.at_R[place_P, None] - back_W
    slot_P1 = slot_R[place_P, None]
    known_PW = texts.tokens_SL[slot_P1, at_PW.clamp(0, texts.tokens_SL.shape[1] - 1)]
    input_PW = texts.input_R[(place_P[:, None] - back_W).clamp_min(0)]
    token_PW = torch.where(back_W <= offset_R[place_P, None], input_PW, known_PW)
    return torch.where(at_PW >= 0, token_PW, -1).long()


def _nats(
    window_PW: Tensor, numbers_P4: Tensor, breaks_BV: Tensor, set_P: Tensor, longest: int
) -> Tensor:
    """float32 [P, W − 1]: the penalty of each place's next token; 0 for none."""
    beyond = breaks_BV.shape[1] - 1
    known_PW = torch.where((window_PW >= 0) & (window_PW < beyond), window_PW, beyond)
    breaks_PW = breaks_BV[set_P[:, None], known_PW]
    multiplier_P1, base_P1, allowed_P1, longest_P1 = numbers_P4.split(1, dim=1)
    width = window_PW.shape[1]
    alive_PK = (window_PW[:, :-1] == window_PW[:, -1:]) & ~breaks_PW[:, -1:]
    length_PK = alive_PK.float()
    for back in range(1, min(longest, width)):
        # Place i has token i − back behind it, as the last one has the token −1 − back.
        same_PK = window_PW[:, : width - 1 - back] == window_PW[:, width - 1 - back, None]
        same_PK &= ~breaks_PW[:, width - 1 - back, None] & (back < longest_P1)
        alive_PK[:, back:] &= same_PK
        alive_PK[:, :back] = False
        length_PK += alive_PK
    nats_PK = multiplier_P1 * base_P1 ** (length_PK - allowed_P1).clamp_min(0.0)
    counts_PK = (length_PK >= allowed_P1) & ~breaks_PW[:, 1:] & (window_PW[:, 1:] >= 0)
    return torch.where(counts_PK, nats_PK.clamp_max(MAX_PENALTY), 0.0)
