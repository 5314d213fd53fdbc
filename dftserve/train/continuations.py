"""The model's own continuations of a text at many positions, all positions of a batch at once.

At an anchor, a position of a document, S samples of G tokens are drawn, each continuing the
document up to there (strided block-parallel sampling, arXiv 2603.12248, section 4). They follow the
row's text in one sequence, and an attention mask lets each attend only to its own past:

    row        t₀ t₁ t₂ t₃ t₄ t₅ …    the text, N tokens
    step 0     a₀ b₀ …                 first tokens of all samples of all anchors, K·S of them
    step 1     a₁ b₁ …                 a₁ attends to t₀ … up to its anchor, a₀ and itself

so that one forward pass replaces K·S passes over a document and a continuation.

Shapes: B rows, N tokens of a row's text, K anchors of a row (of the row with most), S samples of an
anchor, G tokens of a continuation, Q = N + G·K·S, V vocabulary, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from dftserve.lm import LanguageModel, evaluating
from dftserve.train.head import chunks


@dataclass(frozen=True, eq=False)
class Anchors:
    """Where continuations begin: after the token at `places_BK` of a row.

    Every anchor is followed by G trained tokens of its document: the text's own continuation.
    """

    places_BK: Tensor
    """int64 positions in a row; filled with 0 where a row has fewer anchors than another."""
    is_real_BK: Tensor
    """bool: False for filled entries."""

    def __len__(self) -> int:
        return int(self.is_real_BK.sum())

    @staticmethod
    def draw(
        batch: Mapping[str, Tensor], *, length: int, every: int, source: np.random.Generator
    ) -> "Anchors":
        """Anchors at every `every`-th trained token of a document, from a random first one.

        A run of trained tokens that is shorter than `length` has no anchor, one that is shorter
        than `every` has one.
        """
        rows, tokens = batch["input_ids"].shape
        positions_T = batch["positions_T"].cpu().numpy()
        runs = np.split(positions_T, np.flatnonzero(np.diff(positions_T) != 1) + 1)
        places_of_rows: list[list[int]] = [[] for _ in range(rows)]
        for run in runs:
            room = len(run) - length
            if room < 0:
                continue
            first = int(source.integers(min(every, room + 1)))
            places_of_rows[int(run[0]) // tokens] += [
                int(run[k]) for k in range(first, room + 1, every)
            ]
        most = max(map(len, places_of_rows))
        places_BK = np.zeros((rows, most), np.int64)
        is_real_BK = np.zeros((rows, most), bool)
        for row, places in enumerate(places_of_rows):
            places_BK[row, : len(places)] = np.array(places, np.int64) % tokens
            is_real_BK[row, : len(places)] = True
        device = batch["input_ids"].device
        return Anchors(
            torch.from_numpy(places_BK).to(device), torch.from_numpy(is_real_BK).to(device)
        )


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions and attention mask of a batch's text followed by its continuations."""

    places_BK: Tensor
    tokens: int
    """N."""
    samples: int
    length: int
    position_BQ: Tensor
    mask_BQQ: Tensor
    """bool: whether the query (first index) attends to the key."""

    @staticmethod
    def of(
        batch: Mapping[str, Tensor], places_BK: Tensor, *, samples: int, length: int
    ) -> "Layout":
        position_BN = positions_of(batch)
        rows, tokens = position_BN.shape
        anchors = places_BK.shape[1]
        block = anchors * samples
        # One number for each sample of each anchor, and its position in the row.
        place_BX = places_BK.repeat_interleave(samples, dim=1)
        at_BX = position_BN.gather(1, place_BX)
        later_BGX = at_BX[:, None] + 1 + torch.arange(length, device=at_BX.device)[:, None]
        position_BQ = torch.cat([position_BN, later_BGX.reshape(rows, length * block)], dim=1)

        # Text attends to its document up to itself. A document begins where its position is 0.
        document_BN = (position_BN == 0).cumsum(dim=1)
        order_N = torch.arange(tokens, device=place_BX.device)
        of_text_BNN = (document_BN[:, :, None] == document_BN[:, None]) & (
            order_N[:, None] >= order_N
        )
        # A continuation attends to the same text as its anchor, and to its own tokens.
        prefix_BXN = of_text_BNN.gather(1, place_BX[:, :, None].expand(-1, -1, tokens))
        step_Y = torch.arange(length, device=place_BX.device).repeat_interleave(block)
        sample_Y = torch.arange(block, device=place_BX.device).repeat(length)
        own_YY = (sample_Y[:, None] == sample_Y) & (step_Y[:, None] >= step_Y)
        mask_BQQ = torch.zeros(
            rows, tokens + len(step_Y), tokens + len(step_Y), dtype=torch.bool, device=own_YY.device
        )
        mask_BQQ[:, :tokens, :tokens] = of_text_BNN
        mask_BQQ[:, tokens:, :tokens] = prefix_BXN.repeat(1, length, 1)
        mask_BQQ[:, tokens:, tokens:] = own_YY
        return Layout(places_BK, tokens, samples, length, position_BQ, mask_BQQ)

    @property
    def block(self) -> int:
        """K·S: continuations of a row."""
        return self.places_BK.shape[1] * self.samples

    def step(self, step: int) -> slice:
        """The slice of the sequence with the tokens of all continuations at one step."""
        return slice(self.tokens + step * self.block, self.tokens + (step + 1) * self.block)

    def inputs(self, ids: Tensor, queries: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's inputs for these tokens; earlier tokens, if any, must be in its cache."""
        seen_BqQ = self.mask_BQQ[:, queries, : queries.stop]
        hidden = torch.zeros(seen_BqQ.shape, dtype=dtype, device=ids.device)
        hidden.masked_fill_(~seen_BqQ, torch.finfo(dtype).min)
        return {
            "input_ids": ids,
            "position_ids": self.position_BQ[:, queries],
            "attention_mask": hidden[:, None],
        }

    def all_inputs(self, text_BN: Tensor, continuations_BKSG: Tensor, dtype: torch.dtype):
        """The model's inputs for the text with its continuations."""
        ids_BQ = torch.cat([text_BN, _by_step(continuations_BKSG)], dim=1)
        return self.inputs(ids_BQ, slice(0, ids_BQ.shape[1]), dtype)

    def predicting_positions(self) -> Tensor:
        """int64 [B, K, S, G]: the position in the sequence that predicts each token."""
        rows, anchors = self.places_BK.shape
        first_BKS1 = self.places_BK[:, :, None, None].expand(-1, -1, self.samples, 1)
        later_Y = torch.arange(
            self.tokens, self.step(self.length - 1).start, device=self.places_BK.device
        )
        later_KSG = later_Y.reshape(self.length - 1, anchors, self.samples).permute(1, 2, 0)
        return torch.cat([first_BKS1, later_KSG.expand(rows, -1, -1, -1)], dim=3)

    def predicting_states(self, hidden_BQD: Tensor) -> Tensor:
        """[B, K, S, G, D]: the hidden states that predict each token of the continuations."""
        at_BKSG = self.predicting_positions()
        taken_BXD = _gather(hidden_BQD, at_BKSG.flatten(1))
        return taken_BXD.reshape(*at_BKSG.shape, hidden_BQD.shape[-1])


def positions_of(batch: Mapping[str, Tensor]) -> Tensor:
    """int64 [B, N]: each token's position in its document, also for rows of one document with a
    mask."""
    if "position_ids" in batch:
        return batch["position_ids"]
    tokens = batch["input_ids"].shape[1]
    return torch.arange(tokens, device=batch["input_ids"].device).expand_as(batch["input_ids"])


def _by_step(continuations_BKSG: Tensor) -> Tensor:
    """[B, G·K·S]: in the order of the sequence after the text."""
    return continuations_BKSG.permute(0, 3, 1, 2).flatten(1)


@torch.no_grad()
def sample(
    model: LanguageModel, text_BN: Tensor, layout: Layout, generator: torch.Generator
) -> Tensor:
    """Continuations int64 [B, K, S, G], drawn from the model's distribution at temperature 1.

    The text is read once; each step then reads one token of every continuation.

    Raises:
        ValueError: the model's states are not finite.
    """
    rows, anchors = layout.places_BK.shape
    cache, dtype = DynamicCache(), model.model.dtype
    text = layout.inputs(text_BN, slice(0, layout.tokens), dtype)
    hidden_BND = model.states_with_cache(cache, **text).hidden_BND
    # On a GPU, drawing from NaN would end the process with an error of CUDA.
    if not bool(hidden_BND.isfinite().all()):
        raise ValueError(
            "feature_matching: the model's states are not finite. Lower learning_rate, or look for "
            "a damaged model."
        )
    place_BX = layout.places_BK.repeat_interleave(layout.samples, dim=1)
    hidden_BXD = _gather(hidden_BND.reshape(rows, layout.tokens, -1), place_BX)
    drawn_GBX: list[Tensor] = []
    for step in range(layout.length):
        drawn_GBX.append(_sample(model, hidden_BXD, generator))
        if step + 1 < layout.length:
            inputs = layout.inputs(drawn_GBX[-1], layout.step(step), dtype)
            hidden_BXD = model.states_with_cache(cache, **inputs).hidden_BND
            hidden_BXD = hidden_BXD.reshape(rows, layout.block, -1)
    stacked_GBX = torch.stack(drawn_GBX)
    return stacked_GBX.permute(1, 2, 0).reshape(rows, anchors, layout.samples, layout.length)


def _gather(values_BND: Tensor, places_BX: Tensor) -> Tensor:
    """[B, X, D]: the values at `places_BX` of each row."""
    return values_BND.gather(1, places_BX[:, :, None].expand(-1, -1, values_BND.shape[-1]))


def _sample(model: LanguageModel, hidden_BXD: Tensor, generator: torch.Generator) -> Tensor:
    """One sampled token for each hidden state, int64 [B, X]."""
    head = model.head
    hidden_RD = hidden_BXD.flatten(0, 1)
    tokens = [
        torch.multinomial(head.logits(hidden_RD[part]).softmax(dim=1), 1, generator=generator)
        for part in chunks(len(hidden_RD), len(head.weight_VD), hidden_RD.device.type)
    ]
    return torch.cat(tokens).reshape(hidden_BXD.shape[:2])


# ── The check before a run ───────────────────────────────────────────────────────────────────────


def check(model: LanguageModel, longest: int) -> None:
    """Refuse a model that reads continuations together differently from each one alone.

    This detects attention that a mask does not control: sliding windows shorter than the documents,
    chunks, recurrent states.

    Args:
        longest: tokens of the longest document.

    Raises:
        ValueError: the results differ; names the family.
    """
    tokens = max(longest, 2 * LENGTH)
    text_N = model.text_N.repeat(-(-tokens // len(model.text_N)))[:tokens].to(model.model.device)
    row_1N = torch.cat([text_N[:LENGTH].flip(0), text_N])[None]
    position_1N = torch.cat([torch.arange(LENGTH), torch.arange(tokens)])[None]
    batch = {"input_ids": row_1N, "position_ids": position_1N.to(row_1N.device)}
    places_1K = torch.tensor([[LENGTH + LENGTH // 2, LENGTH + tokens - LENGTH - 1]])
    layout = Layout.of(batch, places_1K.to(row_1N.device), samples=2, length=LENGTH)
    vocabulary = len(model.head.weight_VD)
    shape = (1, 2, 2, LENGTH)
    drawn = torch.arange(4 * LENGTH).reshape(shape) * 7919 % vocabulary
    drawn = drawn.to(row_1N.device)
    try:
        with evaluating(model.model), torch.no_grad():
            difference = _difference(model, row_1N, layout, drawn)
    except Exception as error:  # A family that fails on such a mask is refused with its error.
        line = " ".join(str(error).split())[:200]
        raise _refusal(model, f"{type(error).__name__}: {line}") from error
    if not difference <= model.tolerance:
        raise _refusal(model, f"they change by {difference:.1g} of their spread")


LENGTH = 4
"""Tokens of the continuations that the check reads."""


def _refusal(model: LanguageModel, why: str) -> ValueError:
    return ValueError(
        f"{model.family} does not read continuations together as it reads each one alone: {why}; "
        "accepted for feature_matching: attention that a mask of queries and keys fully controls. "
        "Lower max_length to what a layer attends to, or leave feature_matching out."
    )


def _difference(model: LanguageModel, row_1N: Tensor, layout: Layout, drawn_1KSG: Tensor) -> float:
    """The largest difference of log-probabilities, relative to their spread, between each
    continuation read alone after its document and the whole sequence, read both at once and step by
    step."""
    whole = layout.all_inputs(row_1N, drawn_1KSG, model.model.dtype)
    at_KSG = layout.predicting_positions()[0]
    together_KSGV = _logprobs(model, model.states(**whole).hidden_BND, at_KSG)
    cache = DynamicCache()
    ids_1Q = whole["input_ids"]
    parts = [slice(0, layout.tokens), *(layout.step(step) for step in range(layout.length))]
    read = [
        model.states_with_cache(
            cache, **layout.inputs(ids_1Q[:, part], part, model.model.dtype)
        ).hidden_BND.reshape(1, part.stop - part.start, -1)
        for part in parts
    ]
    by_steps_KSGV = _logprobs(model, torch.cat(read, dim=1), at_KSG)
    largest, spread = 0.0, 1e-12
    for k, place in enumerate(layout.places_BK[0].tolist()):
        for s in range(layout.samples):
            alone_1M = torch.cat([row_1N[0, LENGTH : place + 1], drawn_1KSG[0, k, s]])[None]
            at_G = torch.arange(place - LENGTH, place - LENGTH + layout.length)
            hidden = model.states(input_ids=alone_1M).hidden_BND
            alone_GV = _logprobs(model, hidden, at_G)
            spread = max(spread, float(alone_GV.std(dim=-1).mean()))
            for logprobs_KSGV in (together_KSGV, by_steps_KSGV):
                largest = max(largest, float((logprobs_KSGV[k, s] - alone_GV).abs().max()))
    return largest / spread


def _logprobs(model: LanguageModel, hidden_BND: Tensor, at: Tensor) -> Tensor:
    """[*at, V]: at positions of the only row."""
    hidden = hidden_BND.reshape(-1, hidden_BND.shape[-1])[at.to(hidden_BND.device)]
    return model.head.logits(hidden).log_softmax(-1)
