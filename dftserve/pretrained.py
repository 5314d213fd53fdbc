"""Load a causal language model of transformers, or refuse it with the reason.

    files = examine("models/base")                 its folder and configuration, no weights
    model = load(files, dtype=torch.float32)       safetensors only, every weight accounted for

The teacher, the trainer and the likelihood of texts all load their models here, so they accept and
refuse the same models, for the same reasons.
"""

import functools
import logging
import multiprocessing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import guard_torch_init_functions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dftserve import cpu
from dftserve.bounded_files import read_json
from dftserve.gguf import resolve
from dftserve.hub import WEIGHTS_TOO, folder_of, weights_digest
from dftserve.model_config import positions_of
from dftserve.model_folder import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    LARGEST_TEXT,
    WEIGHTS,
    check_full_precision,
    check_model_folder,
    weight_files,
)

WIDE = (torch.float32, torch.float64)
NAMED = 5
"""Number of weights that an error lists by name; the rest are counted."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ModelFiles:
    """A model's files, of which only the configuration has been read."""

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
        """Tokens that the model can read at once; None if its configuration has no bound."""
        return positions_of(self.config.get_text_config())

    def check_tokenizer(self, tokenizer: Sized) -> None:
        """Raises ValueError if the tokenizer has more tokens than the embedding has rows."""
        if len(tokenizer) > self.vocabulary:
            raise ValueError(
                f"{self.name}: its tokenizer has {len(tokenizer):,} tokens and its embedding "
                f"{self.vocabulary:,}; accepted: no more tokens than rows. Use the tokenizer that "
                "belongs to it, or resize the embedding and save the model."
            )

    def check_length(self, longest: int, setting: str) -> None:
        """Refuse texts that are longer than the model's positions.

        Args:
            longest: tokens of the longest text that would be read at once.
            setting: the setting that bounds this length, for the error message.
        """
        if self.positions is not None and longest > self.positions:
            raise ValueError(
                f"{self.name} reads up to {self.positions:,} tokens at once, and a document has "
                f"{longest:,}; accepted: {setting} of at most {self.positions}."
            )


def examine(model: str | Path, *, weights: bool = True) -> ModelFiles:
    """Find a model and refuse it with a clear message if it cannot be used.

    Args:
        model: a folder, a GGUF file or a folder with one (`gguf.resolve`), or a name on the Hugging
            Face hub, from which everything but the weights is fetched.
        weights: whether a folder must contain weights; False if its configuration is enough.
            Weights that are present must be complete either way.

    Raises:
        ValueError: no such folder or name, not a causal language model, custom code, quantised or
            truncated weights, an adapter next to them, or files that `model_folder` refuses.
    """
    model = resolve(str(model))
    folder = folder_of(model)
    check_model_folder(folder)
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"model: {model} has no {CONFIG}; accepted: a folder that save_pretrained() wrote."
        )
    if (folder / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"model: {model} has an {ADAPTER_CONFIG}, and transformers would add that adapter to "
            "the model's weights; accepted: a model alone. Merge the adapter into it, or move the "
            "adapter's files to another folder."
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
    except Exception as error:  # Each configuration class raises errors of its own.
        raise ValueError(
            f"{folder / CONFIG}: transformers cannot use it ({one_line(error).rstrip('.')}); "
            "correct it, or copy the model again."
        ) from error
    return ModelFiles(folder, str(model), config)


def _check_type(content: Mapping[str, Any], model: str) -> None:
    kind = content.get("model_type")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        # transformers implements the family, so custom code in the folder is not run.
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


def weights_folder(files: ModelFiles) -> Path:
    """The folder with the model's weights, which are first fetched if the model is on the hub."""
    is_local = Path(files.name).is_dir()
    return files.folder if is_local else folder_of(files.name, WEIGHTS_TOO)


def model_digest(files: ModelFiles) -> str:
    """`weights_digest` of its folder. Raises ValueError if there are no readable weights."""
    return weights_digest(weights_folder(files))


def dtype_for(
    files: ModelFiles, dtype: str | torch.dtype, device: str | torch.device | None
) -> str | torch.dtype:
    """The dtype to load a model in; if "auto" is replaced by float32, a warning is logged once.

    Args:
        dtype: "auto" keeps the weights' own dtype, except that on a CPU without bfloat16
            instructions half precision, which is many times slower there, is replaced by float32.
            Any other value is returned unchanged.
        device: None: the CPU.
    """
    is_on_cpu = device is None or torch.device(device).type == "cpu"
    is_wide = getattr(files.config, "dtype", None) in WIDE
    if dtype != "auto" or not is_on_cpu or is_wide or cpu.has_bf16():
        return dtype
    _warn_float32()
    return torch.float32


@functools.cache
def _warn_float32() -> None:
    if multiprocessing.parent_process() is None:  # Not again in every worker.
        logger.warning(
            "dtype auto: weights in half precision are loaded in float32, since this CPU has no "
            "bfloat16 instructions; set a dtype to override this."
        )


def load(
    files: ModelFiles,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The model with every weight from its safetensors files, in evaluation mode.

    Args:
        dtype: as in `dtype_for`.
        device: None: the CPU.
        attention: transformers' name of an implementation; None leaves the choice to transformers.

    Raises:
        ValueError: an attention that the model does not support or whose package is not installed;
            weights that are missing (they would stay random), that the model does not use, that
            transformers overwrites, or that cannot be loaded.
    """
    folder = weights_folder(files)
    weight_files(folder)
    chosen = {} if attention is None else {"attn_implementation": attention}
    try:
        with _without_load_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype_for(files, dtype, device),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                # Reported below in one sentence; transformers would print a table and raise.
                ignore_mismatched_sizes=True,
                **chosen,
            )
    except ImportError as error:
        raise ValueError(
            f"attention: got {attention!r}, which cannot be used here ({one_line(error)})."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"model: {files.name} cannot be loaded as a causal language model ({one_line(error)})."
        ) from None
    model, info = loaded
    _check_sizes(info["mismatched_keys"], files.name)
    for kind, what in (
        ("missing_keys", "has no tensor for"),
        ("unexpected_keys", "contains tensors that the model does not use:"),
    ):
        if info[kind]:
            raise ValueError(
                f"{files.name} {what} {named(info[kind])}; accepted: a tensor for each weight of "
                f"{type(model).__name__} and no other. Copy the model again, or save it with the "
                "version of transformers that it was made with."
            )
    _check_padding_row(model, files.name)
    model.name_or_path = files.name
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval()


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence transformers' table of missing and mismatched weights; `load` reports them itself.

    By a filter, because a level of its own makes this logger check the plan of tensor parallelism
    as well, and warn of all layers that one process does not shard.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _check_sizes(mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], name: str) -> None:
    """Raises ValueError for tensors whose shape differs from the one in the configuration."""
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
    """Refuse a family whose initialiser zeroes the padding token's row after loading it.

    With tied embeddings that row is a trained one: it also determines the token's logit.
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


def named(names: Collection[str]) -> str:
    """The first names in their order, and the number of the others, for an error message."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return ", ".join(ordered[:NAMED]) + more


def one_line(error: Exception) -> str:
    """An error's message on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]
