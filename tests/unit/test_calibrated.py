"""Calibrated targets on sources of known truth: what is left out, and where g is 0."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from dftserve.cli import main
from dftserve.spec import parse
from dftserve.targets.bins import Bins
from dftserve.targets.cache import Cache
from dftserve.targets.calibrated import (
    Calibrated,
    Fit,
    _select_documents,
    as_text,
    calibrate,
    verdict,
    with_text,
)
from dftserve.targets.document import Document
from dftserve.targets.gate import LEAST_DOCUMENTS, LEVEL, gate, interval
from dftserve.targets.in_context import InContext
from dftserve.targets.ngram import Ngram
from dftserve.targets.source import DenseSource
from dftserve.targets.store import TargetStore
from dftserve.targets.teacher import Teacher
from dftserve.train.config import TrainConfig
from dftserve.train.divergences import SFT, ForwardKL, LogitRows, TargetRows
from dftserve.train.entropy_profile import EntropyProfile
from dftserve.train.final_checkpoint import checkpoint_info
from dftserve.train.material import read
from tests.training import Noise, documents, save_model, save_store, save_texts, small_model

V = 12
SMALL = Bins(match=(1,), count=(), entropy=(2.0,), position=())


class Chain(DenseSource):
    """A Markov chain, which is the truth of the texts that it wrote."""

    vocabulary = V

    def __init__(self, seed, sharpness):
        random = np.random.default_rng(seed)
        self.next_VV = random.dirichlet(np.full(V, sharpness), size=V) * 0.99 + 0.01 / V
        self.reads = 0

    def describe(self):
        return {"kind": "chain", "next": self.next_VV.tolist()}

    def read(self, documents):
        self.reads += 1
        log_VV = torch.from_numpy(np.log(self.next_VV)).float()
        return [
            lambda start, stop, d=d: log_VV[d.tokens_N[d.positions_T[start:stop] - 1]]
            for d in documents
        ]

    def texts(self, count, tokens, seed):
        return [self.text(tokens, np.random.default_rng([seed, i])) for i in range(count)]

    def text(self, tokens, random):
        drawn = [int(random.integers(V))]
        while len(drawn) < tokens:
            drawn.append(int(random.choice(V, p=self.next_VV[drawn[-1]])))
        return document(drawn)


def document(tokens, group=""):
    trained_N = np.arange(len(tokens)) > 0
    return Document(np.array(tokens, np.int32), trained_N, group)


def make_calibrated(model, train, heldout, **others):
    ngram = Ngram(train, vocabulary=V, order=3, min_count=1)
    parts = {"teacher": model, "ngram 1": ngram.at_order(1), "ngram 3": ngram}
    parts |= {"cache": Cache(decay=0.9, vocabulary=V), **others}
    calibration = calibrate(parts, ngram, heldout, bins=SMALL, fit=Fit())
    return calibration, Calibrated(parts, ngram, calibration, bins=SMALL, heldout=heldout)


def rows_of(source, doc):
    return source.read([doc])[0](0, len(doc.positions_T))


TRUTH = Chain(1, 0.15)
TRAIN, HELDOUT = TRUTH.texts(20, 60, 1), TRUTH.texts(50, 60, 2)


@pytest.fixture(scope="module")
def true_model():
    """The model is already the truth."""
    return make_calibrated(TRUTH, TRAIN, HELDOUT)


@pytest.fixture(scope="module")
def better_source():
    """The model is another chain; another source is the truth."""
    return make_calibrated(Chain(2, 5.0), TRAIN, HELDOUT, other=TRUTH)


# Where g is 0, and where it is not


def test_when_the_model_is_the_truth_every_target_is_the_text(true_model):
    calibration, source = true_model
    assert calibration.share == 0
    assert all(each.share == 0 for each in calibration.bins)
    assert "The mixture is refused: it does not predict unseen text better than teacher" in verdict(
        calibration
    )
    probabilities_TV = rows_of(source, TRAIN[0]).exp().numpy()
    expected_TV = np.eye(V)[TRAIN[0].labels_T]
    np.testing.assert_array_equal(probabilities_TV, expected_TV)


def test_a_source_that_is_better_than_the_model_gets_a_share(better_source):
    calibration, source = better_source
    assert calibration.share > 0.05
    assert {each.over for each in calibration.gains} == {"teacher", "ngram 3"}
    assert all(each.nats.low > 0 for each in calibration.gains)
    assert "train with divergence.target_weight 1" in verdict(calibration)
    for name in ("mixture", "teacher", "ngram 1", "other", "95 % interval", "gain over"):
        assert name in as_text(calibration)
    own_T = rows_of(source, TRAIN[0]).exp().gather(1, torch.from_numpy(labels(TRAIN[0]))[:, None])
    assert float(own_T.min()) >= 1 - max(each.share for each in calibration.bins) - 1e-6
    assert float(own_T.mean()) < 1


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_training_on_a_refused_mixture_is_plain_fine_tuning(true_model, weight):
    targets = true_model[1].targets(TRAIN[:1], k=4, draws=4, seeds=[0])[0]
    rows = TargetRows.of(TRAIN[0].labels_T, targets)
    logits_TV = torch.randn(59, V, generator=torch.Generator().manual_seed(0)).double()
    for divergence in (ForwardKL(weight=weight), SFT()):
        loss_T, gradient_TV = divergence.loss_and_gradient(LogitRows.of(logits_TV.clone()), rows)
        expected_T = torch.nn.functional.cross_entropy(logits_TV, rows.labels_R, reduction="none")
        torch.testing.assert_close(loss_T, expected_T)
        expected_TV = logits_TV.softmax(1) - torch.nn.functional.one_hot(rows.labels_R, V)
        torch.testing.assert_close(gradient_TV, expected_TV)


def test_a_refused_mixture_does_not_enter_the_dft_json_of_a_checkpoint(true_model, better_source):
    """Its rows of held-out text are those of the mixture, and not what was trained on."""
    config = TrainConfig(model="m", targets="t", output="o")
    seen = EntropyProfile(np.full(9, 2.0), np.full(9, 1.0), {0.1: 1.5, 0.2: 2.0, 0.3: 2.5})
    refused, passed = true_model[1].describe(), better_source[1].describe()
    for source in (refused, {"kind": "mix", "sources": [refused, passed]}):
        info = checkpoint_info(config, seen, source)
        assert (info.diversity, info.target_entropy, info.target_deciles) == (
            None,
            None,
            None,
        )
        assert info.human_diversity is None
        assert (info.model_entropy, info.model_deciles) == (1.0, (1.0,) * 9)
    info = checkpoint_info(config, seen, passed)
    assert (info.diversity, info.target_entropy) == (parse(0.2), 2.0)
    assert info.target_deciles == (2.0,) * 9


def test_a_run_on_a_refused_mixture_reports_it_before_training(
    tmp_path, true_model, better_source, monkeypatch
):
    model = save_model(tmp_path / "model")
    for number, (_, source) in enumerate((true_model, better_source)):
        monkeypatch.setattr(Noise, "describe", lambda self, source=source: source.describe())
        targets = save_store(tmp_path / f"targets-{number}", count=4, heldout=2)
        config = TrainConfig(model=str(model), targets=str(targets), output="o")
        report = read(config).as_text()
        assert ("is refused" in report, "suggest no diversity" in report) == (
            source is true_model[1],
        ) * 2


def labels(doc):
    return doc.labels_T.astype(np.int64)


def test_the_mixture_is_as_good_as_its_best_component(better_source):
    """On held-out text, with the weights of the other folds, up to the cost of fitting them."""
    calibration, _ = better_source
    best = min(each.nll.mean for each in calibration.components if not each.ruled_out)
    free = sum(1 for each in calibration.bins if each.positions) * (len(calibration.components) - 1)
    assert calibration.mixture.mean < best + 2 * free / calibration.tokens


def test_tokens_that_a_component_rules_out_are_reported_and_not_averaged(better_source):
    """A cache gives probability only to tokens that have occurred in the document."""
    cache = {each.name: each for each in better_source[0].components}["cache"]
    logprobs = [Cache(decay=0.9, vocabulary=V).token_logprobs([doc])[0] for doc in HELDOUT]
    logprobs_T = np.concatenate(logprobs)
    possible_T = np.isfinite(logprobs_T)
    assert cache.ruled_out == pytest.approx(1 - possible_T.mean())
    assert cache.nll.mean == pytest.approx(-logprobs_T[possible_T].mean())
    assert f"{cache.ruled_out:.1%}" in as_text(better_source[0])


def test_rows_are_distributions(true_model, better_source):
    for _, source in (true_model, better_source):
        for doc in (TRAIN[0], HELDOUT[0], TRUTH.texts(1, 30, 9)[0]):
            rows_TV = rows_of(source, doc)
            assert not bool(rows_TV.isnan().any())
            assert float(rows_TV.logsumexp(dim=1).abs().max()) < 1e-5


def test_rows_of_heldout_documents_are_only_the_mixture(true_model):
    """In sample, so slightly better than the estimate by folds."""
    calibration, source = true_model
    nll = [
        -float(rows_of(source, doc).gather(1, torch.from_numpy(labels(doc))[:, None]).sum())
        for doc in HELDOUT
    ]
    mean = sum(nll) / calibration.tokens
    assert calibration.mixture.low < mean < calibration.mixture.mean + 0.01
    assert float(rows_of(source, HELDOUT[0]).isfinite().all())


def test_rows_read_in_chunks_equal_rows_read_at_once(better_source):
    rows = better_source[1].read(TRAIN[:1])[0]
    whole_TV = rows(0, 59)
    parts = [rows(start, stop) for start, stop in ((0, 7), (7, 8), (8, 59))]
    torch.testing.assert_close(torch.cat(parts), whole_TV)


# What is left out


def test_a_document_is_left_out_of_its_own_target(better_source):
    """Its rows are the same whether the corpus has it or another text in its place."""
    calibration, _ = better_source
    changed = document([*TRAIN[0].tokens_N[:30].tolist(), *[3] * 30])
    rows = []
    for corpus in (TRAIN, [changed, *TRAIN[1:]]):
        ngram = Ngram(corpus, vocabulary=V, order=3, min_count=1)
        parts = {"teacher": TRUTH, "ngram 1": ngram.at_order(1), "ngram 3": ngram}
        parts |= {"cache": Cache(decay=0.9, vocabulary=V), "other": TRUTH}
        rows.append(
            rows_of(Calibrated(parts, ngram, calibration, bins=SMALL, heldout=[]), TRAIN[0])
        )
    torch.testing.assert_close(*rows)
    inside = rows_of(Ngram([changed, *TRAIN[1:]], vocabulary=V), TRAIN[1])
    assert not torch.equal(inside, rows_of(Ngram(TRAIN, vocabulary=V), TRAIN[1]))


def test_a_cache_weights_earlier_tokens_by_their_age():
    source = Cache(decay=0.5, vocabulary=V)
    rows_TV = rows_of(source, document([3, 4, 3, 5])).exp().numpy()
    expected_TV = np.zeros((3, V))
    expected_TV[0, 3] = 1
    expected_TV[1, [3, 4]] = np.array([0.5, 1]) / 1.5
    expected_TV[2, [3, 4]] = np.array([1 + 0.25, 0.5]) / 1.75
    np.testing.assert_allclose(rows_TV, expected_TV, atol=1e-6)
    own_T = np.exp(source.token_logprobs([document([3, 4, 3, 5])])[0])
    np.testing.assert_allclose(own_T, expected_TV[[0, 1, 2], [4, 3, 5]])
    with pytest.raises(ValueError, match=r"decay: got 1\.0; accepted: above 0, below 1"):
        Cache(decay=1.0, vocabulary=V)


def test_only_other_documents_are_put_into_the_context():
    """The rows are the teacher's on context and document; copies and pieces are not drawn."""
    teacher = Teacher(small_model(), vocabulary=91, name="small")
    held = [*documents(6, seed=3, longest=10)]
    one = Document(held[0].tokens_N, held[0].trained_N, "book")
    piece = Document(held[1].tokens_N, held[1].trained_N, "book")
    copy = Document(held[0].tokens_N, held[0].trained_N, "elsewhere")
    source = InContext(teacher, [one, piece, copy, *held[2:]], number=3, tokens=25)
    before_N = source.before(one)
    assert 0 < len(before_N) <= 25
    np.testing.assert_array_equal(before_N, source.before(one))
    drawn = [each.tokens_N.tolist() for each in held[2:]]
    assert any(before_N.tolist()[: len(each)] == each for each in drawn)
    alone = InContext(teacher, [one, piece, copy], number=3, tokens=25)
    assert len(alone.before(one)) == 0
    torch.testing.assert_close(rows_of(alone, one), rows_of(teacher, one))
    whole = Document(
        np.concatenate([before_N, one.tokens_N]),
        np.concatenate([np.zeros(len(before_N), bool), one.trained_N]),
    )
    torch.testing.assert_close(rows_of(source, one), rows_of(teacher, whole))


def test_a_context_leaves_room_for_the_document():
    teacher = Teacher(small_model(), vocabulary=91, name="small")
    longest = document([5] * 120)
    source = InContext(teacher, documents(9, seed=3), number=8, tokens=500)
    assert len(source.before(longest)) == 8  # Of the model's 128 positions.
    assert len(rows_of(source, longest)) == 119


# The gate


def test_a_gain_in_too_few_documents_does_not_count():
    """A gain of 1 nat gives a share in the fewest documents that a bin needs; in one less, none."""
    groups_T = np.repeat(np.arange(2 * LEAST_DOCUMENTS - 1), 50)
    bins_T = (groups_T >= LEAST_DOCUMENTS).astype(np.int64)
    nll_T = np.ones(len(groups_T))
    result = gate(nll_T, {"text": nll_T + 1}, groups_T, bins_T, bins=3)
    np.testing.assert_allclose(result.share_B, [1 - math.exp(-1), 0, 0])
    np.testing.assert_array_equal(result.gain_B[1:], -np.inf)


def test_a_gain_over_only_one_baseline_does_not_count():
    groups_T = np.repeat(np.arange(LEAST_DOCUMENTS), 50)
    bins_T = np.tile([0, 1], len(groups_T) // 2)
    better_T = np.where(bins_T == 0, 1.0, -0.5)
    nll_T = np.ones(len(groups_T))
    result = gate(nll_T, {"a": nll_T + 2, "b": nll_T + better_T}, groups_T, bins_T, bins=2)
    assert result.share_B[0] > 0.5
    assert result.share_B[1] == 0
    worse = gate(nll_T, {"a": nll_T + 2, "b": nll_T + better_T - 0.5}, groups_T, bins_T, bins=2)
    assert (worse.share_B == 0).all()  # Over all positions it gains nothing on b.


def test_intervals_are_over_documents():
    """Ten documents, each of equal tokens: Student's interval of ten numbers."""
    values_S = np.arange(10.0)
    result = interval(np.repeat(values_S, 100), np.repeat(np.arange(10), 100))
    expected = stats.ttest_1samp(values_S, 0).confidence_interval(0.95)
    assert result.mean == 4.5
    np.testing.assert_allclose([result.low, result.high], [expected.low, expected.high])
    with pytest.raises(ValueError, match="got 1 documents; accepted: two or more"):
        interval(np.ones(5), np.zeros(5))


def test_the_end_of_an_interval_beyond_the_longer_tail_is_further_out():
    """The other end is Student's; mirrored values have mirrored ends."""
    values_S = np.array([1.0] * 38 + [-12.0] * 2)
    result, mirrored = (interval(each, np.arange(40)) for each in (values_S, -values_S))
    student = stats.ttest_1samp(values_S, 0).confidence_interval(0.95)
    assert result.high == pytest.approx(student.high)
    assert result.low < student.low - 0.2
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low))


BINS, TRIALS = 36, 200


def false_alarms(gains, seed, documents):
    """The number of corpora in which one of 36 bins without a gain passes. A 37th bin makes all
    positions together gain. Texts vary in length and have at least one token of a bin, and five on
    average."""
    random = np.random.default_rng(seed)
    alarms = 0
    for _ in range(TRIALS):
        length_S1 = random.gamma(4, 0.25, size=(documents, 1))
        counts_SB = 1 + random.poisson(4 * length_S1, size=(documents, BINS + 1))
        groups_T = np.repeat(np.arange(documents), counts_SB.sum(axis=1))
        bins_T = np.repeat(np.tile(np.arange(BINS + 1), documents), counts_SB.ravel())
        gains_T = gains(random, counts_SB)
        gains_T[bins_T == BINS] += 10 * BINS
        result = gate(np.zeros(len(gains_T)), {"a": gains_T}, groups_T, bins_T, bins=BINS + 1)
        assert result.share_B[BINS] > 0
        alarms += bool(result.share_B[:BINS].any())
    return alarms


def of_documents(random, counts_SB):
    """Each document gains or loses in a bin as a whole, sometimes a lot (t of 3 degrees)."""
    gains_SB = random.standard_t(3, size=counts_SB.shape)
    return np.repeat(gains_SB.ravel(), counts_SB.ravel()) + random.normal(size=counts_SB.sum())


def rare_losses(random, counts_SB):
    """One token of 20 loses what 19 gain."""
    tokens = counts_SB.sum()
    return np.where(random.random(tokens) < 0.05, -19.0, 1.0) + random.normal(size=tokens)


@pytest.mark.parametrize("gains", [of_documents, rare_losses])
def test_bins_without_a_gain_pass_no_more_often_than_the_level(gains):
    """At the level, more alarms than this have the probability 1e-6 (binomial)."""
    allowed = stats.binom.isf(1e-6, TRIALS, LEVEL)
    assert false_alarms(gains, 3, LEAST_DOCUMENTS) <= allowed


def test_the_text_gets_what_the_mixture_leaves():
    mixed_RV = torch.tensor([[0.2, 0.8], [0.2, 0.8], [1.0, 0.0]]).log()
    result_RV = with_text(mixed_RV, torch.tensor([0, 0, 1]), np.array([0.0, 0.25, 1.0])).exp()
    expected_RV = torch.tensor([[1.0, 0.0], [0.8, 0.2], [1.0, 0.0]])
    torch.testing.assert_close(result_RV, expected_RV)


def test_bins_are_assigned_by_their_edges():
    bins = Bins(match=(1, 3), count=(), entropy=(1.5,), position=(64,))
    values = {"match": [0, 1, 2, 3, 9], "count": [0] * 5, "entropy": [0, 1.5, 9, 0, 9]}
    found_T = bins.of(
        **{name: np.array(each) for name, each in values.items()},
        position=np.array([1, 63, 64, 64, 900]),
    )
    assert bins.number == 12
    assert [bins.title(number) for number in found_T.tolist()] == [
        "match < 1, entropy < 1.5, position < 64",
        "match 1 to 3, entropy ≥ 1.5, position < 64",
        "match 1 to 3, entropy ≥ 1.5, position ≥ 64",
        "match ≥ 3, entropy < 1.5, position ≥ 64",
        "match ≥ 3, entropy ≥ 1.5, position ≥ 64",
    ]


# Refusals and reuse


@pytest.mark.parametrize("heldout", [[], HELDOUT[:39], [document([1, 2])] * 40])
def test_too_little_held_out_text_is_refused(heldout):
    with pytest.raises(ValueError, match=r"text, of .*; accepted: at least 1,000 .*--held"):
        make_calibrated(TRUTH, TRAIN, heldout)


def test_pieces_of_one_text_count_as_one():
    pieces = [document(each.tokens_N.tolist(), "a book") for each in HELDOUT]
    with pytest.raises(ValueError, match="got 2,950 trained tokens of held-out text, of 1 texts"):
        make_calibrated(TRUTH, TRAIN, pieces)


def test_one_piece_of_each_text_is_selected_before_a_second():
    """50 texts of two pieces of 29 trained tokens: one of each comes before a second of any."""
    pieces = [
        document(each.tokens_N[start : start + 30].tolist(), f"text {i}")
        for i, each in enumerate(HELDOUT)
        for start in (0, 30)
    ]
    for tokens, expected in ((1000, 40), (29 * 50, 50), (29 * 60, 60)):
        selected = _select_documents(pieces, tokens)
        assert (len(selected), len({each.group for each in selected})) == (
            expected,
            min(expected, 50),
        )


def test_bins_closed_because_of_few_texts_are_reported(better_source):
    calibration, _ = better_source
    *others, last = calibration.bins
    closed = replace(last, gain=None, share=0.0)
    report = as_text(replace(calibration, bins=(*others, closed)))
    assert last.positions > 0
    assert f"share 0 in 1 bins, {last.positions:,} positions, that are in fewer than 40" in report


def test_a_stored_fit_is_reused(better_source):
    calibration, source = better_source
    model = Chain(2, 5.0)
    stored = json.loads(json.dumps({"kind": "mix", "sources": [source.describe()]}))
    ngram = Ngram(TRAIN, vocabulary=V, order=3, min_count=1)
    parts = {"teacher": model, "ngram 1": ngram.at_order(1), "ngram 3": ngram}
    parts |= {"cache": Cache(decay=0.9, vocabulary=V), "other": TRUTH}
    again = calibrate(parts, ngram, HELDOUT, bins=SMALL, fit=Fit(), known=stored)
    assert (again, model.reads) == (calibration, 0)
    other = calibrate(parts, ngram, HELDOUT[1:], bins=SMALL, fit=Fit(), known=stored)
    assert (other.inputs != calibration.inputs, model.reads > 0) == (True, True)


def test_the_same_seed_and_texts_give_the_same_weights(better_source):
    calibration, _ = make_calibrated(Chain(2, 5.0), TRAIN, HELDOUT, other=TRUTH)
    assert asdict(calibration) == asdict(better_source[0])


# From the command line


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("small"))


@pytest.fixture
def texts(tmp_path):
    return save_texts(tmp_path / "texts", 96, words=52)


def build(texts, small, out, *more):
    arguments = ["target", "build", texts, "--model", small, "--recipe", "calibrated", "--out", out]
    arguments += ["--set", f"teacher={small}", "--heldout", "0.5", *more]
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_a_build_reports_its_measurements_and_reuses_them(tmp_path, texts, small):
    out = tmp_path / "out"
    result = build(texts, small, out, "--set", "in_context=2")
    assert result.exit_code == 0, result.output
    for words in ("Fitting a mixture", "nats a token", "in context", "cache 0.95", "gain over"):
        assert words in result.output
    source = TargetStore(out).manifest.plan.source
    assert source["calibration"]["tokens"] >= 1000
    ngrams = [part for part in source["parts"].values() if part["kind"] == "ngram"]
    assert [part["leaves_out"] for part in ngrams] == ["group"] * 4
    again = build(texts, small, out, "--set", "in_context=2")
    assert "is complete already" in again.output
    assert "Fitting a mixture" not in again.output
    inspected = CliRunner().invoke(main, ["target", "inspect", str(out)])
    for each in (again, inspected):
        assert "in context" in each.output
        assert "gain over teacher" in each.output


def test_a_plan_reports_the_measurements(tmp_path, texts, small):
    planned = build(texts, small, tmp_path / "out", "--plan", "--json")
    assert planned.exit_code == 0, planned.output
    calibration = json.loads(planned.stdout)["calibrations"][0]
    assert [each["name"] for each in calibration["components"]][:2] == ["teacher", "ngram 1"]
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_enough_held_out_text_is_refused(tmp_path, texts, small):
    result = build(texts, small, tmp_path / "out", "--heldout", "0.05")
    assert result.exit_code == 2
    assert "accepted: at least 1,000 tokens of at least 40 texts" in result.output
    assert not (tmp_path / "out").exists()
