"""Let a causal LM compute a divergence inside its own forward pass.

DDP and FSDP prepare a module's parameters in its forward and collect their gradients with its
hooks, neither of which works for a head that is called outside the forward. So the model's
`forward` is replaced; called without targets, it behaves as before.

Shapes: B rows of tokens, N tokens of a row, T trained positions of the batch, D hidden size.
"""

import types
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from dftserve.lm import Head, LanguageModel, uncompiled
from dftserve.train.continuations import Layout
from dftserve.train.divergences import SFT, Divergence, TargetRows
from dftserve.train.head import head_loss

TARGET_NAMES = tuple(each.name for each in fields(TargetRows))
SAME_LOSS = 1e-3
"""Maximal difference in nats a token between the loss of the chunked head and that of the model's
own logits."""


@dataclass
class DFTOutput(ModelOutput):
    """Sums over a batch's trained positions, in nats."""

    loss: Tensor | None = None
    auxiliary: Tensor | None = None
    """The router's weighted load-balancing loss; not part of the divergence."""
    matching: Tensor | None = None
    """Σ weight·(−ln p) of continuations, whose gradient is that of feature matching."""
    model_entropy: Tensor | None = None
    target_entropy: Tensor | None = None
    """Entropy of q, the stored target; 0 for a baseline that reads no target."""
    human_nll: Tensor | None = None
    """−ln p of the text's own tokens; in evaluation mode only."""

    @property
    def objective(self) -> Any:
        """The quantity that a step minimises: the loss plus the auxiliary terms."""
        total: Any = self.loss
        for added in (self.auxiliary, self.matching):
            total = total if added is None else total + added
        return total


def attach(
    model: PreTrainedModel,
    divergence: Divergence,
    *,
    name: str = "the model",
    tokens_N: Sequence[int] | None = None,
) -> LanguageModel:
    """Make `model(input_ids, position_ids, positions_T, **target)` return a DFTOutput.

    Packed documents need `position_ids`, padded ones an `attention_mask` instead. With
    `anchors_BK`, `continuations_BKSG` and `weights_BKS` (`feature_matching`) the same pass also
    reads continuations of the text.

    Args:
        name: the model's name in error messages.
        tokens_N: a text to compare the losses on; see `LanguageModel`.

    Raises:
        ValueError: the model's own logits give a different loss; see `LanguageModel`.
    """
    language_model = LanguageModel(model, name, tokens_N)
    _check_loss(language_model)

    @uncompiled
    def forward(
        self,
        *args,
        positions_T: Tensor | None = None,
        anchors_BK: Tensor | None = None,
        continuations_BKSG: Tensor | None = None,
        weights_BKS: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if positions_T is None:
            return plain(*args, **inputs)
        target = TargetRows(**{name: inputs.pop(name) for name in TARGET_NAMES})
        layout, text_BN = None, inputs["input_ids"]
        if anchors_BK is not None and continuations_BKSG is not None:
            *_, samples, length = continuations_BKSG.shape
            layout = Layout.of(inputs, anchors_BK, samples=samples, length=length)
            inputs = layout.all_inputs(text_BN, continuations_BKSG, language_model.model.dtype)
        states = language_model.states(**inputs)
        rows, tokens = text_BN.shape
        hidden_BQD = states.hidden_BND.reshape(rows, -1, states.hidden_BND.shape[-1])
        hidden_TD = hidden_BQD[:, :tokens].flatten(0, 1)[positions_T]
        output = _output(language_model.head, hidden_TD, target, divergence, training=self.training)
        if states.auxiliary is not None:
            # The router's loss is a mean over the batch; the other terms are sums over its tokens.
            output.auxiliary = states.auxiliary * len(positions_T)
        if layout is not None and weights_BKS is not None:
            hidden_BKSGD = layout.predicting_states(hidden_BQD)
            output.matching = _weighted_nll(
                language_model.head, hidden_BKSGD, continuations_BKSG, weights_BKS
            )
        return output

    plain = model.forward
    model.forward = types.MethodType(forward, model)
    return language_model


@torch.no_grad()
def _check_loss(language_model: LanguageModel) -> None:
    """Compare the chunked head with cross-entropy on the model's own logits."""
    model, text_N = language_model.model, language_model.text_N
    was_training = model.training
    model.eval()
    ids_1N = text_N[None].to(model.device)
    labels_T = ids_1N[0, 1:]
    logits_TV = language_model.own_logits(input_ids=ids_1N)[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits_TV, labels_T)
    hidden_BND = language_model.states(input_ids=ids_1N).hidden_BND
    hidden_TD = hidden_BND.reshape(len(text_N), -1)[:-1]
    none = TargetRows.none(labels_T.cpu().numpy())
    target = TargetRows(**{n: getattr(none, n).to(model.device) for n in TARGET_NAMES})
    own_loss = head_loss(language_model.head, hidden_TD, target, SFT()).loss / len(labels_T)
    model.train(was_training)
    if not float((own_loss - expected).abs()) <= SAME_LOSS:
        raise ValueError(
            f"{language_model.family}: the loss of its own logits is {float(expected):.4f} nats a "
            f"token and that of its chunked head {float(own_loss):.4f}; it cannot be trained here."
        )


def checkpointing_name() -> str:
    """transformers' name for recomputing activations in the backward pass.

    5.23 renamed it and warns about the old name; this package always says gradient checkpointing.
    """
    is_renamed = hasattr(PreTrainedModel, "activation_checkpointing_enable")
    return "activation_checkpointing" if is_renamed else "gradient_checkpointing"


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Compute activations again in the backward pass instead of storing them."""
    getattr(model, f"{checkpointing_name()}_enable")()


def _weighted_nll(
    head: Head, hidden_BKSGD: Tensor, tokens_BKSG: Any, weights_BKS: Tensor
) -> Tensor:
    none = TargetRows.none(tokens_BKSG.flatten().cpu().numpy())
    device = hidden_BKSGD.device
    target = TargetRows(**{name: getattr(none, name).to(device) for name in TARGET_NAMES})
    weights_N = weights_BKS[..., None].expand_as(tokens_BKSG).flatten()
    return head_loss(head, hidden_BKSGD.flatten(0, 3), target, SFT(), weights_N).loss


def _output(
    head: Head, hidden_TD: Tensor, target: TargetRows, divergence: Divergence, *, training: bool
) -> DFTOutput:
    losses = head_loss(head, hidden_TD, target, divergence)
    nll = None
    if not training:
        same = isinstance(divergence, SFT)
        nll = losses.loss if same else head_loss(head, hidden_TD, target, SFT()).loss
    entropy_T = target.entropy_R if divergence.reads_target else torch.zeros_like(target.entropy_R)
    return DFTOutput(
        loss=losses.loss,
        model_entropy=losses.model_entropy,
        target_entropy=entropy_T.sum(),
        human_nll=nll,
    )
