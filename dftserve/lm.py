"""A causal language model's hidden states and its head, checked against the model's own logits.

    model = pretrained.load(found, dtype=torch.float32)
    lm = LanguageModel(model, found.name)          reproduces the model's own logits, or ValueError
    hidden_BND = lm.states(input_ids=ids_BN).hidden_BND
    lm.head.logits(hidden_BND.flatten(0, 1)[positions_T])

`states` runs the model's own forward with the output layer bypassed: the layer's input is captured,
and the logits of a whole batch are never computed. If the family rescales its logits afterwards (a
scale, a soft cap), `Head` must be able to reproduce it; the constructor of `LanguageModel` finds
the right scale and cap by comparing logits.

Shapes: B rows of tokens, N tokens of a row, R rows of a chunk, D hidden size, V vocabulary.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from dftserve.model_config import (
    AUXILIARY_WEIGHTS,
    CAPS,
    CHUNK,
    ORIGINAL,
    SCALES,
    attention_chunk,
    original_length,
    positions_of,
    rescaled_beyond,
    rescalings,
)
from dftserve.pretrained import one_line

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Maximal difference of two computations of the same logits, relative to the largest logit."""
HALF_TOLERANCE = 0.02
"""The same in bfloat16 and float16."""
PROBE_TOKENS = 24
"""Tokens of each text that a check reads, unless a length is given."""
COMPARED = 64
"""Positions of a long text, at equal distances, whose log-probabilities are compared."""
F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Decorates a function that runs inside a model compiled by torch.compile and replaces methods,
    which cannot be compiled. The model that the function calls is still compiled."""
    return cast(F, torch.compiler.disable(function, recursive=False))


def never_compiled(function: F) -> F:
    """Decorates a function that torch.compile must not compile, nor anything that it calls."""
    return cast(F, torch.compiler.disable(function))


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: cap·tanh(scale·(h Wᵀ + b)/cap)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] in float32, or in float64 if the hidden states are; differentiable."""
        return self.rescaled(nn.functional.linear(hidden_RD, self.weight_VD, self.bias_V))

    def rescaled(self, raw_RV: Tensor) -> Tensor:
        """Apply scale and cap to the linear layer's output."""
        logits_RV = raw_RV if raw_RV.dtype is torch.float64 else raw_RV.float()
        logits_RV = logits_RV * self.scale
        return logits_RV if self.cap is None else self.cap * (logits_RV / self.cap).tanh()


@dataclass(frozen=True, eq=False)
class States:
    """The result of one forward pass without the output layer."""

    hidden_BND: Tensor
    """The input of the output layer."""
    auxiliary: Tensor | None
    """The router's loss times its weight, if the configuration enables it."""


class LanguageModel:
    """A causal LM whose logits can be computed from its hidden states, chunk by chunk.

    The constructor compares them with the model's own logits, and checks that no position depends
    on later tokens or on the other rows of a batch.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, tokens_N: Sequence[int] | None = None
    ) -> None:
        """
        Args:
            model: its current `forward` will be called; its mode (training or evaluation) does not
                change.
            name: the model's name in error messages.
            tokens_N: a text for the checks; None: token ids spread over the vocabulary.

        Raises:
            ValueError: a family whose logits are not reproduced, or a model that is not causal;
                names the family and the reason.
        """
        self.model, self.name = model, name
        self._forward = model.forward
        self._accepts = inspect.signature(model.forward).parameters
        self._layer = self._linear()
        self._captured: list[Tensor] = []
        self._capture = _capturing(self._captured)
        self._config = model.config.get_text_config()
        self._scale, self._cap = 1.0, None
        self.text_N = _text(tokens_N, self._config.vocab_size)
        with evaluating(model), torch.no_grad():
            logits_NV = self._check_head()
            self._check_rows(logits_NV)

    @property
    def family(self) -> str:
        return f"{self.name} ({type(self.model).__name__})"

    @property
    def head(self) -> Head:
        """Created on each access: the layer's weights may be replaced, or gathered from shards."""
        return Head(self._layer.weight, self._layer.bias, self._scale, self._cap)

    @property
    def positions(self) -> int | None:
        return positions_of(self._config)

    def check_reads(self) -> None:
        """Raises ValueError if the forward fails, as it may after weights were cast."""
        with evaluating(self.model), torch.no_grad():
            ids_1N = self.text_N[None, :PROBE_TOKENS].to(self.model.device)
            self._tried(self.states, input_ids=ids_1N)

    def states(self, **inputs: Tensor) -> States:
        """The model's own forward up to its output layer.

        Args:
            inputs: `input_ids` int64 [B, N]; and `position_ids` or `attention_mask`, of the same
                type and shape; the mask may also be a float [B, 1, N, N] that is added to attention
                scores.
        """
        return self._states(inputs, None)

    def states_with_cache(self, cache: Cache, **inputs: Tensor) -> States:
        """`states` for tokens that follow those in the cache, to which their keys and values are
        added; the mask is a float [B, 1, N, tokens of the cache and N]."""
        return self._states(inputs, cache)

    @uncompiled
    def _states(self, inputs: Mapping[str, Tensor], cache: Cache | None) -> States:
        with self._bypassed_head() as inputs_of_head:
            output = self._forward(**self._accepted_inputs(inputs, cache))
            captured = list(inputs_of_head)
        if len(captured) != 1:
            raise ValueError(
                f"{self.family} uses its output layer {len(captured)} times in one forward; "
                "accepted: once."
            )
        return States(captured[0], self._auxiliary(output))

    def layer_states(self, layers: Sequence[int], **inputs: Tensor) -> list[Tensor]:
        """The output [B, N, D] of each of these layers, counted from 1; 0 is the embedding.

        Raises:
            ValueError: the family does not return them.
        """
        with self._bypassed_head():
            output = self._forward(**self._accepted_inputs(inputs), output_hidden_states=True)
        states = getattr(output, "hidden_states", None)
        shape = inputs["input_ids"].shape
        if states is None or len(states) <= max(layers) or states[0].shape[:2] != shape:
            raise ValueError(
                f"{self.family} does not return the hidden states of its layers; accepted: a model "
                "that supports output_hidden_states."
            )
        return [states[layer] for layer in layers]

    def own_logits(self, **inputs: Tensor) -> Tensor:
        """The logits that the model itself computes: [B, N, V], float32 or wider."""
        logits_BNV = self._forward(**self._accepted_inputs(inputs)).logits
        return logits_BNV if logits_BNV.dtype is torch.float64 else logits_BNV.float()

    def packing_leak(
        self, longest: int = PROBE_TOKENS, row: int = 2 * PROBE_TOKENS, *, most: int | None = None
    ) -> str | None:
        """Why documents must not share a row; None if the model keeps packed documents separate.

        A text as long as the longest document is read alone, and in a row that is filled with its
        copies after another text; and its beginning is read alone, and before the whole text. All
        must give the same log-probabilities. Full rows reveal effects that begin far into a row:
        attention in chunks, rescaled positions.

        Args:
            longest: tokens of the longest document.
            row: tokens of the longest row.
            most: maximal number of tokens to read at once; longer rows are judged only by the
                lengths in the configuration. None: no limit.

        Raises:
            ValueError: the model cannot read so many tokens.
        """
        if "position_ids" not in self._accepts and not self._takes_any:
            return "its forward takes no position_ids"
        if most is not None and max(longest, row) > most:
            for name, length, reached in (
                (CHUNK, attention_chunk(self._config), row),
                (ORIGINAL, rescaled_beyond(self._config), longest),
            ):
                if length is not None and reached > length:
                    return f"its {name} is {length:,}, and there are {reached:,} tokens"
            longest, row = min(longest, (most - PROBE_TOKENS) // 2), min(row, most)
        longest = max(longest, PROBE_TOKENS)
        text_N = _repeated(self.text_N[PROBE_TOKENS:], longest)
        # An odd number of tokens, so that no copy begins at the start of a chunk.
        before_N = (self.text_N[: PROBE_TOKENS - 1].flip(0) + 1) % self._config.vocab_size
        copies = max(1, (row - len(before_N)) // longest)
        full = [before_N, *[text_N] * copies]
        starts = len(before_N) + longest * torch.arange(copies)
        seen_P = _spread_over(longest, max(2, COMPARED // copies))
        short = min(PROBE_TOKENS, longest)
        beginning_P = torch.arange(short)
        with evaluating(self.model), torch.no_grad():
            alone_PV = self._packed_logprobs([text_N], seen_P)
            behind_CV = self._packed_logprobs(full, (starts[:, None] + seen_P).flatten())
            before_PV = self._packed_logprobs([text_N[:short]], beginning_P)
            beside_PV = self._packed_logprobs([text_N[:short], text_N], beginning_P)
        gaps = (behind_CV - alone_PV.repeat(copies, 1), beside_PV - before_PV)
        difference = max(float(gap.abs().max()) for gap in gaps) / self._spread(alone_PV)
        if difference <= self.tolerance:
            return None
        return (
            f"a document's log-probabilities change by {difference:.1g} of their spread with the "
            "others in its row"
        )

    def check_batch(self, longest: int, *, most: int | None = None) -> None:
        """Refuse a model whose results for a text change with a longer text in the same batch.

        Args:
            longest: tokens of the longest document.
            most: as in `packing_leak`.

        Raises:
            ValueError: they change, or the model cannot read so many tokens.
        """
        if longest <= PROBE_TOKENS:
            return
        if most is not None and longest > most:
            beyond = rescaled_beyond(self._config)
            if beyond is not None and longest > beyond:
                raise self._batch_error(longest, "its positions are rescaled")
            longest = most
        text_N = _repeated(self.text_N, longest)
        ids_2N, mask_2N = text_N.repeat(2, 1), torch.ones(2, longest, dtype=torch.int64)
        ids_2N[1, PROBE_TOKENS:] = mask_2N[1, PROBE_TOKENS:] = 0
        device = self.model.device
        inputs = {"input_ids": ids_2N.to(device), "attention_mask": mask_2N.to(device)}
        alone = {name: value[1:, :PROBE_TOKENS] for name, value in inputs.items()}
        with evaluating(self.model), torch.no_grad():
            beside_NV, alone_NV = (
                self._states_logprobs(each, torch.arange(PROBE_TOKENS)) for each in (inputs, alone)
            )
        # The mean, not the maximum: a router may route a single token differently in a batch.
        difference = float((beside_NV - alone_NV).abs().mean()) / self._spread(alone_NV)
        if difference > self.tolerance:
            raise self._batch_error(
                longest, f"its log-probabilities change by {difference:.1g} of their spread"
            )

    def _batch_error(self, longest: int, why: str) -> ValueError:
        return ValueError(
            f"{self.family} reads a text differently with one of {longest:,} tokens in its batch: "
            f"{why}{original_length(self._config)}; accepted: a max_length up to which it does "
            "not, or batch_size 1 (with accumulation instead)."
        )

    # ── Checks ───────────────────────────────────────────────────────────────────────────────────

    def _linear(self) -> nn.Linear:
        layer = self.model.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            got = (
                "no output layer" if layer is None else f"a {type(layer).__name__} as output layer"
            )
            raise ValueError(
                f"{self.family} has {got}; accepted: a torch Linear. "
                "Leave the head (lm_head) out of the adapter's modules."
            )
        return layer

    def _check_head(self) -> Tensor:
        """Choose scale and cap so that our logits equal the model's own; returns those, [N, V]."""
        ids_1N = self.text_N[None].to(self.model.device)
        raw: list[Any] = []
        keep = self._layer.register_forward_hook(lambda layer, given, output: raw.append(output))
        try:
            own_NV = self._tried(self.own_logits, input_ids=ids_1N)
        finally:
            keep.remove()
        shape = (len(self.text_N), self._layer.out_features)
        if len(raw) != 1 or own_NV.shape != (1, *shape) or raw[0].numel() != own_NV.numel():
            raise ValueError(
                f"{self.family} makes logits of {tuple(own_NV.shape)} for a text of {shape[0]} "
                f"tokens, by {len(raw)} uses of an output layer of {shape[1]} columns; accepted: "
                "one use, whose output becomes the logits."
            )
        own_NV, gaps = own_NV[0], {}
        if not bool(own_NV.isfinite().all()):
            raise ValueError(
                f"{self.family} has logits that are not finite; its weights are damaged, or its "
                "dtype is too narrow. Copy the model again, or load it in float32."
            )
        for scale, cap in rescalings(self._config):
            self._scale, self._cap = scale, cap
            gap = _gap(self.head.rescaled(raw[0]).reshape(shape), own_NV)
            gaps[scale, cap] = gap
            if gap <= self.tolerance:
                break
        else:
            raise ValueError(
                f"{self.family} computes its logits in an unsupported way: they differ from those "
                f"of its output layer by {min(gaps.values()):.2g} of the largest. "
                f"Accepted: a linear layer, a factor ({', '.join(SCALES)}) and a soft cap "
                f"({', '.join(CAPS)}). Serve this model with vLLM and use the served teacher."
            )
        hidden_BND = self._tried(self.states, input_ids=ids_1N).hidden_BND
        ours_NV = self.head.logits(hidden_BND.reshape(shape[0], -1))
        if not (gap := _gap(ours_NV, own_NV)) <= self.tolerance:
            raise ValueError(
                f"{self.family}: logits from its hidden states differ from its own by {gap:.2g} of "
                "the largest; it cannot be used without its output layer."
            )
        return own_NV

    def _check_rows(self, logits_NV: Tensor) -> None:
        """Check in a batch that neither a different ending nor padding changes earlier logits."""
        count = len(self.text_N) // 2
        ids_2N = self.text_N.repeat(2, 1)
        ids_2N[0, count:] = (ids_2N[0, count:].flip(0) + 1) % self._config.vocab_size
        mask_2N = torch.ones_like(ids_2N)
        ids_2N[1, count:] = mask_2N[1, count:] = 0
        device = self.model.device
        inputs = {"input_ids": ids_2N.to(device), "attention_mask": mask_2N.to(device)}
        hidden_BND = self._tried(self.states, **inputs).hidden_BND
        found_2NV = self.head.logits(hidden_BND.reshape(2, len(self.text_N), -1)[:, :count])
        difference_2NV = (found_2NV - logits_NV[:count]).abs()
        # The mean: in half precision a router may route a single token differently in a batch.
        means_2 = difference_2NV.mean((1, 2))
        for difference, what in zip(means_2, ("another ending", "padding"), strict=True):
            if not float(difference) <= self.tolerance * self._spread(logits_NV):
                raise ValueError(
                    f"{self.family} is not causal: {what} behind a text changes the logits before "
                    "it; accepted: a decoder-only language model."
                )

    def _tried(self, call: Any, **inputs: Tensor) -> Any:
        """Refuse a family whose forward fails on plain text, with its error as the reason."""
        try:
            return call(**inputs)
        except Exception as error:
            raise ValueError(
                f"{self.family} does not read plain text: {type(error).__name__}: "
                f"{one_line(error)}."
            ) from error

    def _packed_logprobs(self, texts: Sequence[Tensor], at_P: Tensor) -> Tensor:
        """[P, V]: of the texts packed into one row, with positions that restart at each text."""
        device = self.model.device
        positions_N = torch.cat([torch.arange(len(text_N)) for text_N in texts])
        row_N = torch.cat(list(texts))
        inputs = {"input_ids": row_N[None].to(device), "position_ids": positions_N[None].to(device)}
        return self._states_logprobs(inputs, at_P)

    def _states_logprobs(self, inputs: Mapping[str, Tensor], at_P: Tensor) -> Tensor:
        """[P, V]: at positions of the last row."""
        rows, tokens = inputs["input_ids"].shape
        hidden_BND = self._tried(self.states, **inputs).hidden_BND.reshape(rows, tokens, -1)
        return self.head.logits(hidden_BND[-1, at_P.to(hidden_BND.device)]).log_softmax(-1)

    @property
    def tolerance(self) -> float:
        """Maximal difference of two computations of the same logits in this dtype, relative to
        their spread."""
        return TOLERANCE.get(self.model.dtype, HALF_TOLERANCE)

    @staticmethod
    def _spread(values_NV: Tensor) -> float:
        """The mean standard deviation of a row. Differences are measured relative to it, so that a
        random model, whose logits are nearly equal, is judged as strictly as a trained one."""
        return max(float(values_NV.std(dim=-1).mean()), 1e-12)

    # ── Calls ────────────────────────────────────────────────────────────────────────────────────

    @property
    def _takes_any(self) -> bool:
        kinds = [each.kind for each in self._accepts.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def _accepted_inputs(
        self, inputs: Mapping[str, Tensor], cache: Cache | None = None
    ) -> dict[str, Any]:
        accepted = {
            name: value
            for name, value in inputs.items()
            if name in self._accepts or self._takes_any or name == "input_ids"
        }
        settings: dict[str, Any] = {"use_cache": cache is not None, "return_dict": True}
        if cache is not None:
            settings["past_key_values"] = cache
        return accepted | {name: settings[name] for name in settings if name in self._accepts}

    @contextmanager
    def _bypassed_head(self) -> Iterator[list[Tensor]]:
        """Capture the output layer's inputs in the yielded list, in place of its work."""
        layer, before = self._layer, vars(self._layer).get("forward")
        layer.forward = self._capture  # type: ignore[method-assign]
        try:
            yield self._captured
        finally:
            self._captured.clear()  # Do not keep a batch's hidden states alive.
            del layer.forward
            if before is not None:
                layer.forward = before

    def _auxiliary(self, output: Any) -> Tensor | None:
        loss = getattr(output, "aux_loss", None)
        if not isinstance(loss, Tensor):
            return None
        owners = (self.model, self._config, getattr(self._config, "ffn_config", None))
        for owner, name in itertools.product(owners, AUXILIARY_WEIGHTS):
            weight = getattr(owner, name, None)
            if isinstance(weight, int | float):
                return weight * loss
        raise ValueError(
            f"{self.family}: its configuration enables the router's loss (output_router_logits) "
            f"without a weight for it; accepted: one of {', '.join(AUXILIARY_WEIGHTS)}."
        )


def _gap(ours_NV: Tensor, own_NV: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    largest = max(float(own_NV.abs().max()), 1e-12)
    return float((ours_NV - own_NV).abs().max()) / largest


def _text(tokens_N: Sequence[int] | None, vocabulary: int) -> Tensor:
    """int64 [2 · PROBE_TOKENS]."""
    count = 2 * PROBE_TOKENS
    if tokens_N is None or len(tokens_N) == 0:
        return torch.arange(count) * 7919 % vocabulary
    text_N = torch.as_tensor(list(tokens_N[:count]), dtype=torch.int64)
    return text_N.repeat(-(-count // len(text_N)))[:count]


def _repeated(text_N: Tensor, count: int) -> Tensor:
    """The text repeated to `count` tokens."""
    return text_N.repeat(-(-count // len(text_N)))[:count]


def _spread_over(count: int, some: int) -> Tensor:
    """At most `some` of `count` positions, evenly spaced, including the first and the last."""
    return torch.linspace(0, count - 1, min(some, count)).round().long()


def _capturing(captured: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A replacement for an output layer's forward: it appends its input to the list, and returns
    one column of it, which is enough for the code that follows the layer. One function serves all
    passes, because torch.compile recompiles a model for each function that it encounters."""

    @never_compiled
    def capture(hidden_BND: Tensor) -> Tensor:
        captured.append(hidden_BND)
        return hidden_BND[..., :1]

    return capture


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode, and restore its previous mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
