"""Which kernels a device has, and that they do what plain torch does.

cpu     fused_numba.py, slots_numba.py    } where the compiler is installed, as it is wherever
cuda    fused_triton.py, slots_triton.py  } vLLM is, and the kernels pass a check
other   transform.py, slots.py            plain torch
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from dftserve.sampling.laws import BUDGET_OPEN_LOOP, ControlRow, Controls, control_row
from dftserve.sampling.slots import Account, Slots
from dftserve.sampling.transform import Statistics, transform
from dftserve.spec import parse

logger = logging.getLogger(__name__)

Way = Callable[[Tensor, Controls, Tensor | None], Statistics]
"""`transform.transform`, or what does the same faster with buffers of its own."""


@dataclass(frozen=True)
class Kernels:
    """What makes a way, and the class of slots beside it."""

    way: Callable[[], Way]
    slots: type[Slots]


PLAIN = Kernels(lambda: transform, Slots)


@cache
def kernels(device: torch.device) -> Kernels:
    """The device's kernels, or `PLAIN` where they do not compile or do something else. Engines
    start with this, so no request waits for a compiler, and no wrong kernel meets one."""
    try:
        found = _kernels(device)
        if found is PLAIN:
            return PLAIN
        agree = agrees(found, device)
    except ModuleNotFoundError as error:
        logger.warning("diversity: no kernels (%s); plain torch instead.", error)
        return PLAIN
    except Exception:  # A compiler that fails, a driver that does not load.
        logger.warning("diversity: the kernels fail; plain torch instead.", exc_info=True)
        return PLAIN
    if not agree:
        logger.warning("diversity: the kernels disagree with plain torch, which is used instead.")
        return PLAIN
    return found


def _kernels(device: torch.device) -> Kernels:
    if device.type == "cpu":
        from dftserve.sampling.fused_numba import NumbaTransform
        from dftserve.sampling.slots_numba import NumbaSlots

        return Kernels(NumbaTransform, NumbaSlots)
    if device.type == "cuda":
        from dftserve.sampling.fused_triton import TritonTransform
        from dftserve.sampling.slots_triton import TritonSlots

        return Kernels(partial(TritonTransform, device), TritonSlots)
    return PLAIN


def agrees(found: Kernels, device: torch.device) -> bool:
    """Whether these kernels do what plain torch does. Whatever a request could wait for is
    compiled on the way, and every kernel runs more than once, as it does for requests."""
    # Lists, here and below: one that disagrees must not keep the next from being compiled.
    return all([_same_rows(found.way(), device), _same_accounts(found.slots, device)])


def _same_rows(way: Way, device: torch.device) -> bool:
    """Rows of any length, padded rows, aligned rows; stop tokens in every width that
    `laws.stop_width` gives to as many as requests have."""
    sizes = [(257, 257, 1), (257, 272, 1), *((4096, 4096, 1 << step) for step in range(9))]
    return all([_same_batch(way, device, *size) for size in sizes])


def _same_batch(
    way: Way, device: torch.device, vocabulary: int, stride: int, stop_count: int
) -> bool:
    """All rows at once, then some of them."""
    controls = Controls.stack(_control_rows(4, stop_count), device)
    some_R = torch.arange(4, device=device)[1:]
    pairs: list[tuple[Tensor, Tensor]] = []
    for rows_R, step in ((None, controls), (some_R, controls.select(some_R))):
        expected_XV, got_XV = (_rows(vocabulary, stride, device) for _ in range(2))
        expected, got = transform(expected_XV, step, rows_R), way(got_XV, step, rows_R)
        sound_R = expected.sound_R
        pairs += [(expected_XV, got_XV), (sound_R, got.sound_R.clone())]
        figures = zip(expected.figures(), got.figures(), strict=True)
        pairs += [(wanted_R[sound_R], figure_R[sound_R]) for wanted_R, figure_R in figures]
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True) for a, b in pairs)


def _rows(vocabulary: int, stride: int, device: torch.device) -> Tensor:
    """A flat row, a peaked one, one with a grammar's mask, one that is not sound; quarters, so that
    none is at a floor."""
    steps_V = torch.arange(vocabulary, device=device) * 37 % 101
    masked_V = torch.where(steps_V < 9, -0.25 * steps_V, -torch.inf)
    unsound_V = torch.where(steps_V == 7, torch.nan, 0.0)
    rows = (0.0 * steps_V, -0.25 * steps_V, masked_V, unsound_V)
    padding = (0, stride - vocabulary)
    return torch.nn.functional.pad(torch.stack(rows), padding)[:, :vocabulary]


def _control_rows(rows: int, stop_count: int) -> list[ControlRow]:
    """The second row has `stop_count` stop tokens, the others one."""
    diversity = parse({"level": 0.5})
    many = frozenset(range(3, 3 + 15 * stop_count, 15))
    stops = [many if row == 1 else frozenset({3}) for row in range(rows)]
    return [control_row(diversity, temperature=0.8, divided=1.0, stop_ids=ids) for ids in stops]


def _same_accounts(kind: type[Slots], device: torch.device) -> bool:
    """A new request and a resumed one, of two rows each; one token is accepted at every step, and
    they are steered before the end."""
    diversity = parse({"law": "budget", "target_entropy": 1.5})
    row = control_row(diversity, temperature=1.0, divided=1.0, stop_ids=frozenset())
    controls = Controls.stack([row] * 4, device)
    slot_R, offset_R = torch.tensor([[2, 2, 0, 0], [0, 1, 0, 1]], device=device)
    samples_R = torch.ones(4, dtype=torch.bool, device=device)
    before = Account(torch.tensor(3), torch.arange(5.0), torch.ones(2, 5))
    expected, got = Slots(3, 2, device), kind(3, 2, device)
    pairs: list[tuple[Tensor, Tensor]] = []
    for slots in (expected, got):
        slots.open(2)
        slots.open(0, before, produced=4)
    for step in range(BUDGET_OPEN_LOOP + 3):
        position_R = step + offset_R
        figure_R = 0.25 * (position_R + slot_R)
        statistics = Statistics(*[figure_R] * 4, sound_R=figure_R != 1.0)
        levels_R: list[Tensor] = []
        for slots in (expected, got):
            levels_R.append(slots.settle(controls, slot_R, position_R, offset_R).level_R)
            slots.remember(slot_R, position_R, offset_R, samples_R, statistics)
        pairs.append((levels_R[0], levels_R[1]))
    pairs.append((expected.unsound, got.unsound))
    for slot in (0, 2):
        wanted, account = expected.account(slot), got.account(slot)
        pairs += [(wanted.tokens, account.tokens), (wanted.sums_F, account.sums_F)]
        pairs.append((wanted.waiting_KF, account.waiting_KF))
    return all(torch.allclose(a, b, rtol=1e-4) for a, b in pairs)
