"""Divergences between a model's next-token distribution and a target, with closed-form gradients.

    q' = (1 − λ)·δ_y + λ·q       y the text's own token, q the stored target, λ its weight

Each divergence computes its value and its gradient with respect to the logits in one pass over a
chunk of rows (`loss_and_gradient`), and defines its value in differentiable torch (`reference`).

`ForwardKL` uses the stored top and the tail's draws and is unbiased over the draws, up to the
float16 rounding of the store (a relative 4e-3 of an entry's probability at most). `ReverseKL`,
`SkewKL` and `JSD` lump the tail into one cell: by the data-processing inequality their value is a
lower bound of the true one. `SlicedW1` puts the tail's mass on its draws: since it is convex in q,
its value is an upper bound in expectation. `SFT`, `LabelSmoothing`, `EntropyBonus` and `GEM` are
baselines that read no target.

Shapes: R rows, V vocabulary, K top entries, M draws, C = K + 2 cells (the top, the text's own token
if it is not among them, the rest), L projections.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dftserve.targets.sparse import Targets

FLOOR = 1e-6
"""Lower bound of a target cell's probability inside a logarithm; a target may have empty cells."""


@dataclass(frozen=True, eq=False)
class TargetRows:
    """The text's own tokens and the stored targets of R rows; see `targets.sparse.Targets`.

    A baseline reads only the labels; the other tensors may then have no columns.
    """

    labels_R: Tensor
    """int64."""
    top_ids_RK: Tensor
    """−1 for a missing entry, whose log-probability is −inf."""
    top_logprobs_RK: Tensor
    tail_ids_RM: Tensor
    tail_logprob_R: Tensor
    token_logprob_R: Tensor
    entropy_R: Tensor

    @staticmethod
    def of(labels_T: np.ndarray, targets: Targets) -> "TargetRows":
        """In float64, normalised to sum to 1; float16 rounding can be off by up to 4e-3."""
        top_TK, tail_T = (
            torch.from_numpy(values).double()
            for values in (targets.top_logprobs_TK, targets.tail_logprob_T)
        )
        total_T = torch.cat([top_TK, tail_T[:, None]], dim=1).logsumexp(dim=1)
        return TargetRows(
            labels_R=torch.from_numpy(labels_T.astype(np.int64)),
            top_ids_RK=torch.from_numpy(targets.top_ids_TK),
            top_logprobs_RK=top_TK - total_T[:, None],
            tail_ids_RM=torch.from_numpy(targets.tail_ids_TM),
            tail_logprob_R=tail_T - total_T,
            token_logprob_R=torch.from_numpy(targets.token_logprob_T).double() - total_T,
            entropy_R=torch.from_numpy(targets.entropy_T).double(),
        )

    @staticmethod
    def none(labels_T: np.ndarray) -> "TargetRows":
        """Labels only, for a baseline that reads no target."""
        rows = len(labels_T)
        return TargetRows.of(
            labels_T,
            Targets(
                top_ids_TK=np.zeros((rows, 0), dtype=np.int64),
                top_logprobs_TK=np.zeros((rows, 0), dtype=np.float32),
                tail_ids_TM=np.zeros((rows, 0), dtype=np.int64),
                tail_logprob_T=np.zeros(rows, dtype=np.float32),
                token_logprob_T=np.zeros(rows, dtype=np.float32),
                entropy_T=np.zeros(rows, dtype=np.float32),
            ),
        )

    def __len__(self) -> int:
        return len(self.labels_R)

    def __getitem__(self, index: slice) -> "TargetRows":
        return TargetRows(**{each.name: getattr(self, each.name)[index] for each in fields(self)})

    def to(self, dtype: torch.dtype) -> "TargetRows":
        """Convert the probabilities to another dtype."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return TargetRows(
            **{n: v.to(dtype) if v.is_floating_point() else v for n, v in values.items()}
        )


@dataclass(frozen=True, eq=False)
class LogitRows:
    """R rows of a model: the logits, and the quantities of them that every divergence needs."""

    logits_RV: Tensor
    p_RV: Tensor
    log_z_R: Tensor
    """ln Σ exp(logits)."""

    @staticmethod
    def of(logits_RV: Tensor) -> "LogitRows":
        """Uses one exponential per entry: log Z = z_max − ln p_max."""
        p_RV = logits_RV.softmax(dim=1)
        p_max_R, at_R = p_RV.max(dim=1)
        return LogitRows(logits_RV, p_RV, logits_RV.gather(1, at_R[:, None])[:, 0] - p_max_R.log())

    @property
    def entropy_R(self) -> Tensor:
        """H(p) in nats."""
        return self.log_z_R - torch.linalg.vecdot(self.p_RV, self.logits_RV)


class Divergence(ABC):
    """The loss that training minimises."""

    reads_target: ClassVar[bool] = True
    needs_draws: ClassVar[bool] = False
    """Whether a store with a lumped tail is refused."""

    @abstractmethod
    def loss_and_gradient(self, rows: "LogitRows", target: TargetRows) -> tuple[Tensor, Tensor]:
        """(loss_R in nats, d loss / d logits [R, V]); the rows' tensors may be overwritten."""

    @abstractmethod
    def reference(self, logits_RV: Tensor, target: TargetRows) -> Tensor:
        """loss_R in differentiable torch: the definition, for tests of the fast form."""


# ── Forward KL and its special case ──────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(q' ‖ p). Gradient p − q', where the tail's draws represent the tail.

    λ = 0 is SFT, exactly.
    """

    weight: float = 0.6
    """λ, from 0 (the text alone) to 1 (the target alone)."""
    needs_draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _bounded("weight", self.weight, 0.0, 1.0)

    def loss_and_gradient(self, rows: LogitRows, target: TargetRows) -> tuple[Tensor, Tensor]:
        ids_RE, mass_RE = self.entries(target)
        cross_entropy_R = rows.log_z_R - (mass_RE * rows.logits_RV.gather(1, ids_RE)).sum(dim=1)
        gradient_RV = rows.p_RV.scatter_add_(1, ids_RE, -mass_RE)
        return cross_entropy_R - mixed_entropy(target, self.weight), gradient_RV

    def reference(self, logits_RV: Tensor, target: TargetRows) -> Tensor:
        logprobs_RV = logits_RV.log_softmax(dim=1)
        own_R = _own(logprobs_RV, target)
        top_R = (target.top_logprobs_RK.exp() * logprobs_RV.gather(1, _top_ids(target))).sum(1)
        tail_R = torch.zeros_like(own_R)
        if target.tail_ids_RM.shape[1]:  # Without draws the tail is empty.
            drawn_R = logprobs_RV.gather(1, target.tail_ids_RM).mean(1)
            tail_R = target.tail_logprob_R.exp() * drawn_R
        cross_entropy_R = -((1 - self.weight) * own_R + self.weight * (top_R + tail_R))
        return cross_entropy_R - mixed_entropy(target, self.weight)

    def entries(self, target: TargetRows) -> tuple[Tensor, Tensor]:
        """ids_RE and mass_RE: the estimate of q' as point masses, E = 1 + K + M; ids may repeat."""
        own_R1 = target.token_logprob_R.new_full((len(target), 1), 1 - self.weight)
        if self.weight == 0:
            return target.labels_R[:, None], own_R1
        draws = target.tail_ids_RM.shape[1]
        each_R1 = self.weight / max(draws, 1) * target.tail_logprob_R.exp()[:, None]
        ids_RE = torch.cat([target.labels_R[:, None], _top_ids(target), target.tail_ids_RM], dim=1)
        top_RK = self.weight * target.top_logprobs_RK.exp()
        return ids_RE, torch.cat([own_R1, top_RK, each_R1.expand(-1, draws)], dim=1)


def _top_ids(target: TargetRows) -> Tensor:
    """`top_ids_RK` with missing entries, whose mass is 0, replaced by the text's own token."""
    return torch.where(target.top_ids_RK < 0, target.labels_R[:, None], target.top_ids_RK)


def mixed_entropy(target: TargetRows, weight: float) -> Tensor:
    """H(q') in nats, exactly, from H(q) and q_y: q' differs from λ·q only at y.

    H(q') = λ·(H(q) + q_y ln q_y) − λ(1 − q_y) ln λ − q'_y ln q'_y
    """
    if weight == 0:
        return torch.zeros_like(target.token_logprob_R)
    own_R = target.token_logprob_R.exp()
    mixed_R = (1 - weight) + weight * own_R
    others_R = weight * (target.entropy_R + torch.xlogy(own_R, own_R))
    return others_R - weight * (1 - own_R) * math.log(weight) - torch.xlogy(mixed_R, mixed_R)


@dataclass(frozen=True)
class SFT(Divergence):
    """−ln p_y: plain fine-tuning."""

    reads_target: ClassVar[bool] = False

    def loss_and_gradient(self, rows: LogitRows, target: TargetRows) -> tuple[Tensor, Tensor]:
        loss_R = rows.log_z_R - _own(rows.logits_RV, target)
        return loss_R, _less_one_at(rows.p_RV, target.labels_R)

    def reference(self, logits_RV: Tensor, target: TargetRows) -> Tensor:
        return torch.nn.functional.cross_entropy(logits_RV, target.labels_R, reduction="none")


# ── Divergences of lumped cells ──────────────────────────────────────────────────────────────────


class LumpedDivergence(Divergence):
    """A function of the cells' probabilities, P of the model and T of the target.

    With g_c = ∂D/∂P_c the gradient is p_j·(g_c(j) − Σ_c P_c g_c) for every token j of cell c.
    """

    weight: float

    @abstractmethod
    def value(self, p_RC: Tensor, t_RC: Tensor) -> Tensor:
        """D, [R]."""

    @abstractmethod
    def slope(self, p_RC: Tensor, t_RC: Tensor) -> Tensor:
        """∂D/∂P, [R, C], up to one constant a row."""

    def loss_and_gradient(self, rows: LogitRows, target: TargetRows) -> tuple[Tensor, Tensor]:
        p_RV = rows.p_RV
        ids_RS, single_RS, t_RC = self.cells(target)
        p_RC = _with_rest(p_RV.gather(1, ids_RS) * single_RS)
        slope_RC = self.slope(p_RC, t_RC)
        mean_R1 = (p_RC * slope_RC).sum(dim=1, keepdim=True)
        rest_R1 = slope_RC[:, -1:] - mean_R1
        correction_RS = p_RC[:, :-1] * (slope_RC[:, :-1] - slope_RC[:, -1:])
        p_RV.mul_(rest_R1).scatter_add_(1, ids_RS, correction_RS * single_RS)
        return self.value(p_RC, t_RC), p_RV

    def reference(self, logits_RV: Tensor, target: TargetRows) -> Tensor:
        p_RV = logits_RV.softmax(dim=1)
        ids_RS, single_RS, t_RC = self.cells(target)
        return self.value(_with_rest(p_RV.gather(1, ids_RS) * single_RS), t_RC)

    def cells(self, target: TargetRows) -> tuple[Tensor, Tensor, Tensor]:
        """ids_RS: the tokens with a cell of their own, S = K + 1. single_RS: 1, or 0 for missing
        top entries and for the text's own token if it is among the top. t_RC: q' of each cell, the
        rest last."""
        ids_RS = torch.cat([_top_ids(target), target.labels_R[:, None]], dim=1)
        is_own_RK = target.top_ids_RK == target.labels_R[:, None]
        own_cell_R1 = (~is_own_RK.any(dim=1, keepdim=True)).to(target.top_logprobs_RK.dtype)
        has_RK = (target.top_ids_RK >= 0).to(target.top_logprobs_RK.dtype)
        single_RS = torch.cat([has_RK, own_cell_R1], dim=1)
        own_R1 = target.token_logprob_R.exp()[:, None]
        top_RK = self.weight * target.top_logprobs_RK.exp() + (1 - self.weight) * is_own_RK
        t_own_R1 = own_cell_R1 * (1 - self.weight + self.weight * own_R1)
        tail_R1 = target.tail_logprob_R.exp()[:, None] - own_cell_R1 * own_R1
        t_RC = torch.cat([top_RK, t_own_R1, self.weight * tail_R1.clamp_min(0.0)], dim=1)
        return ids_RS, single_RS, t_RC


@dataclass(frozen=True, kw_only=True)
class ReverseKL(LumpedDivergence):
    """KL(p ‖ q'), the literature's D_KL(P_model ‖ P_target); cells of q' are at least FLOOR."""

    weight: float = 0.9
    """λ, above 0: against the text's own token alone, reverse KL is infinite."""

    def __post_init__(self) -> None:
        if self.weight == 0:
            raise ValueError(
                "weight: got 0; reverse KL accepts a number above 0 to 1: against the text alone "
                "it is infinite. Use forward_kl, which is plain fine-tuning at 0."
            )
        _bounded("weight", self.weight, 0.0, 1.0)

    def value(self, p_RC: Tensor, t_RC: Tensor) -> Tensor:
        return (p_RC * (_safe_log(p_RC) - t_RC.clamp_min(FLOOR).log())).sum(dim=1)

    def slope(self, p_RC: Tensor, t_RC: Tensor) -> Tensor:
        return _safe_log(p_RC) - t_RC.clamp_min(FLOOR).log()


@dataclass(frozen=True, kw_only=True)
class SkewKL(LumpedDivergence):
    """KL(q' ‖ α·q' + (1 − α)·p): a forward KL that is always finite (arXiv 2402.03898)."""

    weight: float = 0.9
    skew: float = 0.1
    """α."""

    def __post_init__(self) -> None:
        _bounded("weight", self.weight, 0.0, 1.0)
        _inside("skew", self.skew)

    def value(self, p_RC: Tensor, t_RC: Tensor) -> Tensor:
        between_RC = self.skew * t_RC + (1 - self.skew) * p_RC
        return (t_RC * (_safe_log(t_RC) - _safe_log(between_RC))).sum(dim=1)

    def slope(self, p_RC: Tensor, t_RC: Tensor) -> Tensor:
        between_RC = self.skew * t_RC + (1 - self.skew) * p_RC
        return -(1 - self.skew) * t_RC / between_RC.clamp_min(_tiny(p_RC))


@dataclass(frozen=True, kw_only=True)
class JSD(LumpedDivergence):
    """π·KL(q' ‖ m) + (1 − π)·KL(p ‖ m), m = π·q' + (1 − π)·p (arXiv 2306.13649)."""

    weight: float = 0.9
    share: float = 0.5
    """π."""

    def __post_init__(self) -> None:
        _bounded("weight", self.weight, 0.0, 1.0)
        _inside("share", self.share)

    def value(self, p_RC: Tensor, t_RC: Tensor) -> Tensor:
        mean_RC = self.share * t_RC + (1 - self.share) * p_RC
        of_target_RC = t_RC * (_safe_log(t_RC) - _safe_log(mean_RC))
        of_model_RC = p_RC * (_safe_log(p_RC) - _safe_log(mean_RC))
        return (self.share * of_target_RC + (1 - self.share) * of_model_RC).sum(dim=1)

    def slope(self, p_RC: Tensor, t_RC: Tensor) -> Tensor:
        mean_RC = self.share * t_RC + (1 - self.share) * p_RC
        return (1 - self.share) * (_safe_log(p_RC) - _safe_log(mean_RC))


# ── Sliced Wasserstein ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Projections:
    """The vocabulary projected onto L lines: order and distances of the tokens on each line."""

    order_LV: Tensor
    """int64: the tokens from left to right."""
    gaps_LV: Tensor
    """The distance from each token to the next one; 0 after the last."""

    @staticmethod
    def of(embeddings_VD: Tensor, *, lines: int, seed: int) -> "Projections":
        """Project the frozen embeddings, normalised to length 1, onto random directions."""
        generator = torch.Generator().manual_seed(seed)
        directions_DL = torch.randn(embeddings_VD.shape[1], lines, generator=generator)
        directions_DL /= directions_DL.norm(dim=0)
        scaled_VD = torch.nn.functional.normalize(embeddings_VD.detach().float(), dim=1)
        placed_LV = (scaled_VD @ directions_DL.to(scaled_VD.device)).T
        sorted_LV, order_LV = placed_LV.sort(dim=1)
        gaps_LV = torch.diff(sorted_LV, dim=1, append=sorted_LV[:, -1:])
        return Projections(order_LV, gaps_LV)


@dataclass(frozen=True, kw_only=True)
class SlicedW1(Divergence):
    """The mean Wasserstein-1 distance of p and q' over random lines through the embeddings.

    On a line W1 = Σ_i |F_p(i) − F_q'(i)|·gap_i, the exact distance of the two CDFs.
    """

    projections: Projections
    weight: float = 0.9
    needs_draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _bounded("weight", self.weight, 0.0, 1.0)

    def loss_and_gradient(self, rows: LogitRows, target: TargetRows) -> tuple[Tensor, Tensor]:
        p_RV = rows.p_RV
        excess_RV = self._excess(p_RV, target)
        lines = len(self.projections.order_LV)
        loss_R, slope_RV = excess_RV.new_zeros(len(p_RV)), torch.zeros_like(p_RV)
        for order_V, gaps_V in self._lines(p_RV):
            ahead_RV = excess_RV[:, order_V].cumsum(dim=1)
            loss_R += ahead_RV.abs() @ gaps_V / lines
            # A token's mass counts in the CDF from its own position to the right end.
            pull_RV = (ahead_RV.sign() * gaps_V).flip(1).cumsum(dim=1).flip(1) / lines
            slope_RV.scatter_add_(1, order_V.expand_as(pull_RV), pull_RV)
        mean_R1 = (p_RV * slope_RV).sum(dim=1, keepdim=True)
        return loss_R, p_RV.mul_(slope_RV.sub_(mean_R1))

    def reference(self, logits_RV: Tensor, target: TargetRows) -> Tensor:
        excess_RV = self._excess(logits_RV.softmax(dim=1), target)
        distances = [
            (excess_RV[:, order_V].cumsum(dim=1).abs() * gaps_V).sum(dim=1)
            for order_V, gaps_V in self._lines(excess_RV)
        ]
        return torch.stack(distances).mean(dim=0)

    def _lines(self, like_RV: Tensor):
        gaps_LV = self.projections.gaps_LV.to(like_RV)
        return zip(self.projections.order_LV.to(like_RV.device), gaps_LV, strict=True)

    def _excess(self, p_RV: Tensor, target: TargetRows) -> Tensor:
        """p − q'."""
        ids_RE, mass_RE = ForwardKL(weight=self.weight).entries(target)
        return p_RV.scatter_add(1, ids_RE, -mass_RE)


# ── Baselines ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Divergence):
    """Cross-entropy to (1 − ε)·δ_y + ε/V."""

    epsilon: float = 0.1
    reads_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _bounded("epsilon", self.epsilon, 0.0, 1.0)

    def loss_and_gradient(self, rows: LogitRows, target: TargetRows) -> tuple[Tensor, Tensor]:
        own_R, mean_R = _own(rows.logits_RV, target), rows.logits_RV.mean(dim=1)
        loss_R = rows.log_z_R - (1 - self.epsilon) * own_R - self.epsilon * mean_R
        gradient_RV = rows.p_RV.sub_(self.epsilon / rows.p_RV.shape[1])
        return loss_R, _less_one_at(gradient_RV, target.labels_R, 1 - self.epsilon)

    def reference(self, logits_RV: Tensor, target: TargetRows) -> Tensor:
        return torch.nn.functional.cross_entropy(
            logits_RV, target.labels_R, reduction="none", label_smoothing=self.epsilon
        )


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(Divergence):
    """−ln p_y − c·H(p). Gradient p − δ_y + c·p·(ln p + H)."""

    strength: float = 0.1
    """c, in nats of loss per nat of entropy."""
    reads_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _bounded("strength", self.strength, 0.0, 10.0)

    def loss_and_gradient(self, rows: LogitRows, target: TargetRows) -> tuple[Tensor, Tensor]:
        entropy_R = rows.entropy_R
        loss_R = rows.log_z_R - _own(rows.logits_RV, target) - self.strength * entropy_R
        # p·(1 + c·(z − log Z + H)), without another [R, V].
        bonus_RV = rows.logits_RV.add_((entropy_R - rows.log_z_R)[:, None]).mul_(self.strength)
        gradient_RV = rows.p_RV.mul_(bonus_RV.add_(1.0))
        return loss_R, _less_one_at(gradient_RV, target.labels_R)

    def reference(self, logits_RV: Tensor, target: TargetRows) -> Tensor:
        logprobs_RV = logits_RV.log_softmax(dim=1)
        entropy_R = -(logprobs_RV.exp() * logprobs_RV).sum(dim=1)
        return -_own(logprobs_RV, target) - self.strength * entropy_R


@dataclass(frozen=True, kw_only=True)
class GEM(Divergence):
    """GEM with a linear h (arXiv 2408.16673), equivalent to SFT at a training temperature β.

    β·CE(z/β), gradient softmax(z/β) − δ_y.
    """

    temperature: float = 0.7
    """β."""
    reads_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _bounded("temperature", self.temperature, 0.01, 10.0)

    def loss_and_gradient(self, rows: LogitRows, target: TargetRows) -> tuple[Tensor, Tensor]:
        cooled = LogitRows.of(rows.logits_RV.div_(self.temperature))
        loss_R, gradient_RV = SFT().loss_and_gradient(cooled, target)
        return self.temperature * loss_R, gradient_RV

    def reference(self, logits_RV: Tensor, target: TargetRows) -> Tensor:
        return self.temperature * SFT().reference(logits_RV / self.temperature, target)


DIVERGENCES: Mapping[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "skew_kl": SkewKL,
    "jsd": JSD,
    "sliced_w1": SlicedW1,
    "sft": SFT,
    "label_smoothing": LabelSmoothing,
    "entropy_bonus": EntropyBonus,
    "gem": GEM,
}


# ── Shared arithmetic ────────────────────────────────────────────────────────────────────────────


def _own(values_RV: Tensor, target: TargetRows) -> Tensor:
    return values_RV.gather(1, target.labels_R[:, None])[:, 0]


def _less_one_at(p_RV: Tensor, labels_R: Tensor, mass: float = 1.0) -> Tensor:
    taken_R1 = p_RV.new_full((len(labels_R), 1), -mass)
    return p_RV.scatter_add_(1, labels_R[:, None], taken_R1)


def _with_rest(single_RS: Tensor) -> Tensor:
    rest_R1 = (1.0 - single_RS.sum(dim=1, keepdim=True)).clamp_min(0.0)
    return torch.cat([single_RS, rest_R1], dim=1)


def _safe_log(p_RC: Tensor) -> Tensor:
    return p_RC.clamp_min(_tiny(p_RC)).log()


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def _bounded(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}; accepted: a number from {low:g} to {high:g}.")


def _inside(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}: got {value}; accepted: a number between 0 and 1.")
