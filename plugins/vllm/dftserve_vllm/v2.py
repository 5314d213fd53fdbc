"""The V2 model runner's logits processor.

V2 calls it before the temperature, with unscaled rows, several for a request under speculative
decoding, keyed by a request's slot. Where no request of the batch asked for it, nothing runs.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from dftserve.sampling import ControlRow, Controls
from dftserve.sampling.controls import NUMBERS, stop_width
from dftserve.sampling.staging import PinnedStaging
from dftserve_vllm import vocabulary
from dftserve_vllm.extra_args import active
from dftserve_vllm.request_stats import RequestStats

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class V2Processor(LogitsProcessor):
    """Keeps one row of controls for each slot, on host and device, gathered at every step."""

    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState) -> None:
        speculative = vllm_config.speculative_config
        drafts = speculative.num_speculative_tokens if speculative is not None else 0
        self._states = req_states
        self._device = req_states.device
        classes = vocabulary.token_classes(vllm_config)
        self.stats = RequestStats(req_states.max_num_reqs, 1 + drafts, self._device, classes)
        self._is_active = np.zeros(req_states.max_num_reqs, dtype=bool)
        self._staging = PinnedStaging(self._device)
        self._host_numbers_SF = np.ones((req_states.max_num_reqs, len(NUMBERS)), dtype=np.float32)
        self._host_stop_ids_SE = np.full((req_states.max_num_reqs, 1), -1)
        self._stop_width_S = np.ones(req_states.max_num_reqs, dtype=np.int64)
        self._may_end_anywhere = np.zeros(req_states.max_num_reqs, dtype=bool)
        self._reads_last_token = np.zeros(req_states.max_num_reqs, dtype=bool)
        self._staged: list[int] = []

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Whether the request's rows are to be changed. There is no hook for its leaving: the
        slot's former request is closed here."""
        self._is_active[req_idx] = False
        with self.stats.isolated():
            self._is_active[req_idx] = self._open(req_idx, sampling_params)
        return bool(self._is_active[req_idx])

    def _open(self, slot: int, sampling_params: "SamplingParams") -> bool:
        asked = active(sampling_params, temperature_applied=False)
        if asked is None:
            self.stats.close(slot)
            return False
        produced = self._states.prefill_len.np[slot] - self._states.prompt_len.np[slot]
        self.stats.open(slot, asked.identity, int(produced))
        self._may_end_anywhere[slot] = asked.may_end_anywhere
        self._stage(slot, asked.controls)
        return True

    def _stage(self, slot: int, row: ControlRow) -> None:
        missing = stop_width([row]) - self._host_stop_ids_SE.shape[1]
        if missing > 0:
            padding = ((0, 0), (0, missing))
            self._host_stop_ids_SE = np.pad(self._host_stop_ids_SE, padding, constant_values=-1)
        self._host_stop_ids_SE[slot] = row.padded_stops(self._host_stop_ids_SE.shape[1])
        self._host_numbers_SF[slot] = row.numbers
        self._stop_width_S[slot] = stop_width([row])
        self._reads_last_token[slot] = row.reads_last_token
        self._staged.append(slot)

    def apply_staged_writes(self) -> None:
        """Controls of the requests that came go to the device; where that fails, their rows stay
        as they come."""
        if self._staged:
            with self.stats.isolated(self._deactivate):
                self._numbers_SF = self._staging.to_device(self._host_numbers_SF)
                self._stop_ids_SE = self._staging.to_device(self._host_stop_ids_SE)
            self._staged.clear()

    def _deactivate(self) -> None:
        self._is_active[self._staged] = False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        with self.stats.isolated():
            is_active_B = self._is_active[ctx.idx_mapping_np]
            if is_active_B.any():
                with self.stats.isolated():
                    self._apply(logits, ctx, is_active_B)
                self._report(ctx, is_active_B)
        return logits

    def _apply(self, logits: torch.Tensor, ctx: LogitsContext, is_active_B: np.ndarray) -> None:
        rows_R = self._rows(is_active_B, ctx, len(logits))
        chosen = slice(None) if rows_R is None else rows_R
        slot_R = ctx.expanded_idx_mapping[chosen].long()
        position_R = ctx.pos[chosen].long()
        # No wider than the requests of this step need, whatever others asked for before.
        slots = ctx.idx_mapping_np[is_active_B]
        width = int(self._stop_width_S[slots].max())
        # A row's input is the token before it: the last one sampled, or a draft.
        reads_last_token = self._reads_last_token[slots].any()
        last_token_R = ctx.input_ids[chosen].long() if reads_last_token else None
        stop_ids_RE = self._stop_ids_SE[:, :width][slot_R]
        self.stats.apply(
            logits,
            Controls.of(self._numbers_SF[slot_R], stop_ids_RE, last_token_R),
            rows_R,
            slot_R=slot_R,
            position_R=position_R,
            offset_R=ctx.expanded_local_pos[chosen].long(),
            samples_R=position_R + 1 >= self._states.prefill_len.gpu[slot_R],
        )

    def _report(self, ctx: LogitsContext, is_active_B: np.ndarray) -> None:
        slots = ctx.idx_mapping_np[is_active_B]
        positions = np.flatnonzero(is_active_B).tolist()
        self.stats.end_step(
            positions, slots.astype(np.int64), self._may_end_anywhere[slots].tolist()
        )

    def _rows(self, is_active_B: np.ndarray, ctx: LogitsContext, rows: int) -> torch.Tensor | None:
        """The active requests' rows; None for all. Only a batch that mixes active requests,
        others and drafts has to ask the device."""
        if is_active_B.all():
            return None
        if rows == len(is_active_B):
            return self._staging.to_device(np.flatnonzero(is_active_B))
        is_active_S = self._staging.to_device(self._is_active)
        return is_active_S[ctx.expanded_idx_mapping.long()].nonzero().flatten()
