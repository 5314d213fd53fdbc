"""The V1 model runner's logits processor.

V1 calls it after the temperature, so rows come as L/T, and after its own min_p (which the request
field moves into the guard). Rows are places in the persistent batch, which move.
"""

from dataclasses import dataclass
from itertools import count
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
from dftserve_vllm.extra_args import Active, active
from dftserve_vllm.request_stats import RequestStats
from dftserve_vllm.step_report import Array

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class _Entry:
    slot: int
    active: Active
    prompt_end: int
    """The prompt's last token; -1 where it has none, as of embeddings."""
    output_ids: list[int]
    """The engine's own list, which grows; its length and its last token are read."""

    def last_token(self) -> int:
        return self.output_ids[-1] if self.output_ids else self.prompt_end


@dataclass(frozen=True)
class _Batch:
    """The active rows of the batch, as tensors; made anew only when the batch changes."""

    entries: list[_Entry]
    outputs: list[list[int]]
    index: list[int]
    slots: Array
    may_end_anywhere: list[bool]
    reads_last_token: bool
    has_style: bool
    rows_R: torch.Tensor
    slot_R: torch.Tensor
    offset_R: torch.Tensor
    grouped_N: torch.Tensor | None
    """Which of them are of groups."""


class _TextEnds:
    """The last tokens of each slot's answer, as far as a style's state depends on them."""

    def __init__(self, slots: int, depth: int) -> None:
        self._tokens_SL = np.full((slots, max(depth, 1)), -1, np.int32)
        self._begin_S = np.zeros(slots, np.int32)

    def of(self, entries: list[_Entry]) -> tuple[NDArray[Any], ...]:
        """`Texts.tokens_SL`, `begin_S` and `at_R`, where the last token stands last."""
        length = self._tokens_SL.shape[1]
        for entry in entries:
            if entry.active.controls.has_style:
                ending = entry.output_ids[-length:]
                self._begin_S[entry.slot] = length - len(ending)
                self._tokens_SL[entry.slot, length - len(ending) :] = ending
        return self._tokens_SL, self._begin_S, np.full(len(entries), length - 1)


class V1Processor(LogitsProcessor):
    """Keeps entries by batch index, slots by request."""

    def __init__(
        self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool
    ) -> None:
        capacity = vllm_config.scheduler_config.max_num_seqs
        self._staging = PinnedStaging(device)
        self._controls = SlotControls(capacity, device, self._staging)
        self._styles = styles.of_engine(vllm_config)
        profiles = self._styles.profiles
        classes = vocabulary.token_classes(vllm_config)
        self.stats = RequestStats(capacity, 1, device, classes, profiles)
        self._text = _TextEnds(capacity, depth_of(profiles)) if profiles else None
        self._free = list(range(capacity))
        self._arrivals = count()
        self._entries: dict[int, _Entry] = {}
        self._batch: _Batch | None = None

    def is_argmax_invariant(self) -> bool:
        """True, so that it runs after the temperature. Greedy rows stay as they are, and in a row
        of another only a style, a group and the laws `words` and `xtc` may change the argmax."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """What joined, left and moved. Where a fault leaves that unknown, no row is touched until
        its request joins anew."""
        if batch_update is not None:
            with self.stats.isolated(self._drop_all):
                self._update(batch_update)

    def _update(self, batch_update: BatchUpdate) -> None:
        for index, params, prompt_ids, output_ids in batch_update.added:
            self._remove(index)
            with self.stats.isolated():
                self._add(index, params, prompt_ids[-1] if prompt_ids else -1, output_ids)
        for index in batch_update.removed:
            self._remove(index)
        for a, b, direction in batch_update.moved:
            self._move(a, b, swap=direction == MoveDirectionality.SWAP)

    def _add(
        self, index: int, params: "SamplingParams", prompt_end: int, output_ids: list[int]
    ) -> None:
        asked = active(
            params, temperature_applied=True, arrivals=self._arrivals, styles=self._styles
        )
        if asked is None:
            return
        slot = self._free.pop()
        try:
            produced = len(output_ids)
            self.stats.open(slot, asked.identity, produced, asked.group)
            self._controls.put(slot, asked.controls)
        except BaseException:
            self._free.append(slot)
            raise
        self._entries[index] = _Entry(slot, asked, prompt_end, output_ids)
        self._batch = None

    def _remove(self, index: int) -> None:
        self._release(self._entries.pop(index, None))

    def _release(self, entry: _Entry | None) -> None:
        if entry is not None:
            self._batch = None
            self._free.append(entry.slot)
            self._controls.clear(entry.slot)
            with self.stats.isolated():
                self.stats.close(entry.slot)

    def _move(self, a: int, b: int, *, swap: bool) -> None:
        entry_a, entry_b = self._entries.pop(a, None), self._entries.pop(b, None)
        self._batch = None
        if entry_a is not None:
            self._entries[b] = entry_a
        if entry_b is not None and swap:
            self._entries[a] = entry_b
        else:
            self._release(entry_b)

    def _drop_all(self) -> None:
        for index in list(self._entries):
            self._remove(index)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self._entries:
            with self.stats.isolated():
                self._apply(logits)
            with self.stats.isolated():
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
            # A chunk of a prompt does not lengthen the output, so it never counts as accepted:
            # that all rows sample does no harm.
        )
        self.stats.apply(logits, step, batch.grouped_N)

    def _progress(self, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor | None, Texts | None]:
        """How long each row's output is, and where they are read its last token and its text's
        end: in one copy."""
        positions = np.fromiter(map(len, batch.outputs), np.int64, len(batch.outputs))
        if not (batch.reads_last_token or batch.has_style):
            return self._staging.to_device(positions), None, None
        last = np.array([entry.last_token() for entry in batch.entries], dtype=np.int32)
        if not batch.has_style or self._text is None:
            position_R, last_token_R = self._staging.to_device_together(positions, last)
            return position_R, last_token_R, None
        ends = self._text.of(batch.entries)
        position_R, last_R, *sent = self._staging.to_device_together(positions, last, *ends)
        texts = Texts(*sent, input_R=last_R)
        return position_R, last_R if batch.reads_last_token else None, texts

    def _report(self) -> None:
        batch = self._batch or self._gather()
        self.stats.end_step(batch.index, batch.slots, batch.may_end_anywhere)

    def _gather(self) -> _Batch:
        index = sorted(self._entries)
        entries = [self._entries[i] for i in index]
        slots = [entry.slot for entry in entries]
        grouped = [row for row, entry in enumerate(entries) if entry.active.group is not None]
        rows_R, slot_R, offset_R = self._staging.to_device_together(
            np.array(index), np.array(slots), np.zeros(len(slots), np.int32)
        )
        return _Batch(
            entries=entries,
            outputs=[entry.output_ids for entry in entries],
            index=index,
            slots=np.array(slots),
            may_end_anywhere=[entry.active.may_end_anywhere for entry in entries],
            reads_last_token=any(e.active.controls.reads_last_token for e in entries),
            has_style=any(e.active.controls.has_style for e in entries),
            rows_R=rows_R,
            slot_R=slot_R,
            offset_R=offset_R,
            grouped_N=self._staging.to_device(grouped) if grouped else None,
        )
