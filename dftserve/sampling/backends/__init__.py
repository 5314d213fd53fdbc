"""Backend selection and a start-up self-check against the torch reference.

cpu     numba.py, numba_slots.py      } if the compiler is installed (vLLM depends on both) and the
cuda    triton.py, triton_slots.py    } kernels pass the check
other   plain_torch.py
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dftserve.sampling.backends.base import Backend
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.sampling.controls import (
    DEFAULT_CONSTANTS,
    ControlRow,
    Controls,
    LawConstants,
    StyleControls,
    control_row,
)
from dftserve.sampling.slot_controls import SlotControls
from dftserve.sampling.slots import COLUMNS, SlotStatistics
from dftserve.sampling.step import Step, Texts
from dftserve.sampling.style import PlainStyleStage, ProfileArrays, StyleStage, StyleTables
from dftserve.sampling.token_classes import TokenClasses
from dftserve.spec import Diversity, parse

logger = logging.getLogger(__name__)

BackendClass = type[Backend]


def get_backend(
    device: torch.device | str,
    constants: LawConstants = DEFAULT_CONSTANTS,
    token_classes: TokenClasses | None = None,
) -> Backend:
    """A new instance of the fastest backend that passes the self-check on a device."""
    device = torch.device(device)
    return checked_class(device)(device, constants, token_classes)


def get_style_stage(device: torch.device | str, profiles: Sequence[ProfileArrays]) -> StyleStage:
    """The style stage of a device for these profiles; `StyleControls.profile` is an index into
    them."""
    device = torch.device(device)
    tables = StyleTables.of(profiles, device)
    with _fall_back_to_torch(f"styles on {device}"):
        preferred = _preferred_stage(device)
        if preferred is PlainStyleStage or same_styles(preferred, tables, checked_class(device)):
            return preferred(tables)
        logger.warning("styles: the kernel disagrees with plain torch, which is used instead.")
    return PlainStyleStage(tables)


def _preferred_stage(device: torch.device) -> Callable[[StyleTables], StyleStage]:
    """The stage that matches the device's backend, whose slots it reads."""
    if device.type == "cpu" and checked_class(device) is not TorchBackend:
        from dftserve.sampling.backends.numba_style import NumbaStyleStage

        return NumbaStyleStage
    if device.type == "cuda" and checked_class(device) is not TorchBackend:
        from dftserve.sampling.backends.triton_style import TritonStyleStage

        return TritonStyleStage
    return PlainStyleStage


def same_styles(
    create: Callable[[StyleTables], StyleStage], tables: StyleTables, backend_class: BackendClass
) -> bool:
    """Whether a stage computes the same rows as plain torch. This also compiles everything that a
    request would otherwise have to wait for."""
    device = tables.root_P.device
    stages = PlainStyleStage(tables), create(tables)
    return all([_same_restyled(stages, backend_class, v, device) for v in (257, 4096)])


def _same_restyled(
    stages: tuple[StyleStage, StyleStage],
    backend_class: BackendClass,
    vocabulary: int,
    device: torch.device,
) -> bool:
    """Checks two rows of a resumed request, and a row without a style between two with one."""
    off = Diversity(level=0.0)
    styles = [StyleControls(profile=0, strength=s, max_kl=0.05) for s in (1.0, 0.5)]
    rows = [
        control_row(off, temperature=0.8, logits_divisor=1.0, stop_ids=frozenset({3}), style=style)
        for style in (styles[0], None, styles[1])
    ]
    slot_R = torch.tensor([0, 0, 1, 2], device=device)
    texts = Texts(
        torch.arange(3 * 8, dtype=torch.int32, device=device).view(3, 8),
        torch.tensor([1, 0, 0], dtype=torch.int32, device=device),
        torch.tensor([6, 7, 3, 2], device=device),
        torch.tensor([5, 9, 3, 2], dtype=torch.int32, device=device),
    )
    offset_R = torch.tensor([0, 1, 0, 0], dtype=torch.int32, device=device)
    controls = Controls.stack(rows, device)
    step = Step(controls, slot_R, texts.at_R, offset_R, texts=texts)
    slots = backend_class(device).create_slots(3, 2)
    before = SlotStatistics(torch.tensor(3), torch.full((COLUMNS,), 0.1), torch.ones(2, COLUMNS))
    slots.open(0, before, produced=4)
    expected_XV, got_XV = (_rows(vocabulary, vocabulary, device) for _ in range(2))
    expected_RF, got_RF = (
        stage(logits_XV, step, slots)
        for stage, logits_XV in zip(stages, (expected_XV, got_XV), strict=True)
    )
    pairs = ((expected_XV, got_XV), (expected_RF, got_RF))
    return all(torch.allclose(a, b, rtol=1e-3, atol=2e-3, equal_nan=True) for a, b in pairs)


@contextmanager
def _fall_back_to_torch(what: str) -> Iterator[None]:
    """Logs the failure of a compiler or driver in the block; the code after it uses plain torch."""
    try:
        yield
    except ModuleNotFoundError as error:
        logger.warning("%s: no kernels (%s); plain torch instead.", what, error)
    except Exception:  # A compiler that fails, a driver that does not load.
        logger.warning("%s: the kernels fail; plain torch instead.", what, exc_info=True)


@cache
def checked_class(device: torch.device) -> BackendClass:
    """The device's own backend, or `TorchBackend` if its kernels do not compile or give wrong
    results. An engine calls this at start-up, so that no request waits for a compiler or runs on a
    wrong kernel."""
    with _fall_back_to_torch("diversity"):
        preferred = _preferred_class(device)
        if preferred is TorchBackend or self_check(preferred, device):
            return preferred
        logger.warning("diversity: the kernels disagree with plain torch, which is used instead.")
    return TorchBackend


def _preferred_class(device: torch.device) -> BackendClass:
    if device.type == "cpu":
        from dftserve.sampling.backends.numba import NumbaBackend

        return NumbaBackend
    if device.type == "cuda":
        from dftserve.sampling.backends.triton import TritonBackend

        return TritonBackend
    return TorchBackend


def self_check(backend_class: BackendClass, device: torch.device) -> bool:
    """Whether a backend computes the same as plain torch.

    This also compiles everything that a request would otherwise have to wait for, and every kernel
    runs more than once, as it does for requests.
    """
    # `all` of a list, here and below: a failed check must not skip the compilation of the next.
    return all([_same_rows(backend_class, device), _same_steps(backend_class, device)])


def _same_rows(backend_class: BackendClass, device: torch.device) -> bool:
    """Checks unaligned, padded and aligned rows, and every width of the stop token matrix that
    `controls.stop_width` returns for the numbers of stop tokens that requests have."""
    # Every combination of classes and states, and tokens beyond the table.
    parts_V4 = np.arange(3000)[:, None] // 3 ** np.arange(4) % 3
    classes = TokenClasses((parts_V4 << 2 * np.arange(4)).sum(axis=1).astype(np.uint8))
    backend = backend_class(device, token_classes=classes)
    reference = TorchBackend(device, token_classes=classes)
    sizes = [(257, 257, 1), (257, 272, 1), *((4096, 4096, 1 << step) for step in range(9))]
    return all([_same_batch(backend, reference, *size) for size in sizes])


def _same_batch(
    backend: Backend, reference: Backend, vocabulary: int, stride: int, stop_count: int
) -> bool:
    """Checks all rows at once, then some of them."""
    device = reference.device
    controls = Controls.stack(_control_rows(stop_count), device)
    controls = controls.after(torch.tensor([0, 27, 54, -1, 0, 0], device=device))
    some_R = torch.arange(6, device=device)[1:]
    pairs: list[tuple[Tensor, Tensor]] = []
    for rows_R, step in ((None, controls), (some_R, controls.select(some_R))):
        expected_XV, got_XV = (_rows(vocabulary, stride, device) for _ in range(2))
        expected, got = reference(expected_XV, step, rows_R), backend(got_XV, step, rows_R)
        valid_R = expected.valid_R
        pairs += [(expected_XV, got_XV), (valid_R, got.valid_R.clone())]
        values = zip(expected.values(), got.values(), strict=True)
        pairs += [(wanted_R[valid_R], value_R[valid_R]) for wanted_R, value_R in values]
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True) for a, b in pairs)


def _rows(vocabulary: int, stride: int, device: torch.device) -> Tensor:
    """A flat row, a peaked one, one with a grammar's mask, an invalid one, and two more peaked
    ones. Values are multiples of 0.25, so that none is exactly at the guard's threshold."""
    steps_V = torch.arange(vocabulary, device=device) * 37 % 101
    masked_V = torch.where(steps_V < 9, -0.25 * steps_V, -torch.inf)
    invalid_V = torch.where(steps_V == 7, torch.nan, 0.0)
    peaked_V = -0.25 * steps_V
    rows = (0.0 * steps_V, peaked_V, masked_V, invalid_V, peaked_V, peaked_V)
    padding = (0, stride - vocabulary)
    return torch.nn.functional.pad(torch.stack(rows), padding)[:, :vocabulary]


def _control_rows(stop_count: int) -> list[ControlRow]:
    """Controls of four laws; the second row has `stop_count` stop tokens, the others one."""
    laws = [parse({"law": law, "level": 0.5}) for law in ("gated", "words", "words", "gated")]
    laws.append(parse({"law": "top_n_sigma", "n_sigma": 1.1}))
    laws.append(parse({"law": "xtc", "xtc_probability": 1.0, "xtc_threshold": 1e-3, "min_p": 0.01}))
    many = frozenset(range(3, 3 + 15 * stop_count, 15))
    stops = [many if row == 1 else frozenset({3}) for row in range(len(laws))]
    return [
        control_row(diversity, temperature=0.8, logits_divisor=1.0, stop_ids=ids)
        for diversity, ids in zip(laws, stops, strict=True)
    ]


def _same_steps(backend_class: BackendClass, device: torch.device) -> bool:
    """Checks steps of a new and a resumed request with two rows each, an idle row between them,
    some invalid rows, and prompt chunks in the first step. One token is accepted per step, and
    there are enough steps for the budget law to begin steering."""
    diversity = parse({"law": "budget", "target_entropy": 1.5})
    row = control_row(diversity, temperature=1.0, logits_divisor=1.0, stop_ids=frozenset({5}))
    requests = SlotControls(3, device)
    for slot in (2, 0):
        requests.put(slot, row)
    before = SlotStatistics(torch.tensor(3), torch.arange(float(COLUMNS)), torch.ones(2, COLUMNS))
    backends = [each(device) for each in (TorchBackend, backend_class)]
    both = [backend.create_slots(3, 2) for backend in backends]
    for slots in both:
        slots.open(2)
        slots.open(0, before, produced=4)
    slot_R = torch.tensor([2, 2, 1, 0, 0], device=device)
    offset_R = torch.tensor([0, 1, 0, 0, 1], dtype=torch.int32, device=device)
    known_S = torch.full((3,), 2, dtype=torch.int32, device=device)
    pairs: list[tuple[Tensor, Tensor]] = []
    for at in range(DEFAULT_CONSTANTS.budget_open_loop + 3):
        step = Step(
            *(requests.on_device(), slot_R, at + offset_R.long(), offset_R),
            known_S=known_S,
            has_idle_rows=True,
        )
        expected_XV, got_XV = (_step_rows(at, device) for _ in range(2))
        for backend, logits_XV, slots in zip(backends, (expected_XV, got_XV), both, strict=True):
            backend.step(logits_XV, step, slots)
        pairs.append((expected_XV, got_XV))
    expected, got = both
    pairs += [(a.float(), b.float()) for a, b in zip(expected.state(), got.state(), strict=True)]
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True) for a, b in pairs)


def _step_rows(at: int, device: torch.device) -> Tensor:
    """Five rows, different in every step; in each step one of them contains a NaN."""
    tokens_V, rows_R1 = torch.arange(257, device=device), torch.arange(5, device=device)[:, None]
    logits_XV = -0.125 * ((tokens_V * (37 + rows_R1) + at) % 101)
    return torch.where((rows_R1 == at % 5) & (tokens_V == at), torch.nan, logits_XV)
