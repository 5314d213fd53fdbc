"""Training on several weighted target stores: the order of rows, a run's metrics, and refusals."""

import json
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import (
    BatchSamplerShard,
)
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import BatchSampler
from transformers import TrainerCallback

from dftserve import checkpoint
from dftserve.cli import main
from dftserve.fingerprints import tokenizer_fingerprint
from dftserve.targets import store as stores
from dftserve.targets.document import Document
from dftserve.targets.encoding import encode_text
from dftserve.targets.sparse import Targets
from dftserve.targets.store import MANIFEST, TargetStore
from dftserve.train import config as configs
from dftserve.train.config import DivergenceConfig, StoreConfig, TrainConfig
from dftserve.train.data import Collator, Rows, cut_documents, merge_targets, one_per_row, pack
from dftserve.train.divergences import JSD, ForwardKL, ReverseKL, SkewKL, TargetRows
from dftserve.train.final_checkpoint import measure_profile
from dftserve.train.material import read, steps_of
from dftserve.train.mixed import MixedRows, MixedSampler, mixed_order, whole_shares
from dftserve.train.plan import plan_of
from dftserve.train.prepare import make_trainer, prepare
from dftserve.train.run import train
from dftserve.train.run_folder import RunFolder
from dftserve.train.stores import _check_splits, store_names
from dftserve.train.target_weight import differs
from tests.training import (
    VOCABULARY,
    WORDS,
    Noise,
    save_model,
    save_store,
    save_texts,
    small_run,
    tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    save_model(folder / "base")
    save_store(folder / "stories", count=40, heldout=5)
    save_store(folder / "answers", count=90, heldout=9, seed=3, longest=12)
    return folder


@pytest.fixture
def run(folder, tmp_path) -> TrainConfig:
    targets = mixed(folder, stories=0.7, answers=0.3)
    return small_run(folder / "base", targets, tmp_path / "run", max_length=32)


def mixed(folder: Path, **weights: float) -> tuple[StoreConfig, ...]:
    return tuple(
        StoreConfig(path=str(folder / name), weight=weight) for name, weight in weights.items()
    )


# ── The order of rows ────────────────────────────────────────────────────────────────────────────

STORE = st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any)
WEIGHT = st.one_of(st.floats(1e-3, 1e3), st.integers(1, 9))


@st.composite
def mixtures(draw) -> tuple[list[list[int]], list[float]]:
    """The number of trained tokens of each store's rows, and the stores' weights."""
    trained = draw(st.lists(STORE, min_size=1, max_size=6))
    weights = draw(st.lists(WEIGHT, min_size=len(trained), max_size=len(trained)))
    return trained, weights


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 9))
def test_after_each_row_every_store_is_within_one_row_of_its_share(mixture, seed):
    trained, weights = mixture
    longest = max(map(max, trained))
    taken = [0] * len(trained)
    for store, row in islice(mixed_order(trained, weights, seed), 200):
        taken[store] += trained[store][row]
        for count, weight in zip(taken, weights, strict=True):
            assert abs(count - weight / sum(weights) * sum(taken)) <= longest * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(0, 9))
def test_a_store_is_read_completely_before_it_is_read_again(mixture, seed):
    trained, weights = mixture
    seen: list[list[int]] = [[] for _ in trained]
    for store, row in islice(mixed_order(trained, weights, seed), 200):
        seen[store].append(row)
    for rows, of_store in zip(seen, trained, strict=True):
        for start in range(0, len(rows), len(of_store)):
            one_pass = rows[start : start + len(of_store)]
            assert len(set(one_pass)) == len(one_pass)


def test_each_pass_over_a_store_has_another_order():
    order = [row for _, row in islice(mixed_order([[1] * 30], [1.0], 0), 60)]
    assert sorted(order[:30]) == sorted(order[30:]) == list(range(30))
    assert order[:30] != order[30:]


@settings(max_examples=20, deadline=None)
@given(mixtures(), st.integers(0, 9))
def test_the_order_is_determined_by_rows_seed_and_relative_weights(mixture, seed):
    trained, weights = mixture
    first, again = (list(islice(mixed_order(trained, weights, seed), 100)) for _ in range(2))
    assert first == again
    doubled = [2 * weight for weight in whole_shares(weights)]
    assert list(islice(mixed_order(trained, doubled, seed), 100)) == first


def test_whole_shares_are_exact_in_decimals():
    assert whole_shares([0.7, 0.3]) == whole_shares([70, 30]) == [7, 3]
    assert whole_shares([0.1, 0.2, 1e-05]) == [10000, 20000, 1]


def rows_of(folder: Path, *, packing: bool = True, split: str = "train") -> MixedRows:
    stores = [TargetStore(folder / name) for name in ("stories", "answers")]
    parts = [Rows(store, split, longest=32, packing=packing, seed=0) for store in stores]
    return MixedRows(parts, weights=[0.7, 0.3], seed=0)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_ends_when_one_store_has_been_read_once(folder, packing):
    rows = rows_of(folder, packing=packing)
    taken = Counter(store for store, _ in islice(rows.order(), len(rows)))
    left = [len(part) - taken[store] for store, part in enumerate(rows.parts)]
    assert min(left) == 0 < max(left)
    assert Counter(store for store, _ in islice(rows.order(), len(rows) - 1)) != taken


def test_epochs_follow_the_order_also_when_requested_out_of_sequence(folder):
    rows = rows_of(folder)
    size = len(rows)
    whole = list(islice(rows.order(), 4 * size))
    sampler = MixedSampler(rows)
    for epoch in (0, 1, 3, 2, 2, 0):
        sampler.set_epoch(epoch)
        assert list(sampler) == whole[epoch * size : (epoch + 1) * size]
    sampler.set_epoch(1)
    assert next(iter(sampler)) == whole[size]
    assert list(sampler) == whole[size : 2 * size], "after an iteration that was abandoned"


def test_two_processes_divide_the_rows_of_an_epoch(folder):
    """As accelerate wraps the sampler. tests/unit/test_train_processes.py resumes within one."""
    rows = rows_of(folder)

    def read_by(rank: int) -> list[Any]:
        sampler: Any = MixedSampler(rows)
        sampler.set_epoch(1)
        batches = BatchSampler(sampler, batch_size=2, drop_last=False)
        return list(BatchSamplerShard(batches, num_processes=2, process_index=rank))

    read = [key for pair in zip(read_by(0), read_by(1), strict=True) for b in pair for key in b]
    order = list(islice(rows.order(), len(rows), 2 * len(rows)))
    assert read[: len(order)] == order
    assert len(read) - len(order) < 4, "more than what fills up the last batches"


@pytest.mark.parametrize("packing", [True, False])
def test_counted_trained_tokens_are_those_of_the_batches(folder, packing):
    """Also for documents that are cut into windows."""
    rows = rows_of(folder, packing=packing)
    assert any(length > 32 for length in TargetStore(folder / "stories").lengths("train"))
    for part in rows.parts:
        batches = [Collator(packing=packing)([part[index]]) for index in range(len(part))]
        assert part.trained == [len(batch["positions_T"]) for batch in batches]


# ── Rows without a trained token ─────────────────────────────────────────────────────────────────


def save_marked(
    folder: Path, trained_from: dict[str, int], *, count: int = 12, k: int = 6, draws: int = 6
) -> Path:
    """A store of documents of 70 tokens, trained from this token on, which is given by split."""
    documents = {}
    for split, start in trained_from.items():
        of_split = []
        for seed in range(count):
            words = [WORDS[(seed * 7 + position) % len(WORDS)] for position in range(70)]
            document = encode_text(tokenizer(), " ".join(words))
            trained_N = document.trained_N.copy()
            trained_N[:start] = False
            of_split.append(Document(document.tokens_N, trained_N))
        documents[split] = of_split
    source = Noise()
    given: dict[str, Any] = {"template": None, "corpus": {}, "k": k, "draws": draws, "seed": 0}
    plan = stores.plan(source, documents, tokenizer=tokenizer_fingerprint(tokenizer()), **given)
    stores.write(folder, plan, source, documents)
    return folder


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("packing", [True, False])
def test_every_row_has_a_trained_token_and_no_trained_token_is_left_out(tmp_path, packing, split):
    opened = TargetStore(save_marked(tmp_path / "chat", {"train": 45, "heldout": 50}))
    rows = Rows(opened, split, longest=32, packing=packing, seed=0)
    trained = [sum(len(targets) for _, targets in rows[index]) for index in range(len(rows))]
    assert all(trained)
    assert trained == rows.trained
    whole = Rows(opened, split, longest=128, packing=packing, seed=0)
    assert sum(trained) == sum(whole.trained) == sum(opened.trained(split))
    assert len(rows) < len(cut_documents(opened.lengths(split), 32))


@pytest.mark.parametrize("packing", [True, False])
def test_if_all_rows_have_trained_tokens_none_is_left_out_or_moved(folder, packing):
    for split in ("train", "heldout"):
        opened = TargetStore(folder / "stories")
        rows = Rows(opened, split, longest=32, packing=packing, seed=5)
        parts = cut_documents(opened.lengths(split), 32)
        assert rows.rows == (pack(parts, 32, 5) if packing else one_per_row(parts, 5))


@pytest.mark.parametrize("mixes", [True, False])
def test_with_long_prompts_no_step_and_no_metric_is_without_trained_tokens(
    run, folder, tmp_path, mixes
):
    """A batch that is one window of a prompt has none."""
    save_marked(tmp_path / "chat", {"train": 60, "heldout": 60})
    chat = StoreConfig(path=str(tmp_path / "chat"), weight=0.3)
    targets = (*mixed(folder, stories=0.7), chat) if mixes else (chat,)
    config = replace(run, targets=targets, packing=False, evaluate_tokens=40, batch_size=1)
    metrics = json.loads((train(config) / checkpoint.RUN).read_text())["metrics"]
    assert all(value > 0 for name, value in metrics.items() if "nll" in name)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("mixes", [True, False])
def test_a_split_without_trained_tokens_is_refused_by_its_folder(
    run, folder, monkeypatch, split, mixes
):
    """Some sources write such splits; here those of `answers` are replaced by zeros."""
    trained = TargetStore.trained

    def without(self: TargetStore, requested: str) -> list[int]:
        counts = trained(self, requested)
        return [0] * len(counts) if (self.folder.name, requested) == ("answers", split) else counts

    monkeypatch.setattr(TargetStore, "trained", without)
    targets = run.targets if mixes else str(folder / "answers")
    with pytest.raises(ValueError, match=f"answers has no {split} token to train on"):
        read(replace(run, targets=targets))


# ── Targets of different widths ──────────────────────────────────────────────────────────────────


def targets(rows: int, *, k: int, draws: int, vocabulary: int, seed: int) -> Targets:
    """Targets of random distributions."""
    source = np.random.default_rng(seed)
    logprobs_TV = np.log(source.dirichlet(np.ones(vocabulary), rows))
    order_TV = np.argsort(-logprobs_TV, axis=1)
    top_TK = order_TV[:, :k]
    tail_T = np.log(np.take_along_axis(np.exp(logprobs_TV), order_TV[:, k:], 1).sum(1))
    return Targets(
        top_ids_TK=top_TK,
        top_logprobs_TK=np.take_along_axis(logprobs_TV, top_TK, 1).astype(np.float32),
        tail_ids_TM=order_TV[:, k : k + draws],
        tail_logprob_T=tail_T.astype(np.float32),
        token_logprob_T=logprobs_TV[:, 0].astype(np.float32),
        entropy_T=np.ones(rows, np.float32),
    )


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), SkewKL(), JSD()], ids=repr)
def test_targets_of_different_widths_have_the_same_losses_together_as_alone(divergence):
    """Three top entries and four draws together with six and six; labels are the token 0."""
    given_k = ((3, 4, 0), (6, 6, 1))
    parts = [targets(8, k=k, draws=m, vocabulary=20, seed=seed) for k, m, seed in given_k]
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(16, 20, generator=generator, dtype=torch.float64)

    def losses(logits_RV: torch.Tensor, each: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        target = TargetRows.of(np.zeros(len(each), np.int64), each)
        from dftserve.train.divergences import LogitRows

        expected_R = divergence.reference(logits_RV, target)
        loss_R, gradient_RV = divergence.loss_and_gradient(LogitRows.of(logits_RV), target)
        torch.testing.assert_close(loss_R, expected_R)
        return loss_R, gradient_RV

    alone = [losses(logits_RV[8 * i : 8 * i + 8], part) for i, part in enumerate(parts)]
    together = losses(logits_RV, merge_targets(parts))
    for joint, each in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(joint, torch.cat(each))


def test_targets_of_one_width_are_joined_unchanged():
    parts = [targets(4, k=3, draws=2, vocabulary=9, seed=seed) for seed in (0, 1)]
    for name, value in asdict(merge_targets(parts)).items():
        assert np.array_equal(value, asdict(Targets.concatenate(parts))[name])


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────


def weights(final: Path) -> dict[str, torch.Tensor]:
    return load_file(final / "model.safetensors")


def assert_same(ours: Path, theirs: Path) -> None:
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_list_of_one_store_trains_exactly_as_its_path(run, folder, tmp_path):
    path = replace(run, targets=str(folder / "stories"), output=str(tmp_path / "path"))
    one = replace(run, targets=mixed(folder, stories=0.2), output=str(tmp_path / "one"))
    assert_same(train(path), train(one))
    metrics = [
        json.loads((tmp_path / name / "final" / checkpoint.RUN).read_text())["metrics"]
        for name in ("path", "one")
    ]
    assert metrics[0] == metrics[1]
    shutil.rmtree(tmp_path / "path" / "final")
    with RunFolder(replace(one, output=path.output)):
        pass  # The list can resume the run of the path.


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **given):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train_until(config: TrainConfig, step: int) -> None:
    prepared = prepare(config)
    with RunFolder(config) as opened:
        opened.begin()
    trainer = make_trainer(config, prepared.loaded.model, prepared.material, (Stop(step),))
    trainer.args.eval_on_start = True
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_run_resumed_in_its_second_epoch_gives_exactly_the_same_weights(run, tmp_path):
    steps = -(-len(read(run).train) // (8 * 2)) + 3
    config = replace(run, batch_size=8, accumulation=2, steps=steps, workers=0)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    halves = replace(config, output=str(tmp_path / "halves"), save_every=steps - 1)
    train_until(halves, steps - 1)
    assert_same(train(halves), whole)


def test_a_mixed_run_reports_its_stores_and_the_metrics_of_each(run, folder, capsys):
    final = train(run)
    record = json.loads((final / checkpoint.RUN).read_text())
    metrics = record["metrics"]
    each = [metrics[f"human_nll/{name}"] for name in ("stories", "answers")]
    assert metrics["human_nll"] == pytest.approx(0.7 * each[0] + 0.3 * each[1], rel=1e-9)
    assert metrics["untouched_human_nll/stories"] > 0
    assert (
        record["data"]["targets"].keys()
        == record["data"]["corpus"].keys()
        == {"stories", "answers"}
    )
    assert [store["weight"] for store in record["settings"]["targets"]] == [0.7, 0.3]
    card = (final / checkpoint.CARD).read_text()
    assert '"weight": 0.7' in card
    assert "human nll/answers" in card
    printed = capsys.readouterr().err
    assert re.search(r"^stories: 40 documents in \d+ rows.* Weight 0\.7\.$", printed, re.MULTILINE)
    assert re.search(r"^  answers: \d\.\d+; \d\.\d+ before training\.$", printed, re.MULTILINE)


def test_each_stores_metric_equals_that_of_the_store_alone(run, folder):
    prepared = prepare(run)
    both = make_trainer(run, prepared.loaded.model, prepared.material).evaluate()
    for name in ("stories", "answers"):
        config = replace(run, targets=str(folder / name))
        alone = make_trainer(config, prepared.loaded.model, read(config)).evaluate()
        metric = both[f"eval_human_nll/{name}"]
        assert metric == pytest.approx(alone["eval_human_nll"], rel=1e-6)


def test_auto_compares_by_the_weighted_metric(run):
    prepared = prepare(run)
    trainer = make_trainer(run, prepared.loaded.model, prepared.material)
    metric = trainer.evaluate()["eval_human_nll"]
    nats, tokens = (sum(column) for column in zip(*trainer.batch_nll, strict=True))
    assert nats / tokens == pytest.approx(metric, rel=1e-9)
    assert sum(trainer.batches_of_stores) == len(trainer.batch_nll)
    assert len(trainer.batches_of_stores) == 2


def test_the_profile_weights_all_stores_and_is_not_limited_by_the_smallest(run, folder, tmp_path):
    """With 2 and with 40 held-out documents, compared with each store alone."""
    save_store(tmp_path / "few", count=40, heldout=2, seed=11)
    save_store(tmp_path / "many", count=40, heldout=40, seed=13, longest=12)
    config = replace(run, targets=mixed(tmp_path, few=0.9, many=0.1))
    prepared = prepare(config)
    language_model = prepared.loaded.language_model
    combined = measure_profile(language_model, config, prepared.material)
    alone = [
        measure_profile(language_model, each, read(each))
        for each in (replace(run, targets=str(tmp_path / name)) for name in ("few", "many"))
    ]
    assert len(combined.target_T) == sum(len(each.target_T) for each in alone)
    for mean in ("target_mean", "model_mean"):
        few, many = (getattr(each, mean) for each in alone)
        assert getattr(combined, mean) == pytest.approx(0.9 * few + 0.1 * many, rel=1e-6)
    for level, entropy in combined.by_level.items():
        expected = 0.9 * alone[0].by_level[level] + 0.1 * alone[1].by_level[level]
        assert entropy == pytest.approx(expected, rel=1e-6)
    below = [
        sum(
            weight * float((each.target_T <= value).mean())
            for weight, each in zip((0.9, 0.1), alone, strict=True)
        )
        for value in combined.target_deciles
    ]
    assert below == pytest.approx(np.arange(1, 10) / 10, abs=0.06)


def test_a_difference_between_stores_does_not_hide_one_between_candidates():
    theirs_B2 = np.ones((8, 2))
    ours_B2 = theirs_B2.copy()
    ours_B2[:4, 0] += [1.0, 1.01, 0.99, 1.0]
    ours_B2[4:, 0] -= [0.6, 0.61, 0.59, 0.6]
    assert not differs(ours_B2, theirs_B2, ())
    assert differs(ours_B2, theirs_B2, (4, 4))
    assert not differs(ours_B2, theirs_B2, (1, 7)), "batches differ more than candidates"


def test_a_store_of_one_batch_does_not_hide_a_difference_between_candidates():
    """Weights .97 and .03: 39 batches of one store and one of the other."""
    source = np.random.default_rng(0)
    theirs_B2 = np.ones((40, 2)) * [4000, 1000]
    theirs_B2[39] = [4000 * 1.2, 1200]
    ours_B2 = theirs_B2.copy()
    ours_B2[:, 0] -= theirs_B2[:, 1] * source.uniform(0.9, 1.0, 40)
    assert differs(ours_B2, theirs_B2, (39, 1))
    assert differs(ours_B2, theirs_B2, (1, 39))
    assert not differs(ours_B2[:1], theirs_B2[:1], (1,)), "one batch cannot show a difference"


@pytest.mark.parametrize("counts", [(1, 39), (39, 1), (1, 1, 38), (1, 1), (20, 20)])
def test_equal_candidates_are_seldom_found_different(counts):
    """Stores of equal weight; a store of one batch has no variance estimate of its own."""
    source = np.random.default_rng(1)
    number, weight = sum(counts), 1 / len(counts)
    tokens_B = np.repeat([weight / count for count in counts], counts)
    differing = 0
    for _ in range(400):
        theirs_B2 = np.stack([np.zeros(number), tokens_B], axis=1)
        spread_B = source.normal(size=number)
        ours_B2 = np.stack([tokens_B * spread_B, tokens_B], axis=1)
        differing += differs(ours_B2, theirs_B2, counts)
    # With many batches 5 % are expected; with two, as for a store of two batches, 30 %.
    assert differing <= (0.35 if min(counts) == 1 else 0.08) * 400


def test_the_plan_shows_the_share_of_each_store(run):
    plan = plan_of(replace(run, steps=60))
    assert [store.name for store in plan.stores] == ["stories", "answers"]
    first, second = (store.trained_tokens for store in plan.stores)
    assert first / (first + second) == pytest.approx(0.7, abs=32 / plan.trained_tokens_per_epoch)
    assert sum(store.tokens for store in plan.stores) == pytest.approx(plan.tokens, abs=1)
    for store in plan.stores:
        assert store.readings > 0
        assert store.as_text() in plan.as_text()
    assert json.loads(plan.as_json())["stores"][1]["name"] == "answers"


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("[]", "targets: got an empty list; accepted: a path, or a list of"),
        ("3", r"targets: got 3; accepted: a path, or a list of \{path, weight\}\."),
        ("{path: a, weight: 1}", r"targets: got \{.*\}; accepted: a path, or a list of \{path, w"),
        ("[a, b]", r"targets\[0\]: got 'a'; accepted: keys and values \(path, weight\)"),
        ("[{path: a}]", r"targets\[0\]\.weight: got nothing; accepted: a number"),
        ("[{weight: 1}]", r"targets\[0\]\.path: got nothing; accepted: a text"),
        (
            "[{path: a, weight: 0}]",
            r"targets\[0\]\.weight: got 0; accepted: a number from 1e-09",
        ),
        ("[{path: a, weight: -1}]", r"weight: got -1; accepted: a number from 1e-09 to 1e\+09\."),
        ("[{path: a, weight: 1.0e-10}]", "weight: got 1e-10; accepted: a number from 1e-09"),
        ("[{path: a, weight: 1.0e+308}]", r"weight: got 1e\+308; accepted: a number from 1e-09"),
        ("[{path: a, weight: .nan}]", r"targets\[0\]\.weight: got nan; accepted: a finite number"),
        ("[{path: a, weight: .inf}]", r"targets\[0\]\.weight: got inf; accepted: a finite number"),
        ("[{path: a, weight: much}]", r"targets\[0\]\.weight: got 'much'; accepted: a number"),
        ("[{path: a, wieght: 1}]", "the key 'wieght'; .*did you mean 'weight'"),
        ("[{path: a, weight: 1}, {path: ./a/, weight: 2}]", r"got \./a/ twice; .* once"),
    ],
)
def test_invalid_targets_are_refused_by_name(targets, message):
    with pytest.raises(ValueError, match=message):
        configs.load(None, {"model": "m", "output": "o", "targets": targets})


def test_targets_are_read_from_a_setting_as_from_yaml(tmp_path):
    text = "[{path: a, weight: 0.7}, {path: b, weight: 3}]"
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\noutput: o\ntargets:\n  - {path: a, weight: 0.7}\n  - path: b\n    weight: 3\n"
    )
    given = configs.load(None, {"model": "m", "output": "o", "targets": text})
    assert given == configs.load(path, {})
    assert given.stores == (StoreConfig(path="a", weight=0.7), StoreConfig(path="b", weight=3))


def change_plan(folder: Path, **plan: object) -> None:
    """Change the plan in a store's manifest."""
    content = json.loads((folder / MANIFEST).read_text())
    content["plan"] |= plan
    (folder / MANIFEST).write_text(json.dumps(content))


def other_tokenizer(folder: Path) -> str:
    change_plan(folder / "answers", tokenizer="0" * 64)
    return f"{folder / 'answers'} was built with another tokenizer"


def other_template(folder: Path) -> str:
    change_plan(folder / "answers", template="0" * 64)
    return f"{folder / 'answers'} was built with another chat template"


def missing(folder: Path) -> str:
    shutil.rmtree(folder / "answers")
    return f"{folder / 'answers'} does not exist"


def no_heldout(folder: Path) -> str:
    shutil.rmtree(folder / "answers")
    save_store(folder / "answers", heldout=0)
    return f"{folder / 'answers'} has no held-out text and {folder / 'stories'} has some"


@pytest.mark.parametrize("damage", [other_tokenizer, other_template, missing, no_heldout])
def test_an_incompatible_store_is_refused_by_its_folder(run, folder, tmp_path, damage):
    for name in ("stories", "answers"):
        shutil.copytree(folder / name, tmp_path / name)
    message = damage(tmp_path)
    config = replace(run, targets=mixed(tmp_path, stories=0.7, answers=0.3))
    with pytest.raises(ValueError, match=re.escape(message)):
        train(config)
    assert not Path(config.output).exists()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "a[0]", "a[1]", "a[0][0]", "a[0][2]", "b"]), max_size=6))
def test_the_stores_of_a_run_have_different_names(names):
    unique = store_names([f"/{number}/{name}" for number, name in enumerate(names)])
    assert len(set(unique)) == len(names)
    for name, own in zip(names, unique, strict=True):
        assert own.startswith(name)


def test_a_divergence_that_needs_draws_is_refused_if_a_store_has_none(run, folder, tmp_path):
    none = save_marked(tmp_path / "none", {"train": 1, "heldout": 1}, draws=0)
    targets = (*mixed(folder, stories=0.7), StoreConfig(path=str(none), weight=0.3))
    for value in (targets, str(none)):
        config = replace(run, targets=value)
        with pytest.raises(ValueError, match=rf"{re.escape(str(none))} keeps 0 .*store\.draws"):
            read(config)
        read(replace(config, divergence=DivergenceConfig(name="reverse_kl")))
    whole = save_marked(tmp_path / "whole", {"train": 1, "heldout": 1}, draws=0, k=VOCABULARY)
    read(replace(run, targets=str(whole)))  # Top entries for all tokens: no draws needed.


@pytest.mark.parametrize("order", [1, -1])
def test_stores_of_one_corpus_must_hold_out_the_same_texts(run, tmp_path, order):
    """Those that hold out the same, or nothing of one another, are accepted."""
    texts = save_texts(tmp_path / "texts", 60)
    model = run.model

    def built(name, recipe, *more):
        arguments = [texts, "--model", model, "--recipe", recipe, "--out", tmp_path / name, *more]
        result = CliRunner().invoke(main, ["target", "build", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return StoreConfig(path=str(tmp_path / name), weight=1)

    small = built("small", "creative", "--heldout", 0.1)
    large = built("large", "creative", "--heldout", 0.3)
    other = built("other", "technical", "--heldout", 0.1)
    with pytest.raises(ValueError, match=r"small trains on .* that .*large holds out; accepted"):
        read(replace(run, targets=(small, large)[::order]))
    for accepted in [(small, other), (small, *run.stores)]:
        assert read(replace(run, targets=accepted[::order])).stores


@pytest.mark.parametrize("shared", [0, 2, 3])
def test_a_few_equal_texts_do_not_refuse_stores(capsys, shared):
    """Two of 200 may be equal by chance; three are more than 1 %."""
    parts = {
        "first": {"train": range(shared), "heldout": range(500, 600)},
        "second": {"train": range(300, 400), "heldout": range(200)},
    }
    stores: list[Any] = [
        SimpleNamespace(
            folder=Path(name),
            token_digests=lambda split, part=part: (
                bytes([i % 256, i // 256]) for i in part[split]
            ),
        )
        for name, part in parts.items()
    ]
    if shared > 2:
        with pytest.raises(ValueError, match="first trains on 3 of the documents that second"):
            _check_splits(stores)
    else:
        _check_splits(stores)
    assert ("metrics on held-out text include them" in capsys.readouterr().err) == (shared == 2)


@pytest.mark.parametrize("packing", [True, False])
def test_patience_is_refused_if_the_run_ends_before_the_first_evaluation(run, packing):
    given: dict[str, Any] = {"steps": None, "epochs": 1.5, "patience": 2, "packing": packing}
    config = replace(run, **given)
    steps = steps_of(config, read(config))
    with pytest.raises(ValueError, match=f"patience: a run of {steps} steps that evaluates"):
        prepare(replace(config, evaluate_every=steps))
    prepare(replace(config, evaluate_every=steps - 1))


def begin(config: TrainConfig) -> None:
    with RunFolder(config) as opened:
        opened.begin()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"stories": 0.6, "answers": 0.4}, r"whose targets\[0\]\.weight is 0\.7, not 0\.6"),
        ({"stories": 1.0}, "whose number of targets is 2, not 1"),
        ({"answers": 0.7, "stories": 0.3}, r"began with another `targets\[0\]` .*manifest differ"),
    ],
)
def test_a_run_does_not_resume_with_other_stores_or_weights(run, folder, other, message):
    begin(run)
    with (
        pytest.raises(ValueError, match=message),
        RunFolder(replace(run, targets=mixed(folder, **other))),
    ):
        pass


def test_a_mixed_run_resumes_after_its_stores_were_moved(run, folder, tmp_path):
    """It keeps the stores' first names, which its earlier metrics have."""
    whole = train(replace(run, output=str(tmp_path / "whole")))
    train_until(run, 4)
    shutil.copytree(folder / "stories", tmp_path / "answers")
    shutil.copytree(folder / "answers", tmp_path / "moved")
    final = train(replace(run, targets=mixed(tmp_path, answers=0.7, moved=0.3)))
    assert_same(final, whole)
    metrics, data = (
        [json.loads((each / checkpoint.RUN).read_text())[what] for each in (final, whole)]
        for what in ("metrics", "data")
    )
    assert metrics[0] == metrics[1]
    assert data[0] == data[1]
