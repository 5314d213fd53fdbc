"""Low-rank adapters: which modules of a model can have them, and which would not survive a save."""

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dftserve.lm import LanguageModel
from dftserve.train.config import ALL_LINEAR, LoraConfig

LINEAR = (nn.Linear, Conv1D)
TAKES_ADAPTERS = (*LINEAR, nn.Embedding)
STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types for which peft refuses an adapter on `OUT_PROJ`: their GPU kernels do not call it."""
OUT_PROJ = "out_proj"


def adapted(language_model: LanguageModel, lora: LoraConfig, *, checkpointing: bool) -> Any:
    """Add adapters to the model's modules; only the adapters are trained.

    Raises:
        ValueError: a name that no module of the model has, the output layer, an embedding whose
            weights are tied to it, or modules that the model does not call.
    """
    import peft

    model: Any = language_model.model
    names = modules_of(model, lora.modules, uncalled(language_model))
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


def uncalled(language_model: LanguageModel) -> frozenset[str]:
    """The names of modules of which a step calls none: the model reads their weights directly, as
    Mamba those of `dt_proj`, or does not need them for text. An adapter would not be trained."""
    model, called, hooks = language_model.model, set(), []
    modules = [
        (path.rpartition(".")[2], module)
        for path, module in model.named_modules()
        if isinstance(module, TAKES_ADAPTERS)
    ]
    for name, module in modules:
        hooks.append(module.register_forward_hook(lambda *_, name=name: called.add(name)))
    was_training = model.training
    try:
        model.train()  # Some families have a faster way for training, which calls fewer modules.
        with torch.random.fork_rng(devices=_devices(model)):
            language_model.states(input_ids=language_model.text_N[None].to(model.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    # A number is that of one expert of several, to which this text may not be routed.
    return frozenset(name for name, _ in modules if not name.isdigit()) - called


def _devices(model: Any) -> list[torch.device]:
    """The devices whose random numbers a forward uses, besides the CPU's."""
    return [] if model.device.type == "cpu" else [model.device]


def modules_of(
    model: Any, names: str | Iterable[str], never: Set[str] = frozenset()
) -> str | list[str]:
    """peft's `target_modules` for these names, checked against the model; raises as `adapted`.

    Args:
        never: `uncalled` of the model.
    """
    if model.config.model_type in STATE_SPACE:
        never = never | {OUT_PROJ}
    wanted = [names] if isinstance(names, str) else list(names)
    if wanted == [ALL_LINEAR]:
        linear = _names(model, LINEAR)
        return sorted(linear - never) if linear & never else ALL_LINEAR
    accepted = (
        f"accepted: {ALL_LINEAR}, or one or more of {', '.join(sorted(_names(model) - never))}"
    )
    if not wanted:
        raise ValueError(f"lora.modules: got none; {accepted}.")
    for name in wanted:
        modules = [
            module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")
        ]
        if not modules or not all(isinstance(module, TAKES_ADAPTERS) for module in modules):
            raise ValueError(f"lora.modules: got {name!r}; {accepted}.")
        if name.rpartition(".")[2] in never:
            raise ValueError(
                f"lora.modules: got {name!r}, which {model.config.model_type} does not call in "
                f"training, so that an adapter would have no effect; {accepted}."
            )
        _check_embeddings(model, name, modules, accepted)
    return wanted


def _check_embeddings(model: Any, name: str, modules: list[nn.Module], accepted: str) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if any(module is head for module in modules):
        raise ValueError(
            f"lora.modules: got {name!r}, the output layer, whose weights the loss reads directly; "
            f"{accepted}."
        )
    if any(module is embedding for module in modules) and embedding.weight is head.weight:
        raise ValueError(
            f"lora.modules: got {name!r}, whose weights are tied to the output layer's: merged "
            "into both, the adapter would change the logits that it was trained on; "
            f"{accepted}."
        )


def _names(model: Any, kinds: tuple[type[nn.Module], ...] = TAKES_ADAPTERS) -> set[str]:
    """The names of these kinds of modules that can have an adapter, without their paths."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = embedding.weight is head.weight
    kept_out = (head, embedding) if is_tied else (head,)
    return {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, kinds) and not any(module is each for each in kept_out)
    }
