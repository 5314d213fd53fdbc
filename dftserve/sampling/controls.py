"""A request's parameters in the form that the transform reads, and the constants of the laws.

Both are stored as columns in a fixed order, which every backend accesses by the indices below:
`NUMBERS` for values that differ between rows, `CONSTANTS` for values common to all rows.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dftserve.sampling.draws import key_halves
from dftserve.sampling.staging import PinnedStaging
from dftserve.spec import Diversity

LAW_CODES = {
    "gated": 0,
    "budget": 1,
    "dynatemp": 2,
    "words": 3,
    "guard": 4,
    "top_n_sigma": 5,
    "xtc": 6,
}
NO_LAW = -1
"""The law of a slot without a request."""
NO_STYLE = -1
"""The style of a request without one."""

NUMBERS = (
    "law",
    "temperature",
    "logits_divisor",
    "level",
    "log_min_p",
    "max_temperature",
    "dynatemp_range",
    "dynatemp_exponent",
    "target_entropy",
    "n_sigma",
    "log_xtc_threshold",
    "xtc_probability",
    "draw_key_high",
    "draw_key_low",
    "style",
    "style_strength",
    "style_max_kl",
    "style_log_guard",
)
"""The columns of `Controls.numbers_RF`."""
(
    LAW,
    TEMPERATURE,
    LOGITS_DIVISOR,
    LEVEL,
    LOG_MIN_P,
    MAX_TEMPERATURE,
    DYNATEMP_RANGE,
    DYNATEMP_EXPONENT,
    TARGET_ENTROPY,
    N_SIGMA,
    LOG_XTC_THRESHOLD,
    XTC_PROBABILITY,
    DRAW_KEY_HIGH,
    DRAW_KEY_LOW,
    STYLE,
    STYLE_STRENGTH,
    STYLE_MAX_KL,
    STYLE_LOG_GUARD,
) = range(len(NUMBERS))

CONSTANTS = (
    "log_guard_start",
    "log_guard_step",
    "strength",
    "gate_power",
    "lowest_temperature",
    "budget_gain",
    "budget_lowest_level",
    "budget_highest_level",
    "budget_open_loop",
    "word_start_rise",
    "word_inside_fall",
)
"""The elements of `LawConstants.packed`, each an attribute or a property of `LawConstants`."""
(
    LOG_GUARD_START,
    LOG_GUARD_STEP,
    STRENGTH,
    GATE_POWER,
    LOWEST_TEMPERATURE,
    BUDGET_GAIN,
    BUDGET_LOWEST_LEVEL,
    BUDGET_HIGHEST_LEVEL,
    BUDGET_OPEN_LOOP,
    WORD_START_RISE,
    WORD_INSIDE_FALL,
) = range(len(CONSTANTS))


@dataclass(frozen=True, kw_only=True)
class LawConstants:
    """The constants of the laws; docs/maths.md derives them, docs/log.md has the measurements.

    A backend passes its constants to its kernels as an argument, so that different constants take
    effect on every backend without recompilation.
    """

    guard_start: float = 0.05
    guard_end: float = 0.02
    """The guard's a falls geometrically from start (level 0) to end (level 1), so that a hotter row
    keeps more tokens."""
    strength: float = 2.0
    """c: at level 1 the temperature of a high-entropy step rises by a factor of up to e^c."""
    gate_power: float = 2.0
    """The exponent of the gate g(H) = (H/(H+1))^power."""
    lowest_temperature: float = 0.01
    """The lower limit of cooling, at which sampling is already practically greedy."""
    budget_rate: float = 0.2
    budget_lowest_level: float = -1.0
    budget_highest_level: float = 2.0
    """The range of levels of the budget law; below 0 it cools."""
    budget_open_loop: int = 16
    """Tokens before the budget law starts to steer."""
    word_start_rise: float = 2.0
    """Under `words`, tokens that begin a word have the temperature T·(1 + rise·level)."""
    word_inside_fall: float = 0.3
    """Under `words`, tokens inside a word have the temperature T·(1 − fall·level)."""

    @property
    def log_guard_start(self) -> float:
        return math.log(self.guard_start)

    @property
    def log_guard_step(self) -> float:
        """The change of ln a from level 0 to level 1."""
        return math.log(self.guard_end / self.guard_start)

    @property
    def budget_gain(self) -> float:
        """η/c: the rate in units of the level; 0 if the level has no effect on the temperature."""
        return self.budget_rate / self.strength if self.strength else 0.0

    @property
    def packed(self) -> tuple[float, ...]:
        """In the order of `CONSTANTS`, for kernels."""
        return tuple(float(getattr(self, name)) for name in CONSTANTS)


DEFAULT_CONSTANTS = LawConstants()


@dataclass(frozen=True)
class Controls:
    """The parameters of each row, on the rows' device.

    numbers_RF: float32 [R, `len(NUMBERS)`], contiguous.
    stop_ids_RE: int64, each row's distinct stop tokens, then -1; columns after a row's first -1
        are not read.

    Must not be changed in place: a kernel that reads it may run later.
    """

    numbers_RF: Tensor
    stop_ids_RE: Tensor
    last_token_R: Tensor | None = None
    """int64, the token that precedes each row's position; needed if any row has the law `words`.
    -1 for an empty text; None: -1 for all rows."""
    position_R: Tensor | None = None
    """int64, each row's position in its text, for the random numbers of the law `xtc`; None: 0 for
    all rows."""

    @classmethod
    def of(
        cls, numbers_RF: Tensor, stop_ids_RE: Tensor, last_token_R: Tensor | None = None
    ) -> "Controls":
        """From existing tensors.

        Raises:
            ValueError: their dtypes or shapes are not those of `Controls`, or their numbers of rows
                differ.
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
        return cls(numbers_RF.contiguous(), stop_ids_RE, last_token_R)

    @classmethod
    def stack(
        cls,
        rows: "Sequence[ControlRow]",
        device: torch.device | str = "cpu",
        staging: PinnedStaging | None = None,
    ) -> "Controls":
        """One row of controls for each request. With `staging`, the copy goes to its device without
        blocking, and `device` is ignored."""
        to_device = (staging or PinnedStaging(device)).to_device
        numbers = [row.numbers for row in rows]
        numbers_RF = np.array(numbers, dtype=np.float32).reshape(-1, len(NUMBERS))
        stop_ids_RE = np.full((len(rows), stop_width(rows)), -1)
        for row, stop_ids_E in zip(rows, stop_ids_RE, strict=True):
            stop_ids_E[: len(row.stop_ids)] = row.stop_ids
        return cls(to_device(numbers_RF), to_device(stop_ids_RE))

    def select(self, chosen_R: Tensor) -> "Controls":
        """Some of the rows, by index or by mask."""
        last_token_R = None if self.last_token_R is None else self.last_token_R[chosen_R]
        position_R = None if self.position_R is None else self.position_R[chosen_R]
        numbers_RF, stop_ids_RE = self.numbers_RF[chosen_R], self.stop_ids_RE[chosen_R]
        return Controls(numbers_RF, stop_ids_RE, last_token_R, position_R)

    def after(self, last_token_R: Tensor) -> "Controls":
        """The same controls with these last tokens, int64 [R]."""
        return replace(self, last_token_R=last_token_R)

    def at(self, position_R: Tensor) -> "Controls":
        """The same controls at these positions, int64 [R]."""
        return replace(self, position_R=position_R)

    def holds_request(self) -> Tensor:
        """bool, for controls of slots: whether each slot holds a request."""
        return self.law_R != NO_LAW

    def with_level(self, level_R: Tensor) -> "Controls":
        """The same controls with other levels, as a copy."""
        numbers_RF = self.numbers_RF.clone()
        numbers_RF[:, LEVEL] = level_R
        return replace(self, numbers_RF=numbers_RF)

    @property
    def law_R(self) -> Tensor:
        """One of `LAW_CODES`."""
        return self.numbers_RF[:, LAW]

    @property
    def temperature_R(self) -> Tensor:
        """T, the request's own."""
        return self.numbers_RF[:, TEMPERATURE]

    @property
    def logits_divisor_R(self) -> Tensor:
        """The number by which the rows are already divided: T after a temperature stage, else 1."""
        return self.numbers_RF[:, LOGITS_DIVISOR]

    @property
    def level_R(self) -> Tensor:
        return self.numbers_RF[:, LEVEL]

    @property
    def log_min_p_R(self) -> Tensor:
        """ln of the request's min_p; NaN if the guard follows the level."""
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

    @property
    def n_sigma_R(self) -> Tensor:
        return self.numbers_RF[:, N_SIGMA]

    @property
    def log_xtc_threshold_R(self) -> Tensor:
        return self.numbers_RF[:, LOG_XTC_THRESHOLD]

    @property
    def xtc_probability_R(self) -> Tensor:
        return self.numbers_RF[:, XTC_PROBABILITY]

    @property
    def draw_key_high_R(self) -> Tensor:
        """The high half of each request's key, a whole number: see `draws.uniform`."""
        return self.numbers_RF[:, DRAW_KEY_HIGH]

    @property
    def draw_key_low_R(self) -> Tensor:
        return self.numbers_RF[:, DRAW_KEY_LOW]

    @property
    def style_R(self) -> Tensor:
        """The profile's index, or `NO_STYLE`; undefined for slots without a request."""
        return self.numbers_RF[:, STYLE]

    @property
    def style_strength_R(self) -> Tensor:
        return self.numbers_RF[:, STYLE_STRENGTH]

    @property
    def style_max_kl_R(self) -> Tensor:
        """In nats per token."""
        return self.numbers_RF[:, STYLE_MAX_KL]

    @property
    def style_log_guard_R(self) -> Tensor:
        """ln a of the guard that precedes the style."""
        return self.numbers_RF[:, STYLE_LOG_GUARD]


@dataclass(frozen=True, kw_only=True)
class StyleControls:
    """The style parameters in a row of `Controls`."""

    profile: int
    """Index into the engine's profiles: see `style.StyleTables`."""
    strength: float
    max_kl: float
    """In nats per token."""


@dataclass(frozen=True)
class ControlRow:
    """One request's row of `Controls`, on the host."""

    numbers: tuple[float, ...]
    """In the order of `NUMBERS`."""
    stop_ids: tuple[int, ...]
    """Distinct, none negative."""

    @property
    def has_style(self) -> bool:
        return self.numbers[STYLE] != NO_STYLE

    @property
    def reads_last_token(self) -> bool:
        """Whether the row's law depends on the preceding token."""
        return self.numbers[LAW] == LAW_CODES["words"]

    def padded_stops(self, width: int) -> list[int]:
        return [*self.stop_ids, *[-1] * (width - len(self.stop_ids))]


def stop_width(rows: Iterable[ControlRow]) -> int:
    """Columns needed for the stop tokens of these rows: the largest number, rounded up to a power
    of two.

    Since it is computed from the rows in use, it shrinks after a request with many stop tokens has
    ended; the rounding keeps it from changing with every request.
    """
    longest = max((len(row.stop_ids) for row in rows), default=0)
    return 1 << max(longest - 1, 0).bit_length()


def control_row(
    diversity: Diversity,
    *,
    temperature: float,
    logits_divisor: float,
    stop_ids: frozenset[int],
    draw_key: int = 0,
    style: StyleControls | None = None,
    constants: LawConstants = DEFAULT_CONSTANTS,
) -> ControlRow:
    """The controls of one request.

    Args:
        temperature: the request's T, above 0.
        logits_divisor: the number by which the logits are already divided (T or 1).
        stop_ids: the tokens that end its text; negative ids are ignored.
        draw_key: from `draws.draw_key`, for the law `xtc`.
        style: its style. The guard is then applied only once, before the style, and the law after
            it keeps every token; at level 0 that law leaves the temperature unchanged.
        constants: of the guard before a style.

    Raises:
        ValueError: the temperature is not above 0: greedy rows are not transformed.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; accepted: above 0 (0 stays greedy).")
    draw_key_high, draw_key_low = key_halves(draw_key)
    numbers = {
        "law": LAW_CODES[diversity.law],
        "temperature": temperature,
        "logits_divisor": logits_divisor,
        "level": diversity.level or 0.0,
        "log_min_p": _log_min_p(diversity) if style is None else -math.inf,
        "max_temperature": diversity.max_temperature or math.inf,
        "dynatemp_range": diversity.dynatemp_range or 0.0,
        "dynatemp_exponent": diversity.dynatemp_exponent or 1.0,
        "target_entropy": diversity.target_entropy or 0.0,
        "n_sigma": diversity.n_sigma or 0.0,
        "log_xtc_threshold": math.log(diversity.xtc_threshold or 1.0),
        "xtc_probability": diversity.xtc_probability or 0.0,
        "draw_key_high": float(draw_key_high),
        "draw_key_low": float(draw_key_low),
        "style": NO_STYLE if style is None else style.profile,
        "style_strength": 0.0 if style is None else style.strength,
        "style_max_kl": 0.0 if style is None else style.max_kl,
        "style_log_guard": _style_log_guard(diversity, constants),
    }
    tokens = sorted(token for token in stop_ids if token >= 0)
    return ControlRow(tuple(numbers[name] for name in NUMBERS), tuple(tokens))


def _log_min_p(diversity: Diversity) -> float:
    """-inf keeps every finite token: without a min_p, `xtc` and DRY alone apply no guard."""
    if diversity.min_p is not None:
        return math.log(diversity.min_p)
    keeps_all = diversity.law == "xtc" or diversity.is_dry_alone
    return -math.inf if keeps_all else math.nan


def _style_log_guard(diversity: Diversity, constants: LawConstants) -> float:
    """ln a of the guard before a style, as in `laws.log_guard`. Under `budget`, whose level changes
    from step to step, it is that of level 1, the widest that the law can reach."""
    if diversity.min_p is not None:
        return math.log(diversity.min_p)
    level = 1.0 if diversity.law == "budget" else diversity.level or 0.0
    return constants.log_guard_start + constants.log_guard_step * level
