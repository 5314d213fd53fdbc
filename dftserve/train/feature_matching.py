"""Feature matching: compare the model's own continuations with the text's, in the features of an
untrained copy of the model (EBFT, arXiv 2603.12248).

    L = E ‖E φ(c, ŷ) − φ(c, y)‖²      c a text up to an anchor, y the text's next G tokens,
                                      ŷ ~ p(· | c) those of the model, φ features of unit length

Targets constrain the token after a human's words; this constrains what the model writes after its
own. The gradient is that of a reward, with S samples ŷ_s of each anchor and the mean over pairs of
other samples m_s = Σ_{j≠i; j,i≠s} φ_j·φ_i / ((S−1)(S−2)):

    r_s = 2 φ_s·φ_y − 2/(S−1) Σ_{j≠s} φ_s·φ_j         near the text, unlike the other samples
    b_s = 2/(S−1) Σ_{j≠s} φ_j·φ_y − 2 m_s             a baseline that is independent of ŷ_s
    ∇L = −E (r_s − b_s) ∇ln p(ŷ_s | c)

The paper's baseline is the mean of the others' rewards (RLOO), which depend on ŷ_s: it retains only
(S−2)/(S−1) of the term that makes samples differ. Here the estimate is unbiased.

φ: the hidden states after some layers at a continuation's last token. Each coordinate is
standardised with its mean and deviation over the corpus, each layer is normalised to unit length,
and the layers are concatenated.

Shapes: B rows, N tokens of a row's text, K anchors of a row, S samples, G tokens of a continuation,
T trained positions of a batch, P positions for the features' moments, F features, D hidden size,
L layers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dftserve.lm import LanguageModel, evaluating
from dftserve.train.config import FeatureMatchingConfig
from dftserve.train.continuations import Anchors, Layout, sample
from dftserve.train.data import model_inputs

MOMENT_TOKENS = 8192
"""Trained positions of the corpus from which a feature's mean and deviation are estimated."""


# ── Rewards ──────────────────────────────────────────────────────────────────────────────────────


def rewards_less_baselines(features_KSF: Tensor, text_KF: Tensor) -> Tensor:
    """r_s − b_s, [K, S]; needs S ≥ 3."""
    count = features_KSF.shape[1]
    to_text_KS = torch.einsum("ksf,kf->ks", features_KSF, text_KF)
    pairs_KSS = _pairs(features_KSF)
    to_others_KS = pairs_KSS.sum(dim=2) / (count - 1)
    reward_KS = 2 * (to_text_KS - to_others_KS)
    others_to_text_KS = (to_text_KS.sum(dim=1, keepdim=True) - to_text_KS) / (count - 1)
    # Each pair occurs twice in the sum; subtract the pairs with sample s.
    among_others_KS = pairs_KSS.sum(dim=(1, 2))[:, None] - 2 * pairs_KSS.sum(dim=2)
    among_others_KS = among_others_KS / ((count - 1) * (count - 2))
    return reward_KS - 2 * (others_to_text_KS - among_others_KS)


def distances(features_KSF: Tensor, text_KF: Tensor) -> Tensor:
    """Unbiased estimates of ‖E φ(ŷ) − φ(y)‖², [K]."""
    count = features_KSF.shape[1]
    to_text_K = torch.einsum("ksf,kf->k", features_KSF, text_KF) / count
    among_K = _pairs(features_KSF).sum(dim=(1, 2)) / (count * (count - 1))
    return (text_KF**2).sum(dim=1) - 2 * to_text_K + among_K


def _pairs(features_KSF: Tensor) -> Tensor:
    """φ_s·φ_j, [K, S, S], with a zero diagonal."""
    pairs_KSS = features_KSF @ features_KSF.mT
    return pairs_KSS - torch.diag_embed(pairs_KSS.diagonal(dim1=1, dim2=2))


# ── Features ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Computes features with the model as it was before the run."""

    model: LanguageModel
    layers: tuple[int, ...]
    means_LD: Tensor
    deviations_LD: Tensor
    untrained: Callable[[], AbstractContextManager]
    """A context in which `model` is the untrained model: adapters are disabled."""

    @staticmethod
    def of(
        model: LanguageModel,
        shares: Sequence[float],
        batches: Iterable[Mapping[str, Tensor]],
        untrained: Callable[[], AbstractContextManager] = nullcontext,
    ) -> "FeatureNetwork":
        """Choose the layers and measure the features' mean and deviation on a corpus.

        Args:
            shares: positions of the layers as fractions of the depth, above 0 and up to 1.
            batches: read until `MOMENT_TOKENS` trained positions are reached, or to the end.
        """
        count = model.model.config.get_text_config().num_hidden_layers
        layers = tuple(max(1, round(share * count)) for share in shares)
        positions, sums_LD, squares_LD = 0, 0.0, 0.0
        for batch in batches:
            states_LTD = _states_at_trained(model, layers, batch, untrained)
            positions += states_LTD.shape[1]
            sums_LD = sums_LD + states_LTD.sum(dim=1)
            squares_LD = squares_LD + states_LTD.square().sum(dim=1)
            if positions >= MOMENT_TOKENS:
                break
        means_LD: Any = sums_LD / positions
        deviations_LD = (squares_LD / positions - means_LD.square()).clamp_min(0).sqrt()
        return FeatureNetwork(
            model,
            layers,
            means_LD.float(),
            # Avoid a division by zero for a constant feature.
            deviations_LD.float().clamp_min(1e-6),
            untrained,
        )

    def features(self, states: Sequence[Tensor]) -> Tensor:
        """[..., F] of unit length from the states after each layer, [..., D]."""
        parts = [
            torch.nn.functional.normalize((state.float() - mean_D) / deviation_D, dim=-1)
            for state, mean_D, deviation_D in zip(
                states, self.means_LD, self.deviations_LD, strict=True
            )
        ]
        return torch.cat(parts, dim=-1) / len(parts) ** 0.5

    @torch.no_grad()
    def of_continuations(
        self, text_BN: Tensor, layout: Layout, continuations_BKSG: Tensor
    ) -> tuple[Tensor, Tensor]:
        """([B, K, S, F], [B, K, F]): features of the samples, and of the text's continuation."""
        rows, anchors = layout.places_BK.shape
        inputs = layout.all_inputs(text_BN, continuations_BKSG, self.model.model.dtype)
        with self.untrained():
            states_BQD = self.model.layer_states(self.layers, **inputs)
        last = layout.step(layout.length - 1)
        ends_BK = (layout.places_BK + layout.length).clamp_max(layout.tokens - 1)
        each = torch.arange(rows, device=ends_BK.device)[:, None]
        of_samples_BXF = self.features([states[:, last] for states in states_BQD])
        of_text_BKF = self.features([states[each, ends_BK] for states in states_BQD])
        return of_samples_BXF.reshape(rows, anchors, layout.samples, -1), of_text_BKF


@torch.no_grad()
def _states_at_trained(
    model: LanguageModel,
    layers: Sequence[int],
    batch: Mapping[str, Tensor],
    untrained: Callable[[], AbstractContextManager],
) -> Tensor:
    """float64 [L, T, D]: the states after each layer, at the trained tokens."""
    with evaluating(model.model), untrained():
        states = model.layer_states(layers, **model_inputs(batch))
    at_T = batch["positions_T"] + 1
    return torch.stack([each.flatten(0, 1)[at_T].double() for each in states])


# ── A batch ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Matched:
    """The result of drawing and comparing a batch's continuations."""

    inputs: Mapping[str, Tensor]
    """For `model.attach`'s forward: the continuations, and the weight of each one's likelihood."""
    distance: Tensor
    """The mean over anchors of the estimate of L, times T, like a sum over trained tokens."""


@dataclass(frozen=True, eq=False)
class FeatureMatching:
    """Feature matching of one run."""

    config: FeatureMatchingConfig
    model: LanguageModel
    """The model that is trained."""
    network: FeatureNetwork
    seed: int

    @torch.no_grad()
    def match(self, batch: Mapping[str, Tensor], *key: int) -> Matched | None:
        """Draw continuations and compare them; None if no run of trained tokens is long enough.

        Args:
            key: numbers that identify this batch and, with the run's seed, seed the drawing.
        """
        seeds = np.random.SeedSequence((self.seed, *key)).generate_state(2, np.uint64)
        settings, text_BN = self.config, batch["input_ids"]
        anchors = Anchors.draw(
            batch,
            length=settings.length,
            every=settings.every,
            source=np.random.default_rng(int(seeds[0])),
        )
        if not len(anchors):
            return None
        generator = torch.Generator(text_BN.device).manual_seed(int(seeds[1] >> np.uint64(1)))
        layout = Layout.of(
            batch, anchors.places_BK, samples=settings.samples, length=settings.length
        )
        with evaluating(self.model.model):
            drawn_BKSG = sample(self.model, text_BN, layout, generator)
            of_samples_BKSF, of_text_BKF = self.network.of_continuations(
                text_BN, layout, drawn_BKSG
            )
        samples_KSF, text_KF = (each[anchors.is_real_BK] for each in (of_samples_BKSF, of_text_BKF))
        trained = len(batch["positions_T"])
        weights_BKS = torch.zeros(drawn_BKSG.shape[:3], device=text_BN.device)
        # A surrogate with the gradient of the estimate: Σ (r − b)·(−ln p), a mean over anchors and
        # samples; times T, because the divergence that it is added to is a sum over tokens.
        scale = settings.weight * trained / (len(anchors) * settings.samples)
        # In float32 also where the forwards are in bfloat16: a reward is a difference of products
        # that are nearly equal.
        with torch.autocast(text_BN.device.type, enabled=False):
            rewards_KS = rewards_less_baselines(samples_KSF, text_KF)
            distance = distances(samples_KSF, text_KF).mean()
        weights_BKS[anchors.is_real_BK] = scale * rewards_KS
        inputs = {
            "anchors_BK": anchors.places_BK,
            "continuations_BKSG": drawn_BKSG,
            "weights_BKS": weights_BKS,
        }
        return Matched(inputs, distance * trained)
