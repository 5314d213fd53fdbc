"""The target store: what it contains, continuing a stopped build, and detecting damage."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.targets import store
from dftserve.targets.document import Document
from dftserve.targets.source import Source
from dftserve.targets.sparse import Targets, sparsify
from dftserve.targets.store import StoreError, TargetStore

LARGEST = (1 << 24) - 2


class RandomSource(Source):
    """Random targets that depend only on the seed of each document."""

    def __init__(self, vocabulary: int = 50_000, name: str = "random") -> None:
        self.vocabulary = vocabulary
        self.name = name
        self.calls = 0

    def describe(self):
        return {"kind": self.name}

    def targets(self, documents, *, k, draws, seeds):
        self.calls += len(documents)
        return [self._of(*each, k, draws) for each in zip(documents, seeds, strict=True)]

    def _of(self, document: Document, seed: int, k: int, draws: int) -> Targets:
        random = np.random.default_rng(seed)
        count = len(document.positions_T)
        shares_TK = random.dirichlet(np.ones(k + 2), size=count)
        return Targets(
            top_ids_TK=random.integers(0, self.vocabulary, (count, k)),
            top_logprobs_TK=np.log(-np.sort(-shares_TK[:, :k])).astype(np.float32),
            tail_ids_TM=random.integers(0, self.vocabulary, (count, draws)),
            tail_logprob_T=np.log(shares_TK[:, k]).astype(np.float32),
            token_logprob_T=np.log(shares_TK[:, k + 1]).astype(np.float32),
            entropy_T=random.uniform(0, 11, count).astype(np.float32),
        )


def documents_of(lengths: Sequence[int], *, highest: int = 40_000, seed: int = 0):
    random = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        trained_N = random.random(length) < 0.8
        trained_N[0], trained_N[-1] = False, True
        documents.append(Document(random.integers(0, highest, length).astype(np.int32), trained_N))
    return documents


def plan_of(source, documents, *, seed=7, k=6, draws=6, tokenizer="t", template=None, corpus=None):
    return store.plan(
        source,
        documents,
        tokenizer=tokenizer,
        template=template,
        corpus=corpus or {},
        k=k,
        draws=draws,
        seed=seed,
    )


def build_store(folder: Path, documents, source=None, *, world=1, **more) -> TargetStore:
    source = source or RandomSource()
    plan = plan_of(source, documents, **more)
    store.begin(folder, plan)
    for rank in range(world):
        for _ in store.build(folder, plan, source, documents, rank=rank, world=world):
            pass
    store.finish(folder, plan, documents, {"made": "here"})
    return TargetStore(folder)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_TOKENS", 100)


SPLIT = {"train": documents_of([30] * 20), "heldout": documents_of([40] * 4, seed=1)}


# Contents


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    k=st.integers(1, 8),
    draws=st.integers(0, 8),
    highest=st.sampled_from([3, 70_000, LARGEST]),
    seed=st.integers(0, 2**31),
)
def test_documents_and_targets_are_read_as_they_were_written(
    tmp_path_factory, lengths, k, draws, highest, seed
):
    folder = tmp_path_factory.mktemp("store")
    documents = {"train": documents_of(lengths, highest=highest, seed=seed)}
    source = RandomSource(vocabulary=max(highest, 10))
    opened = build_store(folder, documents, source, k=k, draws=draws, seed=seed)
    assert opened.lengths("train") == lengths
    assert (opened.count("train"), opened.count("heldout")) == (len(lengths), 0)
    for number, document in enumerate(documents["train"]):
        read, targets = opened["train", number]
        np.testing.assert_array_equal(read.tokens_N, document.tokens_N)
        np.testing.assert_array_equal(read.trained_N, document.trained_N)
        own_seed = store._seed(opened.manifest.plan, "train", number)
        expected = source.targets(
            [document], k=min(k, source.vocabulary), draws=draws, seeds=[own_seed]
        )
        assert_equal_in_fp16(targets, expected[0])


def assert_equal_in_fp16(stored: Targets, expected: Targets) -> None:
    np.testing.assert_array_equal(stored.top_ids_TK, expected.top_ids_TK)
    np.testing.assert_array_equal(stored.tail_ids_TM, expected.tail_ids_TM)
    for name in ("top_logprobs_TK", "tail_logprob_T", "token_logprob_T", "entropy_T"):
        # Half a unit in the last of 11 bits; 2^-25 where fp16 is subnormal.
        np.testing.assert_allclose(
            getattr(stored, name), getattr(expected, name), rtol=2**-11, atol=2**-25, err_msg=name
        )


def test_probability_zero_is_stored(tmp_path):
    class Certain(RandomSource):
        def _of(self, document, seed, k, draws):
            targets = super()._of(document, seed, k, draws)
            targets.top_logprobs_TK[:, 1:] = -np.inf
            targets.tail_logprob_T[:] = -np.inf
            return targets

    _, targets = build_store(tmp_path / "s", SPLIT, Certain())["train", 0]
    assert (targets.top_logprobs_TK[:, 1:] == -np.inf).all()
    assert (targets.tail_logprob_T == -np.inf).all()


def test_a_store_has_at_most_64_bytes_per_token(tmp_path):
    documents = {"train": documents_of([1000] * 20)}
    opened = build_store(tmp_path / "s", documents)
    size = sum(path.stat().st_size for path in (tmp_path / "s").iterdir())
    assert size / opened.manifest.tokens("train") <= 64


def test_ids_up_to_the_largest_are_stored(tmp_path):
    tokens_N = np.array([0, 65_535, 65_536, LARGEST - 1], dtype=np.int32)
    document = Document(tokens_N, np.array([False, True, True, True]))
    opened = build_store(tmp_path / "s", {"train": [document]}, RandomSource(LARGEST))
    np.testing.assert_array_equal(opened["train", 0][0].tokens_N, tokens_N)


# Building


def test_only_a_missing_shard_is_built_again_with_equal_bytes(tmp_path, small_shards):
    whole = build_store(tmp_path / "whole", SPLIT).folder
    expected = bytes_of(whole)
    assert len(expected) > 6
    for lost in (name for name in expected if name.endswith(".safetensors")):
        folder = tmp_path / lost
        plan = plan_of(RandomSource(), SPLIT)
        store.begin(folder, plan)
        for name in expected:
            if name.endswith(".safetensors") and name != lost:
                shutil.copy(whole / name, folder / name)
        source = RandomSource()
        build_store(folder, SPLIT, source)
        assert bytes_of(folder) == expected
        assert source.calls <= 4  # Only the documents of the lost shard.


def test_a_build_continues_after_any_stop(tmp_path, small_shards):
    expected = bytes_of(build_store(tmp_path / "whole", SPLIT).folder)
    source = RandomSource()
    plan = plan_of(source, SPLIT)
    for batches in range(9):
        folder = tmp_path / str(batches)
        store.begin(folder, plan)
        steps = store.build(folder, plan, source, SPLIT)
        for _ in range(batches):
            next(steps, None)
        steps.close()
        with pytest.raises(StoreError, match="unfinished; run its build again"):
            TargetStore(folder)
        assert bytes_of(build_store(folder, SPLIT).folder) == expected


@pytest.mark.parametrize("world", [2, 3, 50])
def test_several_processes_write_the_same_bytes_as_one(tmp_path, small_shards, world):
    one = build_store(tmp_path / "one", SPLIT).folder
    many = build_store(tmp_path / "many", SPLIT, world=world).folder
    assert bytes_of(one) == bytes_of(many)


def test_a_shard_that_no_process_has_written_is_named(tmp_path, small_shards):
    source = RandomSource()
    plan = plan_of(source, SPLIT)
    store.begin(tmp_path / "s", plan)
    for _ in store.build(tmp_path / "s", plan, source, SPLIT, rank=0, world=2):
        pass
    with pytest.raises(StoreError, match=r"train-00001\.safetensors is missing; run the build"):
        store.finish(tmp_path / "s", plan, SPLIT, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 8}, "seed is 7 there and 8 here"),
        ({"k": 5}, "k is 6 there and 5 here"),
        ({"draws": 0}, "draws is 6 there and 0 here"),
        ({"tokenizer": "u"}, 'tokenizer is "t" there and "u" here'),
        ({"template": "v"}, 'template is null there and "v" here'),
        ({"corpus": {"read": 3}}, "corpus is {} there"),
        ({"source": RandomSource(name="other")}, 'source.kind is "random" there and "other" here'),
        # A source may have a digest of the corpus; the setting that changed it says more.
        ({"source": RandomSource(name="other"), "corpus": {"heldout": 0.2}}, "corpus is {} there"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused_with_the_difference(tmp_path, change, reason, finished):
    source = RandomSource()
    if finished:
        build_store(tmp_path / "s", SPLIT, source)
    else:
        store.begin(tmp_path / "s", plan_of(source, SPLIT))
    before = bytes_of(tmp_path / "s")
    change = dict(change)
    other = plan_of(change.pop("source", source), SPLIT, **change)
    with pytest.raises(StoreError, match="holds a store of another plan") as caught:
        store.begin(tmp_path / "s", other)
    assert reason in str(caught.value)
    assert bytes_of(tmp_path / "s") == before


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        ({"a": [{"order": 6, "corpus": "long " * 30}]}, "source.a[0].order is 5 there and 6 here"),
        ({"a": [{"corpus": 1}]}, 'source.a[0] is {"order": 5, "corpus": '),
        ({"a": []}, 'source.a is [{"order": 5, "corpus": '),
    ],
)
def test_the_difference_of_two_plans_is_the_innermost_one(here, reason):
    there = {"a": [{"order": 5, "corpus": "long " * 30}]}
    assert store.difference({"source": there}, {"source": there}) is None
    assert store.difference({"source": there}, {"source": here}).startswith(reason)


def test_other_documents_are_another_plan(tmp_path):
    build_store(tmp_path / "s", SPLIT)
    changed = {"train": SPLIT["train"][1:], "heldout": SPLIT["heldout"]}
    with pytest.raises(StoreError, match="corpus_blake3 is"):
        store.begin(tmp_path / "s", plan_of(RandomSource(), changed))


def test_a_folder_of_something_else_is_not_changed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="neither empty nor a target store"):
        store.begin(tmp_path, plan_of(RandomSource(), SPLIT))
    assert bytes_of(tmp_path) == {"notes.txt": b"mine"}


def test_tokens_beyond_the_vocabulary_are_refused():
    with pytest.raises(StoreError, match="do not belong together"):
        plan_of(RandomSource(vocabulary=100), SPLIT)


def test_a_store_without_training_documents_is_refused():
    with pytest.raises(StoreError, match="no document to train on"):
        plan_of(RandomSource(), {"train": [], "heldout": SPLIT["heldout"]})


# Reading


def test_verify_names_the_file_of_a_flipped_bit(tmp_path, small_shards):
    """100 flips of one bit each, seeded."""
    opened = build_store(tmp_path / "s", SPLIT)
    opened.verify()
    random = np.random.default_rng(0)
    shards = [opened.folder / shard.file for shard in opened.manifest.shards]
    for _ in range(100):
        path = shards[random.integers(len(shards))]
        content = bytearray(path.read_bytes())
        index, bit = int(random.integers(len(content))), int(random.integers(8))
        content[index] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(StoreError, match=f"{path.name} is not the file that the build wrote"):
            opened.verify()
        content[index] ^= 1 << bit
        path.write_bytes(content)
    opened.verify()


def test_verify_names_a_missing_file(tmp_path):
    opened = build_store(tmp_path / "s", SPLIT)
    (opened.folder / "heldout-00000.safetensors").unlink()
    with pytest.raises(StoreError, match=r"heldout-00000\.safetensors is missing"):
        opened.verify()


def test_a_folder_without_a_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"has no manifest\.json"):
        TargetStore(tmp_path)
    with pytest.raises(StoreError, match="does not exist"):
        TargetStore(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"plan": {}}', "[" * 100_000])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    build_store(tmp_path / "s", SPLIT)
    (tmp_path / "s" / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match="build the store again"):
        TargetStore(tmp_path / "s")


def test_another_format_is_refused(tmp_path):
    build_store(tmp_path / "s", SPLIT)
    path = tmp_path / "s" / "manifest.json"
    content = json.loads(path.read_text())
    content["plan"]["format"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="got the format 99; accepted: 1"):
        TargetStore(tmp_path / "s")


def test_a_store_fits_only_its_tokenizer_template_and_vocabulary(tmp_path):
    opened = build_store(tmp_path / "s", SPLIT, tokenizer="t", template="v")
    opened.belongs_to(tokenizer="t", template="v", vocabulary=50_000)
    opened.belongs_to(tokenizer="t", template="v", vocabulary=60_000)
    with pytest.raises(StoreError, match="another tokenizer"):
        opened.belongs_to(tokenizer="u", template="v", vocabulary=50_000)
    with pytest.raises(StoreError, match="another chat template"):
        opened.belongs_to(tokenizer="t", template="w", vocabulary=50_000)
    with pytest.raises(StoreError, match="another chat template"):
        opened.belongs_to(tokenizer="t", template=None, vocabulary=50_000)
    with pytest.raises(StoreError, match="token ids up to 49999; the model has 49999"):
        opened.belongs_to(tokenizer="t", template="v", vocabulary=49_999)


def test_plain_text_fits_any_template(tmp_path):
    opened = build_store(tmp_path / "s", SPLIT, template=None)
    opened.belongs_to(tokenizer="t", template="v", vocabulary=50_000)


def test_a_store_can_be_pickled(tmp_path):
    import pickle

    opened = build_store(tmp_path / "s", SPLIT)
    tokens_N = opened["train", 3][0].tokens_N
    unpickled = pickle.loads(pickle.dumps(opened))  # noqa: S301
    np.testing.assert_array_equal(unpickled["train", 3][0].tokens_N, tokens_N)


# Unbiasedness


@pytest.mark.parametrize("seed", range(20))
def test_expectations_over_the_draws_equal_the_dense_ones(seed):
    """E over draws of Σ target·f = Σ q·f, by a z-test on 4,000 independent sparsifications.

    |z| > 5.2 has probability 2e-7: 4e-6 for a false alarm in any of the 20 fixed seeds.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary, k, draws, repeats = 200, 6, 6, 4000
    logprobs_V = (2 * torch.randn(vocabulary, generator=generator)).log_softmax(0)
    logprobs_V[torch.randperm(vocabulary, generator=generator)[:20]] = -torch.inf
    logprobs_V = logprobs_V.log_softmax(0)
    f_V = torch.randn(vocabulary, generator=generator).double().numpy()
    exact = float((logprobs_V.exp().double().numpy() * f_V).sum())
    targets = sparsify(
        logprobs_V.expand(repeats, -1).contiguous(),
        torch.zeros(repeats, dtype=torch.int64),
        k=k,
        draws=draws,
        generator=generator,
    )
    top_T = (np.exp(targets.top_logprobs_TK.astype(float)) * f_V[targets.top_ids_TK]).sum(1)
    tail_T = np.exp(targets.tail_logprob_T.astype(float)) * f_V[targets.tail_ids_TM].mean(1)
    estimate_T = top_T + tail_T
    z = (estimate_T.mean() - exact) / (estimate_T.std(ddof=1) / math.sqrt(repeats))
    assert abs(z) < 5.2


def test_no_draw_is_a_top_token_or_impossible():
    generator = torch.Generator().manual_seed(0)
    logprobs_TV = torch.randn(50, 30, generator=generator)
    logprobs_TV[:, 20:] = -torch.inf
    logprobs_TV = logprobs_TV.log_softmax(1)
    labels_T = torch.zeros(50, dtype=torch.int64)
    targets = sparsify(logprobs_TV, labels_T, k=6, draws=40, generator=generator)
    for top_K, tail_M in zip(targets.top_ids_TK, targets.tail_ids_TM, strict=True):
        assert not set(top_K) & set(tail_M)
        assert max(tail_M) < 20


def test_rows_that_do_not_sum_to_one_are_refused():
    generator = torch.Generator().manual_seed(0)
    for row in (torch.zeros(1, 5), torch.full((1, 5), torch.nan), torch.full((1, 5), -torch.inf)):
        with pytest.raises(ValueError, match="accepted: rows that sum to 1"):
            sparsify(row, torch.zeros(1, dtype=torch.int64), k=2, draws=2, generator=generator)


@given(st.lists(st.integers(2, 2 * store.TOKENS_AT_ONCE), max_size=30))
def test_batches_have_a_bounded_number_of_tokens_and_each_document_once(lengths):
    """Padding counts. A document beyond the bound has its own batch."""
    documents = [Document(np.zeros(n, np.int32), np.zeros(n, bool)) for n in lengths]
    batches = list(store.batches_of(documents))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        width = max(lengths[index] for index in batch)
        assert len(batch) * width <= store.TOKENS_AT_ONCE or len(batch) == 1


def test_targets_do_not_depend_on_the_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "TOKENS_AT_ONCE", 50)
    source, documents = RandomSource(), {"train": documents_of([7, 40, 3, 12, 90, 25, 2, 12])}
    plan = plan_of(source, documents)
    store.write(tmp_path / "batches", plan, source, documents)
    monkeypatch.setattr(store, "TOKENS_AT_ONCE", 1)
    store.write(tmp_path / "alone", plan, source, documents)
    shards = [(tmp_path / name / "train-00000.safetensors") for name in ("batches", "alone")]
    assert shards[0].read_bytes() == shards[1].read_bytes()
