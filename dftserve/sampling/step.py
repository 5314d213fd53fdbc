"""The inputs of one engine step: its rows, and the request that each belongs to."""

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
    """The text that precedes each row, for styles and DRY; all on the logits' device."""

    tokens_SL: Tensor
    """int32, rows contiguous: each slot's accepted text."""
    begin_S: Tensor
    """int32, the index in it at which the answer begins."""
    at_R: Tensor
    """int64, the index in it of each row's input token; a draft has an index too, although it is
    not stored there."""
    input_R: Tensor
    """int32, each row's input token, which precedes the token to be sampled; drafts included."""


@dataclass(frozen=True)
class Penalties:
    """Penalties of `sampling.dry`, subtracted before the law; all on the logits' device."""

    token_PK: Tensor
    """int64, the penalised tokens of each row, none negative; in any order."""
    nats_PK: Tensor
    """float32, the penalty of each; 0 for none. For a repeated token, the largest applies."""
    place_P: Tensor
    """int64, the indices of the rows within the step."""

    def split(self, rows: int) -> Iterator["Penalties"]:
        """Parts of at most `rows` rows, as views."""
        tensors = self.token_PK, self.nats_PK, self.place_P
        for part in zip(*(each.split(rows) for each in tensors), strict=True):
            yield Penalties(*part)


def chosen_first(is_chosen_R: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the indices of the chosen rows, in order, padded with indices of other rows if
    there are fewer; does not block."""
    return torch.argsort((~is_chosen_R).byte(), stable=True)[:rows]


class FiniteTokens(NamedTuple):
    """The tokens of each row that are not -inf, concatenated, on the host. A caller that has this
    list can skip reading the whole rows."""

    token_N: NDArray[np.int32]
    start_R: NDArray[np.int64]
    """[R + 1]. A row without entries is not listed: nothing is known about its tokens."""


@dataclass(frozen=True)
class Step:
    """The rows R of a step's logits, in the layout in which engines store their inputs: kernels
    read by index, so nothing needs to be gathered. All tensors are contiguous and on the logits'
    device."""

    controls: Controls
    """One row for each slot (not for each row of logits); without last tokens."""
    slot_R: Tensor
    """int64, each row's slot. All of a request's rows in the step are included, and adjacent."""
    position_R: Tensor
    """int64, each row's position in its sequence."""
    offset_R: Tensor
    """int32, each row's index among the rows of its request in this step."""
    last_token_R: Tensor | None = None
    """int32, the token that precedes each row's; needed if any row has the law `words`. -1 for an
    empty text; None: -1 for all rows."""
    rows_R: Tensor | None = None
    """int64, the indices of the rows in the logits; None for all of them, in order."""
    known_S: Tensor | None = None
    """int32, the number of tokens of each slot's sequence that were known before the first one is
    sampled. A row at a position before the last of these belongs to a prompt chunk and is not
    sampled. None if all rows are sampled."""
    has_idle_rows: bool = False
    """Whether some rows may belong to slots without a request (`controls.NO_LAW`). Such rows are
    left unchanged, and they do not change any slot's state."""
    texts: Texts | None = None
    """Required if any row has a style."""
    style_stats_RF: Tensor | None = None
    """float32 [R, 4], the statistics of the styles that were applied before: see `style.stage`."""
    penalties: Iterable[Penalties] = ()
    """Penalties of the rows with DRY, in parts with distinct rows; subtracted before anything else.
    The parts may be generated lazily, so that only one at a time takes memory."""
    finite_tokens: FiniteTokens | None = None
    """The finite tokens of the rows after the styles, if the style stage lists them."""

    def __post_init__(self) -> None:
        """Raises ValueError if a tensor has the wrong dtype, is not 1-D and contiguous, or differs
        in length from the others."""
        rows = self.slot_R.shape
        for name, dtype in _TYPES.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dtype is not dtype or tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: got {tensor.dtype}, shape {tuple(tensor.shape)}, strides "
                    f"{tensor.stride()}; accepted: a contiguous list of {dtype}."
                )
            if name != "known_S" and tensor.shape != rows:
                raise ValueError(
                    f"{name}: got {len(tensor)} and {len(self.slot_R)} slots; accepted: as many."
                )

    def samples_R(self) -> Tensor:
        """bool [R]: whether each row's token is sampled."""
        if self.known_S is None:
            return torch.ones_like(self.slot_R, dtype=torch.bool)
        return self.position_R + 1 >= self.known_S[self.slot_R]

    def without_idle_rows(self) -> "Step":
        """The step without its idle rows; blocks until the device has counted them."""
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
            style_stats_RF=None if self.style_stats_RF is None else self.style_stats_RF[chosen_R],
        )


_TYPES = {
    "slot_R": torch.int64,
    "position_R": torch.int64,
    "offset_R": torch.int32,
    "last_token_R": torch.int32,
    "rows_R": torch.int64,
    "known_S": torch.int32,
}
