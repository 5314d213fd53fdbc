"""The rows of one step of an engine, and the request that each belongs to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dftserve.sampling.controls import Controls


@dataclass(frozen=True)
class Texts:
    """The text before each row, for the styles: all on the logits' device."""

    tokens_SL: Tensor
    """int32, rows contiguous: each slot's text as far as it is certain."""
    begin_S: Tensor
    """int32, where in it the answer begins."""
    at_R: Tensor
    """int64, where in it each row's input stands, or would stand: drafts are not in it."""
    input_R: Tensor
    """int32, the token before each row's, drafts included."""


@dataclass(frozen=True)
class Penalties:
    """What rows lose before the law, of `sampling.dry`: all on the logits' device."""

    token_PK: Tensor
    """int64, tokens of each row that has some, none negative; in any order."""
    nats_PK: Tensor
    """float32, what each loses; 0 for nothing, and the largest of a token's counts."""
    place_P: Tensor
    """int64, the rows' places among the step's."""

    def split(self, rows: int) -> Iterator["Penalties"]:
        """In parts of at most so many rows, as views."""
        given = self.token_PK, self.nats_PK, self.place_P
        for part in zip(*(each.split(rows) for each in given), strict=True):
            yield Penalties(*part)


def chosen_first(is_chosen_R: Tensor, rows: int) -> Tensor:
    """int64 [rows], without a wait: the places of the chosen, in order; where these are fewer,
    others behind them."""
    return torch.argsort((~is_chosen_R).byte(), stable=True)[:rows]


class Left(NamedTuple):
    """The tokens of each row that are not -inf, one row after the other, on the host: who has
    these need not read the rows."""

    token_N: NDArray[np.int32]
    start_R: NDArray[np.int64]
    """[R + 1]; a row that has none is not listed, and may hold anything."""


@dataclass(frozen=True)
class Step:
    """Rows R of a step's logits, in the layout that an engine has anyway: kernels read what they
    need by index, and nothing is gathered for them. All on the logits' device, contiguous."""

    controls: Controls
    """Of each slot, not of each row; without last tokens."""
    slot_R: Tensor
    """int64, each row's slot; the rows of a request are neighbours, all of a step's."""
    position_R: Tensor
    """int64, each row's position in its sequence."""
    offset_R: Tensor
    """int32, each row's place among the rows of its request in this step."""
    last_token_R: Tensor | None = None
    """int32, the token before each row's, of a step whose rows include one of the law `words`; -1,
    or None for all rows, where the text is empty."""
    rows_R: Tensor | None = None
    """int64, which rows of the logits; None for all of them, in order."""
    known_S: Tensor | None = None
    """int32, how many tokens of each slot's sequence were known before its first is sampled: a row
    before their last computes a chunk of a prompt and samples nothing. None where all rows do."""
    has_idle_rows: bool = False
    """Whether rows of slots without a request (`controls.NO_LAW`) may be among them: those keep
    their bits, and no slot hears of them."""
    texts: Texts | None = None
    """Of a step whose rows include one with a style."""
    figures_RF: Tensor | None = None
    """float32 [R, 4], what the styles did to the rows before they came here: see `style.stage`."""
    penalties: Iterable[Penalties] = ()
    """Of rows with DRY, each in one part; they come off before anything else. A part may be made
    only when it is asked for, so that no more than one takes memory."""
    left: Left | None = None
    """What the styles have left of the rows, where their stage lists it."""

    def __post_init__(self) -> None:
        """Raises ValueError where a tensor is not of its type, not a contiguous list, or not as
        long as the others."""
        rows = self.slot_R.shape
        for name, dtype in _TYPES.items():
            given: Tensor | None = getattr(self, name)
            if given is None:
                continue
            if given.dtype is not dtype or given.dim() != 1 or not given.is_contiguous():
                raise ValueError(
                    f"{name}: got {given.dtype}, shape {tuple(given.shape)}, strides "
                    f"{given.stride()}; accepted: a contiguous list of {dtype}."
                )
            if name != "known_S" and given.shape != rows:
                raise ValueError(
                    f"{name}: got {len(given)} and {len(self.slot_R)} slots; accepted: as many."
                )

    def samples_R(self) -> Tensor:
        """bool [R]: whether each row's token is sampled."""
        if self.known_S is None:
            return torch.ones_like(self.slot_R, dtype=torch.bool)
        return self.position_R + 1 >= self.known_S[self.slot_R]

    def busy(self) -> "Step":
        """The step without its idle rows; asks the device how many there are."""
        if not self.has_idle_rows:
            return self
        chosen_R = self.controls.holds_request()[self.slot_R].nonzero().flatten()
        last_token_R = None if self.last_token_R is None else self.last_token_R[chosen_R]
        return Step(
            self.controls,
            self.slot_R[chosen_R],
            self.position_R[chosen_R],
            self.offset_R[chosen_R],
            last_token_R,
            chosen_R if self.rows_R is None else self.rows_R[chosen_R],
            self.known_S,
            figures_RF=None if self.figures_RF is None else self.figures_RF[chosen_R],
        )


_TYPES = {
    "slot_R": torch.int64,
    "position_R": torch.int64,
    "offset_R": torch.int32,
    "last_token_R": torch.int32,
    "rows_R": torch.int64,
    "known_S": torch.int32,
}
