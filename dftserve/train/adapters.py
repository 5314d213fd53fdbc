"""Low-rank adapters: which modules of a model can have them, and which would not survive a save."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from dftserve.train.config import ALL_LINEAR, LoraConfig

TAKES_ADAPTERS = (nn.Linear, nn.Embedding, Conv1D)


def adapted(model: Any, lora: LoraConfig, *, checkpointing: bool) -> Any:
    """Add adapters to the model's modules; only the adapters are trained.

    Raises:
        ValueError: a name that no module of the model has, the output layer, or an embedding whose
            weights are tied to it.
    """
    import peft

    names = modules_of(model, lora.modules)
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=names,
            task_type="CAUSAL_LM",
        ),
    )
    if checkpointing:
        model.enable_input_require_grads()
    return wrapped


def modules_of(model: Any, names: str | Iterable[str]) -> str | list[str]:
    """peft's `target_modules` for these names, checked against the model; raises as `adapted`."""
    wanted = [names] if isinstance(names, str) else list(names)
    if wanted == [ALL_LINEAR]:
        return ALL_LINEAR
    if not wanted:
        raise ValueError(f"lora.modules: got none; {_accepted(model)}.")
    for name in wanted:
        found = [
            module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")
        ]
        if not found or not all(isinstance(module, TAKES_ADAPTERS) for module in found):
            raise ValueError(f"lora.modules: got {name!r}; {_accepted(model)}.")
        _check_embeddings(model, name, found)
    return wanted


def _check_embeddings(model: Any, name: str, found: list[nn.Module]) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if any(module is head for module in found):
        raise ValueError(
            f"lora.modules: got {name!r}, the output layer, whose weights the loss reads directly; "
            f"{_accepted(model)}."
        )
    if any(module is embedding for module in found) and embedding.weight is head.weight:
        raise ValueError(
            f"lora.modules: got {name!r}, whose weights are tied to the output layer's: merged "
            "into both, the adapter would change the logits that it was trained on; "
            f"{_accepted(model)}."
        )


def _accepted(model: Any) -> str:
    """The names of modules that can have an adapter, without their paths."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = embedding.weight is head.weight
    kept_out = (head, embedding) if is_tied else (head,)
    names = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, TAKES_ADAPTERS) and not any(module is each for each in kept_out)
    }
    return f"accepted: {ALL_LINEAR}, or one or more of {', '.join(sorted(names))}"
