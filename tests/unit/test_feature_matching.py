"""Feature matching: its estimates are unbiased, and continuations that are batched with the text
equal separate ones."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from dftserve.lm import LanguageModel
from dftserve.targets.store import TargetStore
from dftserve.train import continuations, feature_matching
from dftserve.train.config import FeatureMatchingConfig, LoraConfig, TrainConfig
from dftserve.train.continuations import Anchors, Layout, sample
from dftserve.train.data import Collator, Rows
from dftserve.train.divergences import SFT, ForwardKL, TargetRows
from dftserve.train.feature_matching import (
    FeatureMatching,
    FeatureNetwork,
    distances,
    rewards_less_baselines,
)
from dftserve.train.head import head_loss
from dftserve.train.model import attach
from dftserve.train.plan import plan_of
from dftserve.train.prepare import make_trainer, matching_of, prepare
from dftserve.train.run import train
from dftserve.train.run_folder import RunFolder
from tests.future import no_future_warnings
from tests.training import (
    FAMILIES,
    SMALL,
    VOCABULARY,
    save_model,
    save_store,
    small_model,
    small_run,
)

pytestmark = no_future_warnings

FALSE_ALARM = 1e-6


# ── The estimates, against sums over all possible draws ──────────────────────────────────────────


def outcomes(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of five continuations, their features, and those of the text; float64."""
    generator = torch.Generator().manual_seed(seed)
    logits_V, features_VF, text_F = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (5, (5, 3), 3)
    )
    unit = torch.nn.functional.normalize
    return logits_V.requires_grad_(), unit(features_VF, dim=1), unit(text_F, dim=0)


def expected_over_draws(logits_V, features_VF, text_F, samples, of_draw):
    """Σ over all tuples of `samples` continuations of their probability times `of_draw`."""
    p_V = logits_V.softmax(dim=0).detach()
    total = 0.0
    for drawn in itertools.product(range(5), repeat=samples):
        drawn_S = torch.tensor(drawn)
        found = of_draw(drawn_S, features_VF[drawn_S][None], text_F[None])
        total = total + p_V[drawn_S].prod() * found
    return total


def estimated_gradient(logits_V, drawn_S, advantages_S):
    nll_S = -logits_V.log_softmax(dim=0)[drawn_S]
    surrogate = (advantages_S * nll_S).mean()
    return torch.autograd.grad(surrogate, logits_V)[0]


@pytest.mark.parametrize("samples", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_expected_gradient_estimate_is_the_gradient_of_the_distance(samples, seed):
    logits_V, features_VF, text_F = outcomes(seed)
    mean_F = logits_V.softmax(dim=0) @ features_VF
    exact = torch.autograd.grad(((mean_F - text_F) ** 2).sum(), logits_V)[0]
    found = expected_over_draws(
        logits_V,
        features_VF,
        text_F,
        samples,
        lambda drawn_S, features, text: estimated_gradient(
            logits_V, drawn_S, rewards_less_baselines(features, text)[0]
        ),
    )
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [3, 4])
def test_the_baseline_of_the_paper_underweights_the_repulsion_of_samples(samples):
    """With the mean of the others' rewards (RLOO) the pair term has (S−2)/(S−1) of its weight."""
    logits_V, features_VF, text_F = outcomes(0)

    def rloo(drawn_S, features_1SF, text_1F):
        pairs_SS = features_1SF[0] @ features_1SF[0].T
        to_others_S = (pairs_SS.sum(1) - pairs_SS.diagonal()) / (samples - 1)
        reward_S = 2 * features_1SF[0] @ text_1F[0] - 2 * to_others_S
        others_S = (reward_S.sum() - reward_S) / (samples - 1)
        return estimated_gradient(logits_V, drawn_S, reward_S - others_S)

    found = expected_over_draws(logits_V, features_VF, text_F, samples, rloo)
    mean_F = logits_V.softmax(dim=0) @ features_VF
    share = (samples - 2) / (samples - 1)
    weighted = share * (mean_F**2).sum() - 2 * mean_F @ text_F
    expected = torch.autograd.grad(weighted, logits_V)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [3, 4])
def test_the_expected_distance_estimate_is_the_distance(samples):
    logits_V, features_VF, text_F = outcomes(1)
    found = expected_over_draws(
        logits_V,
        features_VF,
        text_F,
        samples,
        lambda drawn_S, features, text: distances(features, text)[0],
    )
    mean_F = (logits_V.softmax(dim=0) @ features_VF).detach()
    torch.testing.assert_close(found, ((mean_F - text_F) ** 2).sum(), rtol=1e-9, atol=1e-12)


def test_the_weighted_head_loss_is_the_sum_of_weighted_losses():
    torch.manual_seed(0)
    head = LanguageModel(small_model("cohere").double(), "model").head
    hidden_ND = torch.randn(9, 32, dtype=torch.float64, requires_grad=True)
    weights_N = torch.randn(9, dtype=torch.float64)
    target = TargetRows.none(np.arange(9))
    found = head_loss(head, hidden_ND, target, SFT(), weights_N).loss
    nll_N = torch.nn.functional.cross_entropy(
        head.logits(hidden_ND), target.labels_R, reduction="none"
    )
    expected = (weights_N * nll_N).sum()
    torch.testing.assert_close(found, expected)
    wanted = (hidden_ND, head.weight_VD)
    for ours, plain in zip(
        torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(ours, plain)


# ── Anchors and continuations ────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return save_store(tmp_path_factory.mktemp("targets") / "store")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "llama")


def batch_of(store: Path, packing: bool = True, rows: int = 4) -> dict[str, torch.Tensor]:
    found = Rows(TargetStore(store), "train", longest=64, packing=packing, seed=0)
    return Collator(packing)([found[i] for i in range(rows)])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 5),
)
def test_anchors_are_followed_by_trained_tokens_of_one_document(documents, length, every, seed):
    """Rows of documents, each with a run of trained tokens after its first token."""
    longest = max(sum(row) + len(row) for row in documents)
    trained: list[int] = []
    runs: list[range] = []
    for number, row in enumerate(documents):
        start = number * longest
        for run in row:
            runs.append(range(start, start + run))
            trained += runs[-1]
            start += run + 1
    batch = {
        "input_ids": torch.zeros(len(documents), longest, dtype=torch.int64),
        "positions_T": torch.tensor(trained),
    }
    found = Anchors.draw(batch, length=length, every=every, source=np.random.default_rng(seed))
    rows, columns = found.is_real_BK.nonzero(as_tuple=True)
    at = (rows * longest + found.places_BK[rows, columns]).tolist()
    assert len(at) == len(found) == len(set(at))
    for run in runs:
        inside = [position for position in at if position in run]
        assert all(position + length <= run.stop for position in inside)
        assert all(b - a == every for a, b in itertools.pairwise(inside))
        room = len(run) - length + 1
        assert len(inside) >= room // every
        assert bool(inside) == (room > 0)


def test_every_position_that_has_a_continuation_is_drawn_eventually():
    batch = {"input_ids": torch.zeros(1, 20, dtype=torch.int64), "positions_T": torch.arange(5, 17)}
    source = np.random.default_rng(0)
    seen = {
        int(position)
        for _ in range(400)  # (7/8)^400 for each of the eight first positions.
        for position in Anchors.draw(batch, length=3, every=8, source=source).places_BK.flatten()
    }
    assert seen == set(range(5, 15))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "cohere"])
def test_continuations_batched_with_the_text_match_separate_forwards(family, packing, store):
    """Likelihoods and gradients are those of the model's own forward on each document and
    continuation, and the divergence of the text is the same as without continuations."""
    if packing is False and family != "llama":
        pytest.skip("positions without packing are made in one place")
    batch = batch_of(store, packing)
    model, twin = small_model(family), small_model(family)
    attach(model, ForwardKL(weight=0.7))
    anchors = Anchors.draw(batch, length=3, every=8, source=np.random.default_rng(0))
    shape = (*anchors.places_BK.shape, 3)
    source = torch.Generator().manual_seed(0)
    drawn_BKSG = torch.randint(VOCABULARY, (*shape, 3), generator=source)
    weights_BKS = torch.randn(shape, generator=source) * anchors.is_real_BK[..., None]
    output = model(
        **batch,
        anchors_BK=anchors.places_BK,
        continuations_BKSG=drawn_BKSG,
        weights_BKS=weights_BKS,
    )
    torch.testing.assert_close(output.loss, model(**batch).loss, rtol=1e-5, atol=1e-5)
    expected = torch.zeros(())
    positions_BN = continuations.positions_of(batch)
    for row, k in anchors.is_real_BK.nonzero().tolist():
        position = int(anchors.places_BK[row, k])
        start = position - int(positions_BN[row, position])
        prefix_N = batch["input_ids"][row, start : position + 1]
        for drawn_G, weight in zip(drawn_BKSG[row, k], weights_BKS[row, k], strict=True):
            logits_NV = twin(input_ids=torch.cat([prefix_N, drawn_G])[None]).logits[0]
            nll = torch.nn.functional.cross_entropy(logits_NV[-4:-1], drawn_G, reduction="sum")
            expected = expected + weight * nll
    torch.testing.assert_close(output.matching, expected, rtol=1e-4, atol=1e-4)
    output.matching.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_longer_than_the_attention_window_are_refused(family):
    """Gemma 2 and Mistral have windows of 8 tokens here."""
    language_model = LanguageModel(small_model(family), "model")
    continuations.check(language_model, 8)
    if family in ("gemma2", "mistral"):
        with pytest.raises(ValueError, match="max_length") as refused:
            continuations.check(language_model, 40)
        assert language_model.family in str(refused.value)
    else:
        continuations.check(language_model, 40)


def test_tokens_are_drawn_from_the_models_own_distribution():
    """The first token by a χ² test; the second and third by their mean −ln p, whose expectation is
    the entropy. The anchor is in the second document of its row."""
    model = small_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    language_model = LanguageModel(model, "model")
    text_1N = torch.tensor([[3, 4, 5, 6, 30, 31, 32, 33, 34]])
    positions_1N = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    batch = {"input_ids": text_1N, "position_ids": positions_1N}
    count = 4000
    layout = Layout.of(batch, torch.tensor([[6]]), samples=count, length=3)
    drawn_SG = sample(language_model, text_1N, layout, torch.Generator().manual_seed(0))[0, 0]
    prefix = text_1N[:, 4:7]
    with torch.no_grad():
        p_V = model(input_ids=prefix).logits[0, -1].double().softmax(0)
        ids = torch.cat([prefix.expand(count, -1), drawn_SG[:, :2]], dim=1)
        logprobs_SGV = model(input_ids=ids).logits[:, -3:].double().log_softmax(-1)
    counts_V = torch.bincount(drawn_SG[:, 0], minlength=VOCABULARY)
    common_V = p_V * count >= 5
    observed = [*counts_V[common_V].tolist(), int(counts_V[~common_V].sum())]
    expected = [*(p_V[common_V] * count).tolist(), float(p_V[~common_V].sum() * count)]
    assert stats.chisquare(observed, expected).pvalue > FALSE_ALARM
    for step in (1, 2):
        logprobs_SV = logprobs_SGV[:, step]
        entropy_S = -(logprobs_SV.exp() * logprobs_SV).sum(1)
        surprise_S = -logprobs_SV.gather(1, drawn_SG[:, step, None])[:, 0]
        off_S = surprise_S - entropy_S
        z = float(off_S.mean() / (off_S.std() / count**0.5))
        assert abs(z) < stats.norm.isf(FALSE_ALARM / 2)


# ── Features ─────────────────────────────────────────────────────────────────────────────────────


def network_of(model, store: Path, **given) -> FeatureNetwork:
    batches = [batch_of(store)]
    return FeatureNetwork.of(LanguageModel(model, "model"), (0.5, 1.0), batches, **given)


def test_features_are_of_unit_length_and_have_no_common_direction(store):
    network = network_of(small_model(), store)
    batch = batch_of(store)
    states = network.model.layer_states(
        network.layers, input_ids=batch["input_ids"], position_ids=batch["position_ids"]
    )
    features_TF = network.features(
        [each.flatten(0, 1)[batch["positions_T"] + 1] for each in states]
    ).detach()
    torch.testing.assert_close(features_TF.norm(dim=1), torch.ones(len(features_TF)))
    # The mean of vectors in all directions is short.
    assert float(features_TF.mean(dim=0).norm()) < 0.1


def test_features_of_continuations_match_separate_forwards(store):
    model = small_model("qwen3")
    network = network_of(model, store)
    batch = batch_of(store)
    anchors = Anchors.draw(batch, length=3, every=8, source=np.random.default_rng(0))
    layout = Layout.of(batch, anchors.places_BK, samples=3, length=3)
    drawn_BKSG = torch.randint(
        VOCABULARY, (*anchors.places_BK.shape, 3, 3), generator=torch.Generator().manual_seed(0)
    )
    of_samples, of_text = network.of_continuations(batch["input_ids"], layout, drawn_BKSG)
    row, k = anchors.is_real_BK.nonzero()[-1].tolist()
    position = int(anchors.places_BK[row, k])
    start = position - int(batch["position_ids"][row, position])
    text_N = batch["input_ids"][row]
    for found, tokens_N in (
        (of_text[row, k], text_N[start : position + 4]),
        (of_samples[row, k, 2], torch.cat([text_N[start : position + 1], drawn_BKSG[row, k, 2]])),
    ):
        with torch.no_grad():
            states = model(input_ids=tokens_N[None], output_hidden_states=True).hidden_states
        expected = network.features([states[layer][0, -1] for layer in network.layers])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ── A whole batch: the gradient's direction ──────────────────────────────────────────────────────


def tiny_matching(store: Path) -> tuple[LlamaForCausalLM, FeatureMatching]:
    """A vocabulary of seven, so that all continuations of two tokens can be enumerated."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SMALL | {"vocab_size": 7, "hidden_size": 16}))
    model, frozen = LlamaForCausalLM(config), LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    language_model = attach(model, SFT())
    network = FeatureNetwork.of(LanguageModel(frozen, "frozen"), (0.5, 1.0), [tiny_batch()])
    settings = FeatureMatchingConfig(weight=1, samples=4, length=2, every=4)
    return model, FeatureMatching(settings, language_model, network, seed=0)


def tiny_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = TargetRows.none(np.zeros(17, np.int64))
    return {
        "input_ids": torch.randint(7, (1, 18), generator=generator),
        "position_ids": torch.arange(18)[None],
        "positions_T": torch.arange(17),
        **vars(target),
    }


def exact_distance(model, network: FeatureNetwork, batch, positions: list[int]) -> torch.Tensor:
    """The mean over anchors of ‖E φ − φ_y‖², over all 49 continuations of two tokens."""
    text_N = batch["input_ids"][0]
    pairs = torch.tensor(list(itertools.product(range(7), repeat=2)))
    total = torch.zeros(())
    for position in positions:
        ids = torch.cat([text_N[: position + 1].expand(49, -1), pairs], dim=1)
        logprobs = model(input_ids=ids).logits[:, -3:-1].log_softmax(-1)
        p = logprobs.gather(2, pairs[..., None])[..., 0].sum(1).exp()
        with torch.no_grad():
            states = network.model.layer_states(network.layers, input_ids=ids)
            features = network.features([each[:, -1] for each in states])
            own = network.model.layer_states(network.layers, input_ids=text_N[None, : position + 3])
            of_text = network.features([each[0, -1] for each in own])
        total = total + ((p @ features - of_text) ** 2).sum()
    return total / len(positions)


def test_the_mean_gradient_of_a_batch_is_that_of_the_distance(store):
    """Over 300 draws, along the exact gradient and along another fixed direction; an error in any
    part (mask, features, rewards, weights) changes it."""
    model, matching = tiny_matching(store)
    batch = tiny_batch()
    parameters = list(model.parameters())
    rng = torch.Generator().manual_seed(1)
    other = [torch.randn(each.shape, generator=rng) for each in parameters]
    exact: dict[tuple, list[torch.Tensor]] = {}
    along, across = [], []
    for draw in range(300):
        matched = matching.match(batch, draw)
        positions = tuple(matched.inputs["anchors_BK"][0].tolist())
        if positions not in exact:
            distance = exact_distance(model, matching.network, batch, list(positions))
            exact[positions] = torch.autograd.grad(distance, parameters)
        output = model(**batch, **matched.inputs)
        # As a mean: the surrogate is added to a sum over 17 trained tokens.
        found = torch.autograd.grad(output.matching / 17, parameters)
        errors = [a - b for a, b in zip(found, exact[positions], strict=True)]
        size = sum(float((each**2).sum()) for each in exact[positions])
        along.append(_inner(errors, exact[positions]) / size)
        across.append(_inner(errors, other) / size**0.5)
    assert len(exact) == 4  # `every` is 4, and each first position occurs.
    for errors in (along, across):
        z = np.mean(errors) / (np.std(errors, ddof=1) / len(errors) ** 0.5)
        assert abs(z) < stats.norm.isf(FALSE_ALARM / 2)
    # The test can fail: a gradient that is off by half would be seen.
    assert 0.5 / (np.std(along) / len(along) ** 0.5) > stats.norm.isf(FALSE_ALARM / 2)


def _inner(a, b) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def test_the_mean_distance_estimate_of_a_batch_is_the_distance(store):
    model, matching = tiny_matching(store)
    batch = tiny_batch()
    off = []
    exact: dict[tuple, float] = {}
    for draw in range(400):
        matched = matching.match(batch, draw)
        positions = tuple(matched.inputs["anchors_BK"][0].tolist())
        if positions not in exact:
            with torch.no_grad():
                exact[positions] = float(
                    exact_distance(model, matching.network, batch, list(positions))
                )
        off.append(float(matched.distance) / 17 - exact[positions])
    z = np.mean(off) / (np.std(off, ddof=1) / len(off) ** 0.5)
    assert abs(z) < stats.norm.isf(FALSE_ALARM / 2)


def test_rewards_and_distances_are_computed_in_float32_under_autocast(store, monkeypatch):
    """Of the same continuations and features, which are near each other: rounded to bfloat16, their
    products would be equal."""
    _, matching = tiny_matching(store)
    unit, text_11F = torch.nn.functional.normalize, torch.full((1, 1, 32), 32**-0.5)
    near_114F = unit(text_11F[:, :, None] + 0.01 * torch.randn(4, 32), dim=-1)
    drawn_1142 = torch.zeros(1, 1, 4, 2, dtype=torch.int64)
    monkeypatch.setattr(feature_matching, "sample", lambda *_: drawn_1142)
    features = SimpleNamespace(of_continuations=lambda *_: (near_114F, text_11F))
    anchors = replace(matching.config, every=16)
    matching = replace(matching, network=features, config=anchors)
    plain = matching.match(tiny_batch(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = matching.match(tiny_batch(), 0)
    assert torch.equal(cast.inputs["weights_BKS"], plain.inputs["weights_BKS"])
    assert torch.equal(cast.distance, plain.distance)
    assert plain.inputs["weights_BKS"].unique().numel() == 4


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(base, store, tmp_path) -> TrainConfig:
    matching = FeatureMatchingConfig(samples=3, length=3, every=8)
    return small_run(base, store, tmp_path / "run", feature_matching=matching)


def weights_of(final: Path) -> dict[str, torch.Tensor]:
    return load_file(final / "model.safetensors")


def test_states_that_are_not_finite_are_refused_before_a_token_is_drawn(store):
    model, matching = tiny_matching(store)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="states are not finite"):
        matching.match(tiny_batch(), 0)


def test_a_run_reports_the_distance_and_its_weights_differ_from_those_without(run, tmp_path):
    final = train(run)
    report = json.loads((final / "run.json").read_text())
    assert 0 < report["metrics"]["feature_distance"] < 4
    without = train(replace(run, feature_matching=None, output=str(tmp_path / "without")))
    assert "feature_distance" not in json.loads((without / "run.json").read_text())["metrics"]
    ours, theirs = weights_of(final), weights_of(without)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(run, tmp_path, accumulation):
    run = replace(run, accumulation=accumulation)
    whole = train(replace(run, output=str(tmp_path / "whole")))
    prepared = prepare(run)

    class Dies(TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            if state.global_step == 5:
                raise KeyboardInterrupt

    matching = matching_of(run, prepared.loaded, prepared.material)
    given = (run, prepared.loaded.model, prepared.material, (Dies(),))
    trainer = make_trainer(*given, matching=matching)
    with RunFolder(run) as folder:
        folder.begin()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (Path(run.output) / "checkpoint-4").exists()
    ours, theirs = weights_of(train(run)), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_with_adapters_the_network_is_the_model_without_them(run):
    """However they are trained: they are off for features, and on for sampling."""
    run = replace(run, lora=LoraConfig(rank=4))
    prepared = prepare(run)
    matching = matching_of(run, prepared.loaded, prepared.material)
    assert matching.network.model is matching.model is prepared.loaded.language_model
    batch = prepared.material.collate([prepared.material.train[0]])
    anchors = Anchors.draw(batch, length=3, every=8, source=np.random.default_rng(0))
    layout = Layout.of(batch, anchors.places_BK, samples=3, length=3)
    drawn = sample(matching.model, batch["input_ids"], layout, torch.Generator().manual_seed(0))

    def found():
        features = matching.network.of_continuations(batch["input_ids"], layout, drawn)
        again = torch.Generator().manual_seed(0)
        return *features, sample(matching.model, batch["input_ids"], layout, again)

    before = found()
    with torch.no_grad():
        for name, value in prepared.loaded.model.named_parameters():
            if "lora_B" in name:
                value.normal_()
    after = found()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])


def test_training_brings_continuations_closer_than_plain_fine_tuning(run, tmp_path):
    """On the training texts, whose order is mostly certain, at equal steps and learning rate."""
    run = replace(run, steps=40, learning_rate=3e-3, log_every=10)
    matching = FeatureMatchingConfig(samples=4, length=4, every=8, weight=10)

    def distance(weight_run) -> float:
        final = train(weight_run)
        measured = replace(run, model=str(final), feature_matching=matching)
        prepared = prepare(measured)
        # In the features of the model before both runs.
        network = matching_of(run, prepare(run).loaded, prepared.material).network
        found = FeatureMatching(matching, prepared.loaded.language_model, network, seed=1)
        material = prepared.material
        batches = [material.collate([material.train[i]]) for i in range(12)]
        matches = [(found.match(b, i), len(b["positions_T"])) for i, b in enumerate(batches)]
        return sum(float(each.distance) / tokens for each, tokens in matches) / len(matches)

    with_it = distance(replace(run, feature_matching=matching))
    without = distance(replace(run, feature_matching=None, output=str(tmp_path / "without")))
    assert with_it < without


def test_a_plan_counts_the_network_and_its_activations(run):
    plan, plain = plan_of(run), plan_of(replace(run, feature_matching=None))
    assert plan.network_bytes == plan.weights_bytes
    assert plain.network_bytes == 0
    assert plan.activation_bytes > plain.activation_bytes
    assert "those before the run" in plan.as_text()
    assert "before the run" not in plain.as_text()
    with_lora = plan_of(replace(run, lora=LoraConfig(rank=4)))
    assert with_lora.network_bytes == 0


def test_documents_without_room_for_a_continuation_are_refused(run, tmp_path):
    """If no document has room: the run would silently be plain training."""
    brief = save_store(tmp_path / "brief", longest=3)
    longest = max(TargetStore(brief).lengths("train"))
    matching = FeatureMatchingConfig(samples=3, length=longest, every=8)
    with pytest.raises(
        ValueError, match=f"feature_matching.length: got {longest}, and no document"
    ):
        prepare(replace(run, targets=str(brief), feature_matching=matching))
    prepare(
        replace(run, targets=str(brief), feature_matching=replace(matching, length=longest - 1))
    )


def test_batches_without_anchors_do_not_count_as_a_distance_of_0(run, tmp_path):
    """Some held-out rows are too short: the mean is that of the others."""
    matching = FeatureMatchingConfig(samples=3, length=24, every=64)
    config = replace(run, feature_matching=matching, packing=False, batch_size=1)
    prepared = prepare(config)
    trainer = make_trainer(
        config,
        prepared.loaded.model,
        prepared.material,
        matching=matching_of(config, prepared.loaded, prepared.material),
    )
    (part,) = trainer.eval_dataset
    has_room = [any(len(document.positions_T) >= 24 for document, _ in row) for row in part.rows]
    assert len(set(has_room)) == 2
    whole = trainer.evaluate()["eval_feature_distance"]
    matches = [
        trainer._matched(trainer._prepare_inputs(prepared.material.collate([row])), 1, number, 0)
        for number, row in enumerate(part.rows)
    ]
    assert [each is not None for each in matches] == has_room
    tokens = sum(
        sum(len(document.positions_T) for document, _ in row)
        for row, has in zip(part.rows, has_room, strict=True)
        if has
    )
    expected = sum(float(each.distance) for each in matches if each is not None) / tokens
    assert whole == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 2}, "samples: got 2; accepted: from 3"),
        ({"length": 0}, "length: got 0"),
        ({"every": 0}, "every: got 0"),
        ({"weight": 0.0}, "weight: got 0; accepted: above 0"),
        ({"layers": ()}, "layers: got none"),
        ({"layers": (1.5,)}, "layers: got 1.5"),
    ],
)
def test_settings_out_of_bounds_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FeatureMatchingConfig(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp": True}, "fsdp: got true with feature_matching"),
        ({"torch_compile": True}, "torch_compile: got true with feature_matching"),
        ({"attention": "flex_attention"}, "attention: got 'flex_attention'"),
        ({"max_length": 3}, "feature_matching.length: got 3"),
    ],
)
def test_incompatible_settings_are_refused(run, given, message):
    with pytest.raises(ValueError, match=message):
        replace(run, **given)
