"""On a CPU, reduces rows to the few tokens that matter for DRY: those with penalties, the stop
tokens, and the content that the guard may keep after the penalties. Finding them reads a row three
times; the formulas then work on these tokens only.

J: the largest number of such tokens in a row.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dftserve.sampling.controls import Controls
from dftserve.sampling.step import Penalties

LOWEST = float(np.finfo(np.float32).min)
FARTHEST = 32.0
"""Nats at T below the maximum; the sum of all tokens below that is negligible in float32."""
MARGIN = 1e-3
"""In units of logits, so that no token that the guard keeps is lost to rounding."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class CompactRows:
    """Rows P, reduced to their relevant tokens, one per column."""

    row_P: list[int]
    token_PJ: list[Ids]
    """The tokens of each row's columns, in ascending order."""
    logits_PJ: Tensor
    """Padded with -inf; all NaN in an invalid row."""
    penalties: Penalties
    """With column indices in place of token ids; J for a token without a column."""
    controls: Controls
    """With column indices in place of stop token ids."""

    @classmethod
    def of(
        cls,
        logits_XV: Tensor,
        row_P: Tensor,
        penalties: Penalties,
        controls: Controls,
        log_guard_P: Tensor,
    ) -> "CompactRows":
        divisor_P = controls.logits_divisor_R
        reach_P = torch.minimum(-log_guard_P, FARTHEST * controls.temperature_R) / divisor_P
        lost_PK = penalties.nats_PK / divisor_P[:, None]
        token_PK, stop_PE = penalties.token_PK.numpy(), controls.stop_ids_RE.numpy()
        rows = row_P.tolist()
        rows_in_use = zip(rows, token_PK, lost_PK.numpy(), stop_PE, reach_P.tolist(), strict=True)
        tokens_by_row = [
            _relevant_tokens(logits_XV[row].numpy(), *each) for row, *each in rows_in_use
        ]
        width = max(1, *map(len, tokens_by_row))
        logits_PJ = np.full((len(rows), width), -np.inf, np.float32)
        for row, token_J, values_J in zip(rows, tokens_by_row, logits_PJ, strict=True):
            values_J[: len(token_J)] = logits_XV[row].numpy()[token_J]
            if not len(token_J):
                values_J[:] = np.nan
        column_PK = _columns(token_PK, tokens_by_row, otherwise=width)
        column_PE = _columns(stop_PE, tokens_by_row, otherwise=-1)
        return cls(
            rows,
            tokens_by_row,
            torch.from_numpy(logits_PJ),
            replace(penalties, token_PK=torch.from_numpy(column_PK)),
            replace(controls, stop_ids_RE=torch.from_numpy(column_PE)),
        )

    def write(self, logits_XV: Tensor, lower_PJ: Tensor, changes_P: Tensor) -> None:
        """Write the changed rows back to the logits."""
        rows_in_use = zip(
            self.row_P, self.token_PJ, lower_PJ.numpy(), changes_P.tolist(), strict=True
        )
        for row, token_J, lower_J, changes in rows_in_use:
            if changes:
                logits_XV[row].numpy()[token_J] = lower_J[: len(token_J)]


def _relevant_tokens(
    row_V: NDArray[np.float32],
    token_K: Ids,
    lost_K: NDArray[np.float32],
    stop_E: Ids,
    reach: float,
) -> Ids:
    """The relevant tokens of a row; none if it is invalid. The row is modified temporarily and
    restored."""
    if not np.isfinite(row_V.max()):
        return np.empty(0, np.int64)
    is_known_K, is_known_E = token_K < len(row_V), (stop_E >= 0) & (stop_E < len(row_V))
    token_K, stop_E = token_K[is_known_K], stop_E[is_known_E]
    before_K, before_E = row_V[token_K], row_V[stop_E]
    np.minimum.at(row_V, token_K, before_K - lost_K[is_known_K])
    row_V[stop_E] = -np.inf
    is_relevant_V = row_V >= max(row_V.max() - reach - MARGIN, LOWEST)
    row_V[stop_E] = before_E
    row_V[token_K] = before_K
    is_relevant_V[token_K] = True
    is_relevant_V[stop_E] = True
    return np.flatnonzero(is_relevant_V)


def _columns(token_PK: NDArray[Any], tokens_by_row: list[Ids], *, otherwise: int) -> Ids:
    """The column of each token in its row; `otherwise` if it has none."""
    column_PK = np.full(token_PK.shape, otherwise)
    for column_K, token_K, token_J in zip(column_PK, token_PK, tokens_by_row, strict=True):
        if len(token_J):
            index_K = np.minimum(np.searchsorted(token_J, token_K), len(token_J) - 1)
            is_found_K = token_J[index_K] == token_K
            column_K[is_found_K] = index_K[is_found_K]
    return column_PK
