"""Let a causal LM compute a divergence inside its own forward pass.

DDP and FSDP prepare a module's parameters in its forward and collect their gradients by its hooks:
a head that is used outside has neither. So the model's `forward` is replaced; called without
targets, it is what it was.

Shapes: B rows of tokens, N tokens of a row, T trained positions of the batch, D hidden size.
"""

import types
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from dftserve.train.divergences import SFT, Divergence, TargetRows
from dftserve.train.head import Head, head_loss

TARGET_NAMES = tuple(each.name for each in fields(TargetRows))


@dataclass
class DFTOutput(ModelOutput):
    """Sums over a batch's trained positions, in nats."""

    loss: Tensor | None = None
    model_entropy: Tensor | None = None
    target_entropy: Tensor | None = None
    """Of q, the stored target; 0 for a baseline that reads none."""
    human_nll: Tensor | None = None
    """−ln p of the text's own tokens; only while evaluating."""


def attach(model: PreTrainedModel, divergence: Divergence) -> None:
    """Make `model(input_ids, position_ids, positions_T, **target)` return a DFTOutput.

    Raises:
        ValueError: the model's head is no linear layer; see `Head.of`.
    """
    Head.of(model)
    plain = model.forward

    def forward(self, *args, positions_T: Tensor | None = None, **given: Any) -> Any:
        if positions_T is None:
            return plain(*args, **given)
        target = TargetRows(**{name: given.pop(name) for name in TARGET_NAMES})
        hidden_BND = self.get_decoder()(*args, use_cache=False, **given).last_hidden_state
        hidden_TD = hidden_BND.flatten(0, 1)[positions_T]
        return _output(Head.of(self), hidden_TD, target, divergence, training=self.training)

    model.forward = types.MethodType(forward, model)


def checkpointing_name() -> str:
    """What transformers calls it when activations are computed again in the backward pass.

    5.23 renamed it and warns of the old name; we call it gradient checkpointing throughout.
    """
    is_renamed = hasattr(PreTrainedModel, "activation_checkpointing_enable")
    return "activation_checkpointing" if is_renamed else "gradient_checkpointing"


def enable_checkpointing(model: PreTrainedModel) -> None:
    getattr(model, f"{checkpointing_name()}_enable")()


def _output(
    head: Head, hidden_TD: Tensor, target: TargetRows, divergence: Divergence, *, training: bool
) -> DFTOutput:
    found = head_loss(head, hidden_TD, target, divergence)
    nll = None
    if not training:
        same = isinstance(divergence, SFT)
        nll = found.loss if same else head_loss(head, hidden_TD, target, SFT()).loss
    entropy_T = target.entropy_R if divergence.reads_target else torch.zeros_like(target.entropy_R)
    return DFTOutput(
        loss=found.loss,
        model_entropy=found.model_entropy,
        target_entropy=entropy_T.sum(),
        human_nll=nll,
    )
