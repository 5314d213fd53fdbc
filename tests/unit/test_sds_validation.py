"""What bench/sds_validation.py requires, on fewer draws: people, models, copies, word salad."""

import importlib

import numpy as np
import pytest
from scipy import stats

from dftserve.evaluate import reference
from dftserve.evaluate.benchmark import tasks
from dftserve.evaluate.metrics.sds import score
from dftserve.evaluate.metrics.stylometry import StyleSpace
from dftserve.evaluate.metrics.two_sample import c2st, median_distance, mmd_test
from dftserve.evaluate.reference import Anchors
from dftserve.evaluate.text.windows import Sample, Windows


@pytest.fixture(scope="module")
def story(data) -> tasks.Task:
    try:
        return tasks.load("story", data)
    except tasks.Missing as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def human(story) -> Anchors:
    return reference.build(story.human)


@pytest.fixture(scope="module")
def frame(human) -> StyleSpace:
    return StyleSpace.fit(human.splits["reference"])


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("sds_validation")


@pytest.fixture(scope="module")
def systems(bench, data) -> dict[str, Windows]:
    try:
        return bench.systems(data)
    except FileNotFoundError as error:
        pytest.skip(f"DFTSERVE_DATA has no {error.filename}")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_human_text_scores_85_or_more(story, seed):
    assert reference.build(story.human, seed=seed).human.sds.value >= 85


def test_copies_fall_strictly_to_0(bench, human):
    scores = [bench.copies(human, share).sds.value for share in bench.COPIED]
    assert bench.strictly_falling([human.human.sds.value, *scores])
    assert scores[-1] == 0


def test_word_salad_scores_0(bench, human):
    for texts in bench.soups(human.test).values():
        assert score(texts, human.sds_reference).sds.value == 0


def test_the_usual_measures_prefer_shuffled_words(bench, human, frame):
    """With about as many texts of each kind."""
    of_people = bench.usual(human.test, frame)
    soup = bench.soups(human.test)["words shuffled"].whole()
    of_soup = bench.usual(soup, frame)
    assert len(soup) > 0.9 * len(human.test)
    assert of_soup["distinct_3"] > of_people["distinct_3"]
    assert of_soup["self_bleu"] < of_people["self_bleu"]
    assert of_soup["compression"] < of_people["compression"]


@pytest.mark.parametrize("name", ["gemma-3-27b-it", "Mistral Nemo"])
def test_models_score_10_points_less_than_held_out_human_text(systems, human, name):
    """Between the nearest ends of the two intervals."""
    model = score(systems[name], human.sds_reference).sds
    assert model.high is not None
    assert human.human.sds.low is not None
    assert model.high + 10 <= human.human.sds.low


def test_the_order_of_the_texts_does_not_matter(human):
    reversed_texts = human.test.pick(range(len(human.test))[::-1])
    assert score(reversed_texts, human.sds_reference).sds.value == pytest.approx(
        human.human.sds.value
    )


@pytest.mark.parametrize("size", [16, 48])
def test_a_few_texts_have_the_score_of_all_texts_on_average(bench, systems, human, size):
    """Of a model, whose score is not capped. The draws deviate by at most about 7, so that
    a mean of 40 that is 5 off is 4.5 standard errors off, p < 1e-5."""
    whole = systems["gemma-3-27b-it"].whole()
    drawn = [bench.drawn(whole, size, seed) for seed in range(40)]
    mean = np.mean([score(each, human.sds_reference).sds.value for each in drawn])
    assert mean == pytest.approx(score(whole, human.sds_reference).sds.value, abs=5)


# ── Distance ─────────────────────────────────────────────────────────────────────────────────────


def test_the_p_value_of_the_mmd_between_two_human_sets_is_uniform(human, frame):
    """The test is exact given the texts: Kolmogorov–Smirnov rejects a correct one with probability
    1e-6. Uniform draws fill the steps of the p-value."""
    style_TF = np.concatenate([frame.features(split) for split in human.splits.values()])
    draw = np.random.default_rng(1)
    p_values = []
    for seed in range(200):
        x_NF, y_NF = np.split(draw.permutation(style_TF)[:80], 2)
        p = mmd_test(x_NF, y_NF, frame.sigma, permutations=99, seed=seed).p
        p_values.append(p - draw.uniform() / 100)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-6


@pytest.mark.parametrize("name", ["GPT-3.5", "gemma-3-27b-it"])
def test_the_mmd_and_the_classifier_distinguish_models_from_people(systems, human, frame, name):
    style_TF, human_TF = frame.features(systems[name]), frame.features(human.test)
    assert mmd_test(style_TF, human_TF, frame.sigma, permutations=1999).p < 0.001
    assert c2st(style_TF, human_TF).value > 0.9


def test_the_style_space_is_fitted_to_whole_windows(human, frame):
    reference = human.splits["reference"]
    z_TF = frame.features(reference)
    varied_F = frame.scale.spread_F > 0
    assert frame.sigma == median_distance(z_TF)
    assert np.abs(z_TF).max() <= 3
    assert (z_TF[:, ~varied_F] == 0).all()
    assert np.median(np.abs(z_TF[:, varied_F].mean(axis=0))) < 0.1


def test_the_style_space_refuses_another_length_and_too_few_texts(frame, story):
    with pytest.raises(ValueError, match="got 100 words; accepted: 120"):
        frame.features(Windows.of(story.human[:9], 100))
    with pytest.raises(ValueError, match="got 0 of 120 words; accepted: at least 2"):
        StyleSpace.fit(Windows.of([Sample("short")]))
