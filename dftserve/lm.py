"""A causal language model of transformers, loaded and checked before anything is made with it.

    found = examine("models/base")                 its files and configuration, no weights
    model = load(found, dtype=torch.float32)       safetensors only, every weight accounted for
    lm = LanguageModel(model, found.name)          reproduces the model's own logits, or ValueError
    hidden_BND = lm.states(input_ids=ids_BN).hidden_BND
    lm.head.logits(hidden_BND.flatten(0, 1)[positions_T])

The teacher, the trainer and the likelihood of texts all take their models from here, so a model
that one of them refuses is refused by all, for the same reason.

`states` runs the model's own forward with the output layer put out of use: what reaches that layer
is taken, and the logits of a whole batch are never made. What the family does to its logits after
that (a scale, a soft cap) must be what `Head` can do; which of it is found by comparing.

Shapes: B rows of tokens, N tokens of a row, R rows of a chunk, D hidden size, V vocabulary.
"""

import functools
import inspect
import itertools
import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.initialization import guard_torch_init_functions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dftserve import cpu
from dftserve.bounded_files import read_json
from dftserve.gguf import resolve
from dftserve.hub import WEIGHTS_TOO, folder_of, weights_digest
from dftserve.model_folder import (
    CONFIG,
    INDEX,
    LARGEST_TEXT,
    WEIGHTS,
    check_full_precision,
    check_model_folder,
    weight_files,
)

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Attributes of configurations that multiply or divide logits, each family as it likes."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
"""Attributes that bound what is read at once, whatever a family calls them (`n_positions` has the
first name too); the first that a configuration has."""
CHUNK, ORIGINAL = "attention_chunk_size", "original_max_position_embeddings"
"""Lengths that a configuration may name, beyond which a text is read otherwise."""
AUXILIARY_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""How far, of the largest logit, two ways to the same logits may lie apart."""
HALF_TOLERANCE = 0.02
PROBE_TOKENS = 24
"""Of each text that a check reads, where no length is named."""
COMPARED = 64
"""Positions of a long text, at equal distances, whose log-probabilities are compared."""
NAMED = 5
"""Weights that an error names; the rest are counted."""

logger = logging.getLogger(__name__)


# ── Before weights are loaded ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Examined:
    """A model of which only the configuration has been read."""

    folder: Path
    name: str
    """As the user gave it."""
    config: Any
    """A PretrainedConfig."""

    @property
    def vocabulary(self) -> int:
        """V: rows of the embedding."""
        return self.config.get_text_config().vocab_size

    @property
    def positions(self) -> int | None:
        """Tokens that the model can read at once; None where its configuration names no bound."""
        return _positions(self.config.get_text_config())

    def check_tokenizer(self, tokenizer: Sized) -> None:
        """Raises ValueError where the tokenizer has tokens that the embedding has not."""
        if len(tokenizer) > self.vocabulary:
            raise ValueError(
                f"{self.name}: its tokenizer has {len(tokenizer):,} tokens and its embedding "
                f"{self.vocabulary:,}; accepted: no more tokens than rows. Take the tokenizer that "
                "belongs to it, or resize the embedding and save the model."
            )

    def check_length(self, longest: int, setting: str) -> None:
        """Refuse texts that are longer than the model's positions.

        Args:
            longest: tokens of the longest text that would be read at once.
            setting: what bounds it, for the error.
        """
        if self.positions is not None and longest > self.positions:
            raise ValueError(
                f"{self.name} reads up to {self.positions:,} tokens at once, and a document has "
                f"{longest:,}; accepted: {setting} of at most {self.positions}."
            )


def examine(model: str | Path, *, weights: bool = True) -> Examined:
    """Find a model and refuse, in a sentence, what could not be used.

    Args:
        model: a folder, a GGUF file or a folder of one (`gguf.resolve`), or a name on the Hugging
            Face hub, of which all but the weights is fetched.
        weights: a folder must hold its weights; False where its configuration is enough. What is
            there must be whole either way.

    Raises:
        ValueError: no such folder or name, no causal language model, code of its own, quantised or
            truncated weights, or files that `model_folder` refuses.
    """
    model = resolve(str(model))
    folder = folder_of(model)
    check_model_folder(folder)
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"model: {model} has no {CONFIG}; accepted: a folder that save_pretrained() wrote."
        )
    content = read_json(folder / CONFIG, within=folder, largest=LARGEST_TEXT, finite=False)
    if not isinstance(content, dict):
        raise ValueError(f"{folder / CONFIG}: got a {type(content).__name__}; accepted: an object.")
    _check_type(content, str(model))
    check_full_precision(content, str(model))
    is_local = Path(model).is_dir()
    if is_local and (weights or any((folder / name).exists() for name in (WEIGHTS, INDEX))):
        weight_files(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Its classes check themselves, each with errors of its own.
        raise ValueError(
            f"{folder / CONFIG}: transformers cannot use it ({_line(error).rstrip('.')}); correct "
            "it, or copy the model anew."
        ) from error
    return Examined(folder, str(model), config)


def _check_type(content: Mapping[str, Any], model: str) -> None:
    kind = content.get("model_type")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        # Code that lies beside such a model is not run: transformers has the family itself.
        return
    if content.get("auto_map"):
        raise ValueError(
            f"{model} needs code of its own (auto_map in its {CONFIG}), which dftserve never runs; "
            "accepted: a family that transformers has. Convert the model to one."
        )
    raise ValueError(
        f"{model}: got model_type {kind!r}, which this transformers has no causal language model "
        "for; accepted: a decoder-only model such as llama, qwen3, mistral, gemma2."
    )


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────


def fetched(found: Examined) -> Path:
    """The folder that holds the model's weights; the hub's are fetched, once."""
    is_local = Path(found.name).is_dir()
    return found.folder if is_local else folder_of(found.name, WEIGHTS_TOO)


def model_digest(found: Examined) -> str:
    """`weights_digest` of its folder. Raises ValueError: no weights that can be read."""
    return weights_digest(fetched(found))


def dtype_for(
    found: Examined, dtype: str | torch.dtype, device: str | torch.device | None
) -> str | torch.dtype:
    """What a model is loaded in; says so, once a process, where the choice is ours.

    Args:
        dtype: "auto": the weights' own, but on a CPU without bfloat16 instructions, where half
            precision is many times slower than float32, float32 in its place. Any other is taken
            as it is.
        device: None: the CPU.
    """
    is_on_cpu = device is None or torch.device(device).type == "cpu"
    is_wide = getattr(found.config, "dtype", None) in TOLERANCE
    if dtype != "auto" or not is_on_cpu or is_wide or cpu.has_bf16():
        return dtype
    _tell_float32()
    return torch.float32


@functools.cache
def _tell_float32() -> None:
    if multiprocessing.parent_process() is None:  # Workers would all say it again.
        logger.warning(
            "dtype auto: weights in half precision are computed with in float32, since this CPU "
            "has no bfloat16 instructions; a dtype that is named is taken as it is."
        )


def load(
    found: Examined,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The model with every weight from its safetensors files, in evaluation mode.

    Args:
        dtype: as `dtype_for` takes it.
        device: None: the CPU.
        attention: transformers' name of an implementation; None leaves it the choice.

    Raises:
        ValueError: an attention that the model does not have or whose package is not installed;
            weights that are missing (they would stay random), that the model has no place
            for, that transformers overwrites, or that cannot be loaded.
    """
    folder = fetched(found)
    weight_files(folder)
    chosen = {} if attention is None else {"attn_implementation": attention}
    try:
        with _without_its_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype_for(found, dtype, device),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                # Told below, in a sentence; transformers would print a table and raise.
                ignore_mismatched_sizes=True,
                **chosen,
            )
    except ImportError as error:
        raise ValueError(
            f"attention: got {attention!r}, which cannot be used here ({_line(error)})."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"model: {found.name} cannot be loaded as a causal language model ({_line(error)})."
        ) from None
    model, told = loaded
    _check_sizes(told["mismatched_keys"], found.name)
    for kind, what in (
        ("missing_keys", "has no tensor for"),
        ("unexpected_keys", "holds what the model has no place for:"),
    ):
        if told[kind]:
            raise ValueError(
                f"{found.name} {what} {_named(told[kind])}; accepted: a file for each weight of "
                f"{type(model).__name__} and no other. Copy the model anew, or save it with the "
                "transformers that it was made with."
            )
    _check_padding_row(model, found.name)
    model.name_or_path = found.name
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval()


@contextmanager
def _without_its_report() -> Iterator[None]:
    """Without transformers' table of weights that are not as the model has them: they are told."""
    report = logging.getLogger("transformers.modeling_utils")
    kept = report.level
    report.setLevel(logging.ERROR)
    try:
        yield
    finally:
        report.setLevel(kept)


def _check_sizes(mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], name: str) -> None:
    """Raises ValueError for tensors of another shape than the configuration gives the weight."""
    listed = sorted((key, tuple(of_file), tuple(of_model)) for key, of_file, of_model in mismatched)
    if not listed:
        return
    key, of_file, of_model = listed[0]
    more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
    raise ValueError(
        f"{name}: {key} is {_shape(of_file)} in its weights and {_shape(of_model)} by its {CONFIG}"
        f"{more}; accepted: the same. Take the {CONFIG} that belongs to the weights."
    )


def _shape(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes)) or "a number"


def _check_padding_row(model: PreTrainedModel, name: str) -> None:
    """Refuse a family whose initialiser zeroes the padding token's row after it was loaded.

    With tied embeddings that row is trained, as it is the token's column of the logits.
    """
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is None:
        return
    row = nn.Embedding.from_pretrained(torch.ones(1, 1), padding_idx=0)
    row.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # As the loader marks it.
    with guard_torch_init_functions():
        model._init_weights(row)
    if not bool(row.weight.all()):
        raise ValueError(
            f"{name} ({type(model).__name__}) loses the embedding of its padding token, "
            f"{embedding.padding_idx}, which transformers sets to zero whenever it loads the "
            f'model; accepted: "pad_token_id": null in its {CONFIG}.'
        )


# ── Hidden states and logits ─────────────────────────────────────────────────────────────────────


as_it_is = torch.compiler.disable(recursive=False)
"""For a function of ours within a model that torch.compile compiles: it puts functions in others'
places, which cannot be compiled; the model that it calls is."""


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: cap·tanh(scale·(h Wᵀ + b)/cap)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] in float32, or in float64 where the hidden states are; for autograd."""
        return self.rescaled(nn.functional.linear(hidden_RD, self.weight_VD, self.bias_V))

    def rescaled(self, raw_RV: Tensor) -> Tensor:
        """What becomes of the linear layer's output."""
        logits_RV = raw_RV if raw_RV.dtype is torch.float64 else raw_RV.float()
        logits_RV = logits_RV * self.scale
        return logits_RV if self.cap is None else self.cap * (logits_RV / self.cap).tanh()


@dataclass(frozen=True, eq=False)
class States:
    """One pass through the model without its output layer."""

    hidden_BND: Tensor
    """What the output layer would have read."""
    auxiliary: Tensor | None
    """The router's loss times its weight, where the configuration asks for one."""


class LanguageModel:
    """A causal LM whose logits are made from its hidden states, chunk by chunk.

    The constructor compares this with the model's own logits, and looks whether a position depends
    on what stands after it or on the other rows of a batch.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, tokens_N: Sequence[int] | None = None
    ) -> None:
        """
        Args:
            model: its `forward` as it is now is what will be called; the mode (training or
                evaluation) is left as it is.
            name: what errors call it.
            tokens_N: a text for the checks; None: token ids spread over the vocabulary.

        Raises:
            ValueError: a family whose logits are not reproduced, a model that is not causal; says
                which family, and why.
        """
        self.model, self.name = model, name
        self._forward = model.forward
        self._accepts = inspect.signature(model.forward).parameters
        self._layer = self._linear()
        self._seen: list[Tensor] = []
        self._take = _taking(self._seen)
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
        """Made anew from the layer: its weights may have been replaced, or gathered from shards."""
        return Head(self._layer.weight, self._layer.bias, self._scale, self._cap)

    @property
    def positions(self) -> int | None:
        return _positions(self._config)

    def states(self, **inputs: Tensor) -> States:
        """The model's own forward up to its output layer.

        Args:
            inputs: `input_ids` int64 [B, N]; and `position_ids` or `attention_mask`, likewise; the
                mask may also be a float [B, 1, N, N] that is added to attention scores.
        """
        return self._states(inputs, None)

    def states_behind(self, cache: Cache, **inputs: Tensor) -> States:
        """The same of tokens behind those whose keys and values the cache holds, which gets theirs;
        the mask is a float [B, 1, N, tokens of the cache and N]."""
        return self._states(inputs, cache)

    @as_it_is
    def _states(self, inputs: Mapping[str, Tensor], cache: Cache | None) -> States:
        with self._out_of_use() as seen:
            output = self._forward(**self._given(inputs, cache))
            seen = list(seen)
        if len(seen) != 1:
            raise ValueError(
                f"{self.family} uses its output layer {len(seen)} times in one forward; accepted: "
                "once."
            )
        return States(seen[0], self._auxiliary(output))

    def layer_states(self, layers: Sequence[int], **inputs: Tensor) -> list[Tensor]:
        """[B, N, D] behind each of these layers, counted from 1; 0 is the embedding.

        Raises:
            ValueError: the family does not give them.
        """
        with self._out_of_use():
            output = self._forward(**self._given(inputs), output_hidden_states=True)
        states = getattr(output, "hidden_states", None)
        shape = inputs["input_ids"].shape
        if states is None or len(states) <= max(layers) or states[0].shape[:2] != shape:
            raise ValueError(
                f"{self.family} does not give the hidden states of its layers; accepted: a model "
                "that takes output_hidden_states."
            )
        return [states[layer] for layer in layers]

    def own_logits(self, **inputs: Tensor) -> Tensor:
        """As the model itself makes them: [B, N, V], float32 or wider."""
        logits_BNV = self._forward(**self._given(inputs)).logits
        return logits_BNV if logits_BNV.dtype is torch.float64 else logits_BNV.float()

    def packing_leak(
        self, longest: int = PROBE_TOKENS, row: int = 2 * PROBE_TOKENS, *, most: int | None = None
    ) -> str | None:
        """Why documents must not share a row: what the model cannot keep apart; None where it can.

        A text of the longest document's length is compared with itself alone, all along a row that
        is full of its copies behind another text, and its beginning with itself before it. So what
        begins far into a row is seen: attention in chunks, positions that are rescaled.

        Args:
            longest: tokens of the longest document.
            row: tokens of the longest row.
            most: tokens that are read at once; of longer rows the configuration alone tells, by
                the lengths that it names. None: all are read.

        Raises:
            ValueError: the model cannot read so many tokens.
        """
        if "position_ids" not in self._accepts and not self._takes_any:
            return "its forward takes no position_ids"
        if most is not None and max(longest, row) > most:
            for name, length, reached in (
                (CHUNK, _chunk(self._config), row),
                (ORIGINAL, _rescaled_beyond(self._config), longest),
            ):
                if length is not None and reached > length:
                    return f"its {name} is {length:,}, and there are {reached:,} tokens"
            longest, row = min(longest, (most - PROBE_TOKENS) // 2), min(row, most)
        longest = max(longest, PROBE_TOKENS)
        text_N = _repeated(self.text_N[PROBE_TOKENS:], longest)
        # Of an odd length, so that no copy begins where a chunk does.
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
        apart = max(float(gap.abs().max()) for gap in gaps) / self._spread(alone_PV)
        if apart <= self.tolerance:
            return None
        return (
            f"a document's log-probabilities change by {apart:.1g} of their spread with the others "
            "in its row"
        )

    def check_batch(self, longest: int, *, most: int | None = None) -> None:
        """Refuse a model that reads a text otherwise where a longer one is in its batch.

        Args:
            longest: tokens of the longest document.
            most: as `packing_leak` takes it.

        Raises:
            ValueError: it does, or it cannot read so many tokens.
        """
        if longest <= PROBE_TOKENS:
            return
        if most is not None and longest > most:
            beyond = _rescaled_beyond(self._config)
            if beyond is not None and longest > beyond:
                raise self._batch_error(longest, "its positions are rescaled")
            longest = most
        text_N = _repeated(self.text_N, longest)
        ids_2N, mask_2N = text_N.repeat(2, 1), torch.ones(2, longest, dtype=torch.int64)
        ids_2N[1, PROBE_TOKENS:] = mask_2N[1, PROBE_TOKENS:] = 0
        device = self.model.device
        given = {"input_ids": ids_2N.to(device), "attention_mask": mask_2N.to(device)}
        alone = {name: value[1:, :PROBE_TOKENS] for name, value in given.items()}
        with evaluating(self.model), torch.no_grad():
            beside_NV, alone_NV = (
                self._states_logprobs(each, torch.arange(PROBE_TOKENS)) for each in (given, alone)
            )
        # A mean: a router may send a token elsewhere in a batch.
        apart = float((beside_NV - alone_NV).abs().mean()) / self._spread(alone_NV)
        if apart > self.tolerance:
            raise self._batch_error(
                longest, f"its log-probabilities change by {apart:.1g} of their spread"
            )

    def _batch_error(self, longest: int, why: str) -> ValueError:
        return ValueError(
            f"{self.family} reads a text otherwise beside one of {longest:,} tokens in its batch: "
            f"{why}{_originally(self._config)}; accepted: a max_length up to which it does not, or "
            "batch_size 1 (with accumulation in its place)."
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
        """Choose scale and cap so that our logits are the model's own; [N, V]."""
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
                f"{self.family} makes logits that are no numbers; its weights are damaged, or its "
                "dtype is too narrow. Copy the model anew, or load it in float32."
            )
        for scale, cap in _rescalings(self._config):
            self._scale, self._cap = scale, cap
            gap = _gap(self.head.rescaled(raw[0]).reshape(shape), own_NV)
            gaps[scale, cap] = gap
            if gap <= self.tolerance:
                break
        else:
            raise ValueError(
                f"{self.family} makes its logits in a way not known here: they are "
                f"{min(gaps.values()):.2g} of the largest from those of its output layer. "
                f"Accepted: a linear layer, a factor ({', '.join(SCALES)}) and a soft cap "
                f"({', '.join(CAPS)}). Serve this model with vLLM and use the served teacher."
            )
        hidden_BND = self._tried(self.states, input_ids=ids_1N).hidden_BND
        ours_NV = self.head.logits(hidden_BND.reshape(shape[0], -1))
        if not (gap := _gap(ours_NV, own_NV)) <= self.tolerance:
            raise ValueError(
                f"{self.family}: logits from its hidden states are {gap:.2g} of the largest from "
                "its own; it cannot be used without its output layer."
            )
        return own_NV

    def _check_rows(self, logits_NV: Tensor) -> None:
        """In a batch, another continuation and padding behind must change nothing before them."""
        count = len(self.text_N) // 2
        ids_2N = self.text_N.repeat(2, 1)
        ids_2N[0, count:] = (ids_2N[0, count:].flip(0) + 1) % self._config.vocab_size
        mask_2N = torch.ones_like(ids_2N)
        ids_2N[1, count:] = mask_2N[1, count:] = 0
        device = self.model.device
        given = {"input_ids": ids_2N.to(device), "attention_mask": mask_2N.to(device)}
        hidden_BND = self._tried(self.states, **given).hidden_BND
        found_2NV = self.head.logits(hidden_BND.reshape(2, len(self.text_N), -1)[:, :count])
        apart_2NV = (found_2NV - logits_NV[:count]).abs()
        # A mean: in half precision a router may send a token elsewhere in a batch.
        for apart, what in zip(apart_2NV.mean((1, 2)), ("another ending", "padding"), strict=True):
            if not float(apart) <= self.tolerance * self._spread(logits_NV):
                raise ValueError(
                    f"{self.family} is not causal: {what} behind a text changes the logits before "
                    "it; accepted: a decoder-only language model."
                )

    def _tried(self, call: Any, **inputs: Tensor) -> Any:
        """What a family raises on plain text is the reason to refuse it."""
        try:
            return call(**inputs)
        except Exception as error:
            raise ValueError(
                f"{self.family} does not read plain text: {type(error).__name__}: {_line(error)}."
            ) from error

    def _packed_logprobs(self, texts: Sequence[Tensor], at_P: Tensor) -> Tensor:
        """[P, V]: of the texts in one row, each with positions of its own."""
        device = self.model.device
        places_N = torch.cat([torch.arange(len(text_N)) for text_N in texts])
        row_N = torch.cat(list(texts))
        given = {"input_ids": row_N[None].to(device), "position_ids": places_N[None].to(device)}
        return self._states_logprobs(given, at_P)

    def _states_logprobs(self, given: Mapping[str, Tensor], at_P: Tensor) -> Tensor:
        """[P, V]: at positions of the last row."""
        rows, tokens = given["input_ids"].shape
        hidden_BND = self._tried(self.states, **given).hidden_BND.reshape(rows, tokens, -1)
        return self.head.logits(hidden_BND[-1, at_P.to(hidden_BND.device)]).log_softmax(-1)

    @property
    def tolerance(self) -> float:
        """How far two ways to the same logits may lie apart in this dtype, of their spread."""
        return TOLERANCE.get(self.model.dtype, HALF_TOLERANCE)

    @staticmethod
    def _spread(values_NV: Tensor) -> float:
        """So that a random model, whose logits are nearly equal, is judged as strictly."""
        return max(float(values_NV.std(dim=-1).mean()), 1e-12)

    # ── Calls ────────────────────────────────────────────────────────────────────────────────────

    @property
    def _takes_any(self) -> bool:
        kinds = [each.kind for each in self._accepts.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def _given(self, inputs: Mapping[str, Tensor], cache: Cache | None = None) -> dict[str, Any]:
        given = {
            name: value
            for name, value in inputs.items()
            if name in self._accepts or self._takes_any or name == "input_ids"
        }
        settings: dict[str, Any] = {"use_cache": cache is not None, "return_dict": True}
        if cache is not None:
            settings["past_key_values"] = cache
        return given | {name: settings[name] for name in settings if name in self._accepts}

    @contextmanager
    def _out_of_use(self) -> Iterator[list[Tensor]]:
        """What the output layer is given within, in place of its work."""
        layer, before = self._layer, vars(self._layer).get("forward")
        layer.forward = self._take  # type: ignore[method-assign]
        try:
            yield self._seen
        finally:
            self._seen.clear()  # A batch's hidden states, which nothing here must keep.
            del layer.forward
            if before is not None:
                layer.forward = before

    def _auxiliary(self, output: Any) -> Tensor | None:
        loss = getattr(output, "aux_loss", None)
        if not isinstance(loss, Tensor):
            return None
        places = (self.model, self._config, getattr(self._config, "ffn_config", None))
        for place, name in itertools.product(places, AUXILIARY_WEIGHTS):
            weight = getattr(place, name, None)
            if isinstance(weight, int | float):
                return weight * loss
        raise ValueError(
            f"{self.family}: its configuration asks for the router's loss (output_router_logits) "
            f"and names no weight for it; accepted: one of {', '.join(AUXILIARY_WEIGHTS)}."
        )


def _rescalings(config: Any) -> Iterator[tuple[float, float | None]]:
    """(scale, cap) that a configuration may mean, all that it names first."""
    caps = [cap for name in CAPS if (cap := _number(getattr(config, name, None))) is not None]
    factors = [[1.0]]
    for name in SCALES:
        value = getattr(config, name, None)
        if value == "inv_sqrt_d_model":  # MPT
            value = getattr(config, "d_model", config.hidden_size) ** -0.5
        if (number := _number(value)) is not None and number != 1.0:
            factors.append([number, 1 / number, 1.0])
    for cap in (*caps, None):
        for each in itertools.product(*factors):
            scale = 1.0
            for factor in each:
                scale *= factor
            yield scale, cap


def _positions(config: Any) -> int | None:
    named = (_number(getattr(config, name, None)) for name in POSITIONS)
    given = next((number for number in named if number is not None), None)
    return None if given is None else int(given)  # XLNet says −1 for no bound.


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and value > 0 else None


def _gap(ours_NV: Tensor, own_NV: Tensor) -> float:
    """The largest difference, of the largest logit."""
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
    """The text over and over, `count` tokens of it."""
    return text_N.repeat(-(-count // len(text_N)))[:count]


def _spread_over(count: int, some: int) -> Tensor:
    """At most `some` of `count` positions at equal distances, the first and the last with them."""
    return torch.linspace(0, count - 1, min(some, count)).round().long()


def _chunk(config: Any) -> int | None:
    """Tokens of a row that attention does not look across; None where the family has no chunks."""
    number = _number(getattr(config, CHUNK, None))
    return None if number is None else int(number)


def _rescaled_beyond(config: Any) -> int | None:
    """Tokens of a text beyond which all positions of its batch are rescaled."""
    given = getattr(config, "rope_parameters", None) or {}
    # A family may have a set of its own for each type of layer.
    sets = (given, *(each for each in given.values() if isinstance(each, Mapping)))
    named = [_number(each.get(ORIGINAL)) for each in sets if each.get("rope_type") == "longrope"]
    return min((int(number) for number in named if number is not None), default=None)


def _originally(config: Any) -> str:
    """What a configuration says of the length that its positions were made for."""
    given = getattr(config, "rope_parameters", None)
    number = given.get(ORIGINAL) if isinstance(given, Mapping) else None
    return "" if number is None else f" ({ORIGINAL}: {number:,})"


def _taking(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """What stands in for an output layer's forward: it takes what the layer is given, and gives one
    column of it, enough for what follows. One for all passes: torch.compile compiles a model anew
    for each function that it meets."""

    @torch.compiler.disable
    def take(hidden_BND: Tensor) -> Tensor:
        seen.append(hidden_BND)
        return hidden_BND[..., :1]

    return take


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and then in the mode that it was in."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def _named(names: Sequence[str] | set[str]) -> str:
    told = sorted(map(str, names))
    more = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
    return ", ".join(told[:NAMED]) + more


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
