"""The V1 model runner's logits processor.

V1 calls it after the temperature, so it receives L/T, and after its own min_p (which the request
field moves into the guard). Rows correspond to positions in the persistent batch, which change.
"""

from dataclasses import dataclass
from itertools import compress, count
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.sample.logits_processor.interface import (
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
)

from dftserve.sampling import SlotControls, Step, Texts
from dftserve.sampling.staging import PinnedStaging
from dftserve.sampling.style import depth_of
from dftserve_vllm import styles, vocabulary
from dftserve_vllm.dry import HostRepeats
from dftserve_vllm.extra_args import ActiveRequest, active_request
from dftserve_vllm.step_report import Array
from dftserve_vllm.worker_state import WorkerState

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class _Requests:
    """What a step reads from each request, by slot. In arrays, so that neither a step nor a change
    of the batch loops over the requests in Python."""

    def __init__(self, slots: int) -> None:
        self.outputs: list[list[int]] = [[] for _ in range(slots)]
        """The engine's own lists, which it extends; we read their lengths and last tokens."""
        self.prompt_end_S = np.full(slots, -1, np.int32)
        """The prompt's last token; -1 if it has none, as with embeddings."""
        self.reports_each_step_S = np.zeros(slots, bool)
        self.reads_last_token_S = np.zeros(slots, bool)
        self.has_style_S = np.zeros(slots, bool)

    def put(
        self, slot: int, request: ActiveRequest, prompt_end: int, output_ids: list[int]
    ) -> None:
        self.outputs[slot] = output_ids
        self.prompt_end_S[slot] = prompt_end
        self.reports_each_step_S[slot] = request.reports_each_step
        self.reads_last_token_S[slot] = request.controls.reads_last_token
        self.has_style_S[slot] = request.controls.has_style


@dataclass(frozen=True)
class _Batch:
    """The active rows of the batch, as tensors; rebuilt only when the batch changes."""

    outputs: list[list[int]]
    prompt_end_R: NDArray[np.int32]
    index: Array
    slots: Array
    reports_each_step: NDArray[np.bool_]
    reads_last_token: bool
    styled: Array
    """Indices of the rows with a style."""
    rows_R: torch.Tensor
    slot_R: torch.Tensor
    offset_R: torch.Tensor

    def lengths(self) -> Array:
        """How many tokens each row's answer has so far."""
        return np.fromiter(map(len, self.outputs), np.int64, len(self.outputs))

    def last_tokens(self, lengths: Array) -> NDArray[np.int32]:
        """The token that precedes each row's next one."""
        if lengths.all():
            return np.fromiter(map(_LAST, self.outputs), np.int32, len(self.outputs))
        last = self.prompt_end_R.copy()
        written = np.flatnonzero(lengths)
        ends = map(_LAST, compress(self.outputs, lengths.tolist()))
        last[written] = np.fromiter(ends, np.int32, len(written))
        return last


_LAST = itemgetter(-1)
_UNREAD = -2


class _TextEnds:
    """The last tokens of each slot's answer, as many as a style's state depends on."""

    def __init__(self, slots: int, depth: int) -> None:
        self._tokens_SL = np.full((slots, max(depth, 1)), -1, np.int32)
        self._begin_S = np.zeros(slots, np.int32)
        self._length_S = np.full(slots, _UNREAD)
        """The answer's length when its end was last read."""

    def forget(self, slot: int) -> None:
        """The slot has a new request, whose answer must be read from scratch."""
        self._length_S[slot] = _UNREAD

    def of(
        self, batch: _Batch, lengths: Array, last: NDArray[np.int32]
    ) -> tuple[NDArray[Any], ...]:
        """`Texts.tokens_SL`, `begin_S` and `at_R`, with the last token in the last column."""
        slots, length = batch.slots[batch.styled], lengths[batch.styled]
        by_one = length == self._length_S[slots] + 1
        grown = slots[by_one]
        self._tokens_SL[grown, :-1] = self._tokens_SL[grown, 1:]
        self._tokens_SL[grown, -1] = last[batch.styled][by_one]
        self._begin_S[grown] = np.maximum(self._begin_S[grown] - 1, 0)
        for row in batch.styled[~by_one].tolist():
            self._read(int(batch.slots[row]), batch.outputs[row])
        self._length_S[slots] = length
        return self._tokens_SL, self._begin_S, np.full(len(last), self._tokens_SL.shape[1] - 1)

    def _read(self, slot: int, output: list[int]) -> None:
        size = self._tokens_SL.shape[1]
        ending = output[-size:]
        self._begin_S[slot] = size - len(ending)
        self._tokens_SL[slot, size - len(ending) :] = ending


class V1Processor(LogitsProcessor):
    """Maps batch indices to slots, and keeps the requests' state by slot."""

    def __init__(
        self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool
    ) -> None:
        capacity = vllm_config.scheduler_config.max_num_seqs
        self._staging = PinnedStaging(device)
        self._controls = SlotControls(capacity, device, self._staging)
        self._styles = styles.of_engine(vllm_config)
        profiles = self._styles.profiles
        classes = vocabulary.token_classes(vllm_config)
        self.state = WorkerState(capacity, 1, device, classes, profiles)
        self._text = _TextEnds(capacity, depth_of(profiles)) if profiles else None
        self._repeats = HostRepeats(vocabulary.breakers(vllm_config), self._staging)
        self._free = list(range(capacity))
        self._arrivals = count()
        self._requests = _Requests(capacity)
        self._slots: dict[int, int] = {}
        self._batch: _Batch | None = None

    def is_argmax_invariant(self) -> bool:
        """True, so that it runs after the temperature. Greedy rows stay unchanged; in other rows,
        only a style, DRY, a group and the laws `words` and `xtc` may change the argmax."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Process the requests that joined, left and moved. If this fails, the mapping is unknown,
        and no row is changed until its request is added again."""
        if batch_update is not None:
            with self.state.isolated(self._drop_all):
                self._update(batch_update)

    def _update(self, batch_update: BatchUpdate) -> None:
        for index, params, prompt_ids, output_ids in batch_update.added:
            self._remove(index)
            with self.state.isolated():
                self._add(index, params, prompt_ids or [], output_ids)
        for index in batch_update.removed:
            self._remove(index)
        for a, b, direction in batch_update.moved:
            self._move(a, b, swap=direction == MoveDirectionality.SWAP)

    def _add(
        self, index: int, params: "SamplingParams", prompt_ids: list[int], output_ids: list[int]
    ) -> None:
        request = active_request(
            params, temperature_applied=True, arrivals=self._arrivals, styles=self._styles
        )
        if request is None:
            return
        prompt_end = prompt_ids[-1] if prompt_ids else -1
        slot = self._free.pop()
        try:
            self.state.open(slot, request.identity, len(output_ids), request.group)
            self._repeats.open(slot, request.diversity.dry, prompt_ids)
            self._controls.put(slot, request.controls)
            self._requests.put(slot, request, prompt_end, output_ids)
            if self._text is not None:
                self._text.forget(slot)
        except BaseException:
            self._free.append(slot)
            raise
        self._slots[index] = slot
        self._batch = None

    def _remove(self, index: int) -> None:
        self._release(self._slots.pop(index, None))

    def _release(self, slot: int | None) -> None:
        if slot is not None:
            self._batch = None
            self._free.append(slot)
            self._controls.clear(slot)
            self._repeats.close(slot)
            with self.state.isolated():
                self.state.close(slot)

    def _move(self, a: int, b: int, *, swap: bool) -> None:
        slot_a, slot_b = self._slots.pop(a, None), self._slots.pop(b, None)
        self._batch = None
        if slot_a is not None:
            self._slots[b] = slot_a
        if slot_b is not None and swap:
            self._slots[a] = slot_b
        else:
            self._release(slot_b)

    def _drop_all(self) -> None:
        for index in list(self._slots):
            self._remove(index)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self._slots:
            with self.state.isolated():
                self._apply(logits)
            with self.state.isolated():
                self._report()
        return logits

    def _apply(self, logits: torch.Tensor) -> None:
        batch = self._batch or self._gather()
        self._batch = batch
        position_R, last_token_R, texts = self._progress(batch)
        step = Step(
            self._controls.on_device(),
            batch.slot_R,
            position_R,
            batch.offset_R,
            last_token_R,
            rows_R=None if len(batch.index) == len(logits) else batch.rows_R,
            texts=texts,
            penalties=self._repeats.penalties(batch.slots, batch.outputs),
            # A prompt chunk does not lengthen the output, so its sample never counts as accepted:
            # treating all rows as sampling does no harm.
        )
        self.state.apply(logits, step, int(self.state.drawn_by_code(batch.slots).sum()))

    def _progress(self, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor | None, Texts | None]:
        """Each row's output length, and its last token and the end of its text where they are
        needed; sent to the device in one copy."""
        positions = batch.lengths()
        has_style = self._text is not None and len(batch.styled) > 0
        if not (batch.reads_last_token or has_style):
            return self._staging.to_device(positions), None, None
        last = batch.last_tokens(positions)
        if self._text is None or not has_style:
            position_R, last_token_R = self._staging.to_device_together(positions, last)
            return position_R, last_token_R, None
        ends = self._text.of(batch, positions, last)
        position_R, last_R, *sent = self._staging.to_device_together(positions, last, *ends)
        texts = Texts(*sent, input_R=last_R)
        return position_R, last_R if batch.reads_last_token else None, texts

    def _report(self) -> None:
        batch = self._batch or self._gather()
        self.state.end_step(batch.index, batch.slots, batch.reports_each_step)

    def _gather(self) -> _Batch:
        requests, positions = self._requests, sorted(self._slots)
        index = np.array(positions)
        slots = np.fromiter(map(self._slots.__getitem__, positions), np.int64, len(positions))
        rows_R, slot_R, offset_R = self._staging.to_device_together(
            index, slots, np.zeros(len(slots), np.int32)
        )
        return _Batch(
            outputs=list(map(requests.outputs.__getitem__, slots.tolist())),
            prompt_end_R=requests.prompt_end_S[slots],
            index=index,
            slots=slots,
            reports_each_step=requests.reports_each_step_S[slots],
            reads_last_token=bool(requests.reads_last_token_S[slots].any()),
            styled=np.flatnonzero(requests.has_style_S[slots]),
            rows_R=rows_R,
            slot_R=slot_R,
            offset_R=offset_R,
        )
