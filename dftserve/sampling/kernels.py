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

from dftserve.sampling.laws import BUDGET_OPEN_LOOP, Controls, control_row
from dftserve.sampling.slots import Slots
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
        agree = _same_rows(found.way, device) and _same_accounts(found.slots, device)
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


def _same_rows(way: Callable[[], Way], device: torch.device) -> bool:
    """A peaked row, a flat one, one with a grammar's mask; quarters, so that none is at a floor."""
    diversity = parse({"level": 0.5})
    row = control_row(diversity, temperature=0.8, divided=1.0, stop_ids=frozenset({3}))
    controls = Controls.stack([row] * 3, device)
    # Rows of any length, padded rows, aligned rows: Triton compiles each apart.
    for vocabulary, stride in ((257, 257), (257, 272), (4096, 4096)):
        steps_V = torch.arange(vocabulary, device=device) * 37 % 101
        masked_V = torch.where(steps_V < 9, -0.25 * steps_V, -torch.inf)
        logits_RV = torch.stack((-0.25 * steps_V, 0.0 * steps_V, masked_V)).float()
        expected_RV = logits_RV.clone()
        got_RV = torch.nn.functional.pad(logits_RV, (0, stride - vocabulary))[:, :vocabulary]
        expected, got = transform(expected_RV, controls), way()(got_RV, controls, None)
        pairs = zip((expected_RV, *expected.figures()), (got_RV, *got.figures()), strict=True)
        if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs):
            return False
    return True


def _same_accounts(kind: type[Slots], device: torch.device) -> bool:
    """Two requests of two rows each, one token accepted at every step, steered before the end."""
    diversity = parse({"law": "budget", "target_entropy": 1.5})
    row = control_row(diversity, temperature=1.0, divided=1.0, stop_ids=frozenset())
    controls = Controls.stack([row] * 4, device)
    slot_R, offset_R = torch.tensor([[2, 2, 0, 0], [0, 1, 0, 1]], device=device)
    samples_R = torch.ones(4, dtype=torch.bool, device=device)
    expected, got = Slots(3, 2, device), kind(3, 2, device)
    levels_R: list[Tensor] = []
    for step in range(BUDGET_OPEN_LOOP + 3):
        position_R = step + offset_R
        figure_R = 0.25 * (position_R + slot_R)
        statistics = Statistics(*[figure_R] * 4, sound_R=figure_R != 1.0)
        for slots in (expected, got):
            levels_R.append(slots.settle(controls, slot_R, position_R, offset_R).level_R)
            slots.remember(slot_R, position_R, offset_R, samples_R, statistics)
    pairs = list(zip(levels_R[::2], levels_R[1::2], strict=True))
    pairs.append((expected.unsound, got.unsound))
    pairs += [(expected.account(s).sums_F, got.account(s).sums_F) for s in (0, 2)]
    return all(torch.allclose(a, b, rtol=1e-4) for a, b in pairs)
