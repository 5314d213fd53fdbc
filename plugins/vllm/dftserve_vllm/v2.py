"""The V2 model runner's logits processor.

V2 calls it before the temperature, with unscaled rows, keyed by a request's slot; a request has
several rows under speculative decoding. It does nothing if no request of the batch is active.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from dftserve.sampling import SlotControls, Step, Texts
from dftserve.sampling.dry import SlotRepeats
from dftserve.sampling.step import Penalties
from dftserve_vllm import styles, vocabulary
from dftserve_vllm.dry import dry_controls
from dftserve_vllm.extra_args import active_request
from dftserve_vllm.worker_state import WorkerState

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


PART_BYTES = 1 << 30
"""Size of the float32 logits of drafts that vLLM verifies at once (`MAX_CHUNK_BYTES` of
rejection_sampler.py). More are verified in parts, and a processor does not learn the parts'
positions in the batch."""


class V2Processor(LogitsProcessor):
    """Keeps one row of controls for each slot; a step reads them, and the runner's own device
    state, by slot."""

    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState) -> None:
        speculative = vllm_config.speculative_config
        drafts = speculative.num_speculative_tokens if speculative is not None else 0
        self._runner_states = req_states
        classes = vocabulary.token_classes(vllm_config)
        slots, device = req_states.max_num_reqs, req_states.device
        self._styles = styles.of_engine(vllm_config)
        self.state = WorkerState(slots, 1 + drafts, device, classes, self._styles.profiles)
        self._controls = SlotControls(slots, device)
        self._repeats = SlotRepeats(slots, device)
        self._breakers = vocabulary.breakers(vllm_config)
        self._rows_per_request = 1 + drafts
        self._verified_rows = slots * (1 + drafts) if drafts else 0
        self._is_active = np.zeros(slots, dtype=bool)
        self._reports_each_step = np.zeros(slots, dtype=bool)
        self._reads_last_token = np.zeros(slots, dtype=bool)
        self._has_style = np.zeros(slots, dtype=bool)
        self._staged: list[int] = []
        self._arrivals = count()

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Register a request; returns whether its rows are to be changed. vLLM does not report when
        a request leaves its slot, so the slot's previous request is closed here."""
        self._is_active[req_idx] = False
        self._controls.clear(req_idx)
        self._repeats.clear(req_idx)
        with self.state.isolated(partial(self._drop, (req_idx,))):
            self._is_active[req_idx] = self._open(req_idx, sampling_params)
        return bool(self._is_active[req_idx])

    def _open(self, slot: int, sampling_params: "SamplingParams") -> bool:
        request = active_request(
            sampling_params,
            temperature_applied=False,
            arrivals=self._arrivals,
            styles=self._styles,
        )
        if request is None:
            self.state.close(slot)
            return False
        produced = (
            self._runner_states.prefill_len.np[slot] - self._runner_states.prompt_len.np[slot]
        )
        self.state.open(slot, request.identity, int(produced), request.group)
        self._reports_each_step[slot] = request.reports_each_step
        self._reads_last_token[slot] = request.controls.reads_last_token
        self._has_style[slot] = request.controls.has_style
        if request.diversity.dry is not None:
            self._repeats.put(slot, dry_controls(request.diversity.dry, self._breakers))
        self._controls.put(slot, request.controls)
        self._staged.append(slot)
        return True

    def apply_staged_writes(self) -> None:
        """Copy new requests' controls to the device; if it fails, their rows stay unchanged."""
        if self._staged:
            with self.state.isolated(partial(self._drop, self._staged)):
                self._controls.on_device()
            self._staged.clear()

    def _drop(self, slots: Sequence[int]) -> None:
        """Deactivate slots after a fault, on the device too."""
        for slot in slots:
            self._is_active[slot] = False
            self._controls.clear(slot)
            self._repeats.clear(slot)
            self.state.close(slot)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        with self.state.isolated():
            is_active_B = self._is_active[ctx.idx_mapping_np]
            if is_active_B.any():
                with self.state.isolated():
                    self._apply(logits, ctx, is_active_B)
                if 4 * self._verified_rows * logits.shape[1] <= PART_BYTES:
                    self._report(ctx, is_active_B)
        return logits

    def _apply(self, logits: torch.Tensor, ctx: LogitsContext, is_active_B: np.ndarray) -> None:
        """Apply to all rows of the batch, in the runner's own order; the controls on the device
        determine which of them are active."""
        slots = ctx.idx_mapping_np[is_active_B]
        reads_last_token = self._reads_last_token[slots].any()
        has_dry_B = is_active_B & self._repeats.has(ctx.idx_mapping_np)
        # `to` copies nothing: the runner's tensors already have these types.
        step = Step(
            # Copies only if an earlier copy failed.
            self._controls.on_device(),
            ctx.expanded_idx_mapping.to(torch.int64),
            ctx.pos.to(torch.int64),
            ctx.expanded_local_pos.to(torch.int32),
            # A row's input is the token before it: the last one sampled, or a draft.
            ctx.input_ids.to(torch.int32) if reads_last_token else None,
            known_S=self._runner_states.prefill_len.gpu.to(torch.int32),
            has_idle_rows=not is_active_B.all(),
            texts=self._texts(ctx) if self._has_style[slots].any() else None,
            penalties=self._penalties(ctx, has_dry_B) if has_dry_B.any() else (),
        )
        drawn_by_code = int(self.state.drawn_by_code(slots).sum())
        self.state.apply(logits, step, self._most_rows(ctx, drawn_by_code))

    def _texts(self, ctx: LogitsContext) -> Texts:
        """The runner's own tensors: committed tokens by slot; drafts are among the rows' inputs."""
        return Texts(
            self._runner_states.all_token_ids.gpu,
            self._runner_states.prompt_len.gpu.to(torch.int32),
            ctx.pos.to(torch.int64),
            ctx.input_ids.to(torch.int32),
        )

    def _penalties(self, ctx: LogitsContext, has_dry_B: np.ndarray) -> Iterable[Penalties]:
        slots = ctx.idx_mapping_np[has_dry_B]
        return self._repeats.penalties(
            self._texts(ctx),
            ctx.expanded_idx_mapping.to(torch.int64),
            ctx.expanded_local_pos.to(torch.int32),
            slots=slots,
            most_rows=self._most_rows(ctx, len(slots)),
            # vLLM pads this array to the size of a CUDA graph; the batch comes first.
            longest_text=int(ctx.seq_lens_upper_bound_np[: len(has_dry_B)][has_dry_B].max()),
        )

    def _most_rows(self, ctx: LogitsContext, requests: int) -> int:
        """Upper bound on the rows of this many requests: with drafts, only the device has the
        number and the positions of each request's rows."""
        return min(len(ctx.expanded_idx_mapping), requests * self._rows_per_request)

    def _report(self, ctx: LogitsContext, is_active_B: np.ndarray) -> None:
        slots = ctx.idx_mapping_np[is_active_B]
        self.state.end_step(
            np.flatnonzero(is_active_B), slots.astype(np.int64), self._reports_each_step[slots]
        )
