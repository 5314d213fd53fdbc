"""Control laws: a request's parameters and the row's own entropy give the temperature.

    gated     T·exp(c·level·g(H0)),  g(H) = (H/(H+1))²
    budget    the same; `level` is steered, step by step, toward the target entropy
    dynatemp  T ± range·level, by (H0/ln n)^exponent   (llama.cpp's formula)

H0 is the entropy of the plausible tokens at temperature 1, in nats, and n their number. g heats
open steps and leaves sure ones and even two-way choices nearly alone: docs/maths.md has the
derivation, docs/log.md the measurement that settled the constants.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dftserve.sampling.staging import PinnedStaging
from dftserve.spec import Diversity

GUARD_START = 0.05
GUARD_END = 0.02
"""The guard's a falls geometrically from start (level 0) to end (level 1): heat needs room."""
STRENGTH = 2.0
"""c: at level 1 a wide-open step is heated by up to e^c."""
GATE_POWER = 2.0

LOWEST_TEMPERATURE = 0.01
"""Cooling ends here, where sampling is already greedy in effect."""

BUDGET_RATE = 0.2
BUDGET_OPEN_LOOP = 16
"""Tokens before the budget law starts to steer."""
BUDGET_LEVELS = (-1.0, 2.0)
"""The levels between which the budget law steers; below 0 it cools."""

LAW_CODES = {"gated": 0, "budget": 1, "dynatemp": 2}


NUMBERS = (
    "law",
    "temperature",
    "divided",
    "level",
    "log_min_p",
    "max_temperature",
    "dynatemp_range",
    "dynatemp_exponent",
    "target_entropy",
)
"""The columns of `Controls.numbers_RF`, which every kernel reads by these places."""
(
    LAW,
    TEMPERATURE,
    DIVIDED,
    LEVEL,
    LOG_MIN_P,
    MAX_TEMPERATURE,
    DYNATEMP_RANGE,
    DYNATEMP_EXPONENT,
    TARGET_ENTROPY,
) = range(len(NUMBERS))


@dataclass(frozen=True)
class Controls:
    """What the transform needs to know of each row, on the rows' device.

    numbers_RF: float32 [R, `len(NUMBERS)`], contiguous.
    stop_ids_RE: int64, each row's distinct stop tokens, then -1: whatever comes after a row's
        first -1 is not read.

    Not to be changed in place: what reads it may run later.
    """

    numbers_RF: Tensor
    stop_ids_RE: Tensor

    @classmethod
    def of(cls, numbers_RF: Tensor, stop_ids_RE: Tensor) -> "Controls":
        """From rows gathered elsewhere.

        Raises:
            ValueError: they are not of the types and shapes of `Controls`, or not as many rows.
        """
        numbers, stops = tuple(numbers_RF.shape), tuple(stop_ids_RE.shape)
        if (
            numbers_RF.dtype != torch.float32
            or stop_ids_RE.dtype != torch.int64
            or len(stops) != 2
            or numbers != (stops[0], len(NUMBERS))
        ):
            raise ValueError(
                f"controls: got {numbers_RF.dtype} {numbers} and {stop_ids_RE.dtype} {stops}; "
                f"accepted: float32 [rows, {len(NUMBERS)}] and int64 [rows, stop tokens]."
            )
        return cls(numbers_RF.contiguous(), stop_ids_RE)

    @classmethod
    def stack(
        cls,
        rows: "Sequence[ControlRow]",
        device: torch.device | str = "cpu",
        staging: PinnedStaging | None = None,
    ) -> "Controls":
        """One row of controls for each request; with `staging`, its device, without a wait."""
        to_device = (staging or PinnedStaging(device)).to_device
        numbers = [row.numbers for row in rows]
        numbers_RF = np.array(numbers, dtype=np.float32).reshape(-1, len(NUMBERS))
        stop_ids_RE = np.full((len(rows), stop_width(rows)), -1)
        for row, stop_ids_E in zip(rows, stop_ids_RE, strict=True):
            stop_ids_E[: len(row.stop_ids)] = row.stop_ids
        return cls(to_device(numbers_RF), to_device(stop_ids_RE))

    def select(self, chosen_R: Tensor) -> "Controls":
        """Some of the rows, by index or by mask."""
        return Controls(self.numbers_RF[chosen_R], self.stop_ids_RE[chosen_R])

    def with_level(self, level_R: Tensor) -> "Controls":
        numbers_RF = self.numbers_RF.clone()
        numbers_RF[:, LEVEL] = level_R
        return Controls(numbers_RF, self.stop_ids_RE)

    @property
    def law_R(self) -> Tensor:
        """One of `LAW_CODES`."""
        return self.numbers_RF[:, LAW]

    @property
    def temperature_R(self) -> Tensor:
        """T, the request's own."""
        return self.numbers_RF[:, TEMPERATURE]

    @property
    def divided_R(self) -> Tensor:
        """What the rows were divided by before they came: T after a temperature stage, else 1."""
        return self.numbers_RF[:, DIVIDED]

    @property
    def level_R(self) -> Tensor:
        return self.numbers_RF[:, LEVEL]

    @property
    def log_min_p_R(self) -> Tensor:
        """ln of the request's min_p; NaN where the guard follows the level."""
        return self.numbers_RF[:, LOG_MIN_P]

    @property
    def max_temperature_R(self) -> Tensor:
        return self.numbers_RF[:, MAX_TEMPERATURE]

    @property
    def dynatemp_range_R(self) -> Tensor:
        return self.numbers_RF[:, DYNATEMP_RANGE]

    @property
    def dynatemp_exponent_R(self) -> Tensor:
        return self.numbers_RF[:, DYNATEMP_EXPONENT]

    @property
    def target_entropy_R(self) -> Tensor:
        """Nats, for the `budget` law's controller; the transform itself does not read it."""
        return self.numbers_RF[:, TARGET_ENTROPY]


@dataclass(frozen=True)
class ControlRow:
    """One request's row of `Controls`, on the host."""

    numbers: tuple[float, ...]
    """In the order of `NUMBERS`."""
    stop_ids: tuple[int, ...]
    """Distinct, none negative."""

    def padded_stops(self, width: int) -> list[int]:
        return [*self.stop_ids, *[-1] * (width - len(self.stop_ids))]


def stop_width(rows: Iterable[ControlRow]) -> int:
    """Columns that the stop tokens of these rows take: of the longest, up to a power of two.

    Recomputed from the rows in use, it shrinks when a request with many stop tokens has left; the
    steps keep a matrix of this width from changing with every request.
    """
    longest = max((len(row.stop_ids) for row in rows), default=0)
    return 1 << max(longest - 1, 0).bit_length()


def control_row(
    diversity: Diversity, *, temperature: float, divided: float, stop_ids: frozenset[int]
) -> ControlRow:
    """The controls of one request.

    Args:
        temperature: the request's T, above 0.
        divided: what its logits were divided by before the transform (T or 1).
        stop_ids: the tokens that end its text; negative ids, which are no tokens, are left out.

    Raises:
        ValueError: the temperature is not above 0: greedy rows are not transformed.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; accepted: above 0 (0 stays greedy).")
    numbers = {
        "law": LAW_CODES[diversity.law],
        "temperature": temperature,
        "divided": divided,
        "level": diversity.level or 0.0,
        "log_min_p": math.nan if diversity.min_p is None else math.log(diversity.min_p),
        "max_temperature": diversity.max_temperature or math.inf,
        "dynatemp_range": diversity.dynatemp_range or 0.0,
        "dynatemp_exponent": diversity.dynatemp_exponent or 1.0,
        "target_entropy": diversity.target_entropy or 0.0,
    }
    tokens = sorted(token for token in stop_ids if token >= 0)
    return ControlRow(tuple(numbers[name] for name in NUMBERS), tuple(tokens))


def log_guard(controls: Controls) -> Tensor:
    """ln a for each row: the request's min_p, else geometric between the guard's two ends."""
    step = math.log(GUARD_END / GUARD_START)
    follows_R = math.log(GUARD_START) + step * controls.level_R.clamp(0.0, 1.0)
    return torch.where(controls.log_min_p_R.isnan(), follows_R, controls.log_min_p_R)


def temperature(controls: Controls, entropy_R: Tensor, plausible_R: Tensor) -> Tensor:
    """The temperature of each row's content.

    Args:
        entropy_R: H0, nats.
        plausible_R: n, the number of plausible tokens.
    """
    heated_R = gated(controls, entropy_R)
    is_dynatemp_R = controls.law_R == LAW_CODES["dynatemp"]
    return torch.where(is_dynatemp_R, _dynatemp(controls, entropy_R, plausible_R), heated_R)


def gated(controls: Controls, entropy_R: Tensor) -> Tensor:
    """The temperature where no row's law is `dynatemp`."""
    gate_R = (entropy_R / (entropy_R + 1.0)) ** GATE_POWER
    wanted_R = controls.temperature_R * torch.exp(STRENGTH * controls.level_R * gate_R)
    ceiling_R = torch.maximum(controls.temperature_R, controls.max_temperature_R)
    return torch.minimum(wanted_R, ceiling_R)


def _dynatemp(controls: Controls, entropy_R: Tensor, plausible_R: Tensor) -> Tensor:
    reach_R = controls.dynatemp_range_R * controls.level_R
    coolest_R = (controls.temperature_R - reach_R).clamp_min(0.0)
    share_R = (entropy_R / plausible_R.clamp_min(2.0).log()).clamp(0.0, 1.0)
    share_R = share_R**controls.dynatemp_exponent_R
    hottest_R = controls.temperature_R + reach_R
    wanted_R = (coolest_R + (hottest_R - coolest_R) * share_R).clamp_min(LOWEST_TEMPERATURE)
    return torch.where(plausible_R > 1, wanted_R, controls.temperature_R)


def steer(level_R: Tensor, target_R: Tensor, entropy_R: Tensor) -> Tensor:
    """The budget law's next level after a token drawn at entropy `entropy_R` (nats).

    An integral controller: level += rate·(target − H)/max(target, .1), divided by c so that the
    rate is that of s = c·level, kept within `BUDGET_LEVELS`.
    """
    error_R = (target_R - entropy_R) / target_R.clamp_min(0.1)
    return (level_R + BUDGET_RATE / STRENGTH * error_R).clamp(*BUDGET_LEVELS)
