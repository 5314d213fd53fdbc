"""The score, against a double loop over pairs, and its values for copies and shuffled words."""

import math
from dataclasses import replace

import numpy as np
import pytest

from dftserve.evaluate.metrics.coherence import PASS
from dftserve.evaluate.metrics.overlap import ngram_overlap
from dftserve.evaluate.metrics.sds import WITHIN_VARIANCE, SDSReference, _Observed, score
from dftserve.evaluate.metrics.stylometry import features
from dftserve.evaluate.text.tokenize import tokens, window, words
from dftserve.evaluate.text.windows import Sample, Windows
from tests.texts import human_like, soup, write

TEXTS = human_like(250)
SHORT = Sample("Too short to say anything.", "p0")


def windows(texts, prompts=0):
    """The texts as answers to as many prompts in turn; 0: without prompts."""
    prompt_of_each = [f"p{i % prompts}" if prompts else "" for i in range(len(texts))]
    return Windows.of(
        [Sample(text, prompt) for text, prompt in zip(texts, prompt_of_each, strict=True)]
    )


REFERENCE = windows(TEXTS[:110])


@pytest.fixture(scope="module", params=[0, 4], ids=["all texts", "by prompt"])
def prompts(request):
    return request.param


@pytest.fixture(scope="module")
def sds_reference(prompts):
    return SDSReference.fit(REFERENCE, windows(TEXTS[110:170], prompts))


@pytest.fixture(scope="module")
def human(prompts):
    return windows(TEXTS[170:234], prompts)


def pair_means(indices, halves, shared, passed):
    """v and o over the pairs of texts that pass, one pair after the other."""
    passing = [i for i in indices if passed[i]]
    pairs = [(i, j) for i in passing for j in passing if i < j]
    if not pairs:
        return 0.0, 1.0
    a, b, rho = halves
    products = [
        sum(r * (a[i][k] - a[j][k]) * (b[i][k] - b[j][k]) / 2 for k, r in enumerate(rho)) / sum(rho)
        for i, j in pairs
    ]
    return math.fsum(products) / len(pairs), math.fsum(shared[i][j] for i, j in pairs) / len(pairs)


def by_pairs(texts, sds_reference):
    """v, o and the share that passes."""
    half = texts.words // 2
    a = sds_reference.scale.z(features([window(text, 0, half) for text in texts.texts])).tolist()
    b = sds_reference.scale.z(
        features([window(text, half, 2 * half) for text in texts.texts])
    ).tolist()
    halves = a, b, sds_reference.scale.reliability_F.tolist()
    shared = ngram_overlap([tokens(text) for text in texts.texts]).tolist()
    long = [text != "" for text in texts.texts]
    passed = [
        text != "" and sds_reference.coherence_filter.coherence(words(text)) >= PASS
        for text in texts.texts
    ]
    groups = [range(len(texts))]
    if sds_reference.by_prompt:
        names = sorted(set(texts.prompts) - {""})
        groups = [[i for i, p in enumerate(texts.prompts) if p == prompt] for prompt in names]
        groups = [group for group in groups if len(group) >= 8]
    means = [pair_means(group, halves, shared, passed) for group in groups]
    passing = [sum(passed[i] for i in group) for group in groups]
    degrees = [max(count - 1, 0) for count in passing]
    pairs = [count * (count - 1) for count in passing]
    answered = sum(long[i] for group in groups for i in group)
    return (
        math.fsum(v * d for (v, _), d in zip(means, degrees, strict=True)) / sum(degrees),
        math.fsum(o * n for (_, o), n in zip(means, pairs, strict=True)) / sum(pairs),
        sum(passing) / answered,
    )


def expected_score(texts, sds_reference, calibration):
    v, o, passed = by_pairs(texts, sds_reference)
    v_human, o_human, passed_human = by_pairs(calibration, sds_reference)
    variety = math.sqrt(max(0, v) / v_human)
    wording = math.log(max(o, 1e-4)) / math.log(max(o_human, 1e-4))
    coherence = passed / passed_human
    capped = min(1, coherence) * min(1, variety) * min(1, max(0, wording))
    return 100 * capped, variety, wording, coherence


def mixed(prompts):
    """Human texts, shuffled words, copies and short ones; with prompts, one has too few answers."""
    texts = [*TEXTS[170:200], *(soup(text) for text in TEXTS[200:206]), *([TEXTS[206]] * 7)]
    given = windows([*texts, SHORT.text, SHORT.text], prompts)
    rare = Windows.of([Sample(text, "rare" if prompts else "") for text in TEXTS[210:213]])
    return replace(
        given,
        texts=given.texts + rare.texts,
        prompts=given.prompts + rare.prompts,
        sources=given.sources + rare.sources,
        groups=given.groups + rare.groups,
    )


def test_the_score_is_that_of_a_loop_over_pairs(sds_reference, human, prompts):
    assert sds_reference.by_prompt == (prompts > 0)
    for texts in (human, mixed(prompts)):
        got = score(texts, sds_reference)
        parts = [each.value for each in (got.sds, got.variety, got.wording, got.coherence)]
        expected = expected_score(texts, sds_reference, windows(TEXTS[110:170], prompts))
        assert parts == pytest.approx(expected, rel=1e-9)
        assert (got.texts, got.short) == (len(texts), texts.short)
        assert got.sds.low is not None
        assert got.sds.high is not None
        assert got.sds.low <= got.sds.high


def test_held_out_human_texts_score_high(sds_reference, human):
    got = score(human, sds_reference)
    assert got.sds.value > 75
    assert got.sds.low is not None
    assert got.sds.low > 50


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_texts_does_not_matter(sds_reference, prompts, seed):
    texts = mixed(prompts)
    shuffled = texts.pick(np.random.default_rng(seed).permutation(len(texts)).tolist())
    assert score(shuffled, sds_reference).sds.value == pytest.approx(
        score(texts, sds_reference).sds.value
    )


def test_copies_score_0(sds_reference, human):
    got = score(replace(human, texts=(human.texts[0],) * len(human)), sds_reference)
    assert (got.sds.value, got.sds.low, got.sds.high) == (0, 0, 0)
    assert got.variety.value == pytest.approx(0, abs=1e-6)
    assert got.wording.value == 0


def test_the_score_falls_with_the_share_of_copies(sds_reference, human):
    scores = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        copied = round(share * len(human))
        texts = (human.texts[0],) * copied + human.texts[copied:]
        scores.append(score(replace(human, texts=texts), sds_reference).sds.value)
    assert scores == sorted(scores, reverse=True)
    assert scores[1] > scores[2] > scores[4] == 0


def test_shuffled_words_score_0(sds_reference, prompts):
    got = score(windows([soup(text) for text in TEXTS[170:234]], prompts), sds_reference)
    assert got.sds.value == 0
    assert got.coherence.value == 0


def test_one_author_is_less_varied_than_many(sds_reference, human, prompts):
    alone = windows([write("one", f"{text}") for text in range(64)], prompts)
    assert score(alone, sds_reference).sds.value < 0.6 * score(human, sds_reference).sds.value


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_does_not_pair_a_text_with_its_copy(seed):
    """Weights of texts, compared with all pairs of different texts in an explicit list of draws."""
    sds_reference = SDSReference.fit(REFERENCE, windows(TEXTS[110:170]))
    texts = mixed(0).pick(range(0, 48, 3))
    observed = _Observed.of(texts, sds_reference.scale, sds_reference.coherence_filter, False)
    drawn = np.random.default_rng(seed).integers(len(texts), size=len(texts)).tolist()
    weights_U = np.bincount(drawn, minlength=len(texts)).astype(float)
    got = observed.spread(np.array([weights_U, np.ones(len(texts))]))

    a, b = observed.first_TF, observed.second_TF
    passing = [i for i in drawn if observed.passed_T[i]]
    pairs = [(i, j) for i in passing for j in passing if i != j]
    v = np.mean([(a[i] - a[j]) @ (b[i] - b[j]) / 2 for i, j in pairs])
    assert got.variance[0] == pytest.approx(v)
    assert got.sharing[0] == pytest.approx(np.mean([observed.overlap_TT[i, j] for i, j in pairs]))
    assert got.passed[0] == pytest.approx(len(passing) / len(drawn))
    assert got.passed[1] == pytest.approx(observed.passed_T.mean())


def test_a_resample_of_prompts_is_a_mean_over_prompts():
    sds_reference = SDSReference.fit(REFERENCE, windows(TEXTS[110:170], 4))
    observed = _Observed.of(
        windows(TEXTS[170:202], 4), sds_reference.scale, sds_reference.coherence_filter, True
    )
    alone = observed.spread(np.eye(4))
    resampled = observed.spread(np.array([[0.0, 3, 1, 0]]))
    for name in ("variance", "sharing", "passed"):
        values_G = getattr(alone, name)
        assert getattr(resampled, name)[0] == pytest.approx((3 * values_G[1] + values_G[2]) / 4)


def test_short_texts_are_excluded_and_counted():
    sds_reference = SDSReference.fit(REFERENCE, windows(TEXTS[110:170]))
    good = TEXTS[170:190]
    plain = score(windows(good), sds_reference)
    got = score(windows([*good, *[SHORT.text] * 20]), sds_reference)
    for part in ("sds", "coherence", "variety", "wording"):
        assert getattr(got, part).value == pytest.approx(getattr(plain, part).value)
    assert (got.texts, got.short) == (40, 20)


def test_short_texts_remain_units_of_the_resampling():
    """Otherwise the resamples of two runs over the same prompts would contain different prompts."""
    sds_reference = SDSReference.fit(REFERENCE, windows(TEXTS[110:170]))
    texts = windows([*TEXTS[170:180], SHORT.text, *TEXTS[180:190]])
    scale, gate = sds_reference.scale, sds_reference.coherence_filter
    assert _Observed.of(texts, scale, gate, False).units == len(texts)
    prompts = tuple(f"p{i // 8}" for i in range(24))
    answers = replace(
        windows([*TEXTS[170:186], *[SHORT.text] * 8]), prompts=prompts, groups=prompts
    )
    assert _Observed.of(answers, scale, gate, True).units == 3


def test_the_texts_of_a_single_prompt_are_resampled():
    sds_reference = SDSReference.fit(REFERENCE, windows(TEXTS[110:170], 4))
    got = score(windows(TEXTS[170:190], 1), sds_reference)
    assert got.sds.low is not None
    assert got.sds.high is not None
    assert got.sds.low < got.sds.high


def test_differences_between_prompts_are_not_variety():
    """Eight copies of one answer to each of eight prompts; people answered each prompt once."""
    sds_reference = SDSReference.fit(REFERENCE, windows(TEXTS[110:170]))
    copied = [text for text in TEXTS[170:178] for _ in range(8)]
    prompts = [f"p{i // 8}" for i in range(64)]
    samples = [Sample(text, prompt) for text, prompt in zip(copied, prompts, strict=True)]
    got = score(Windows.of(samples), sds_reference)
    assert got.by_prompt
    assert got.sds.value == 0
    assert score(windows(copied), sds_reference).sds.value > 0


def test_variety_within_prompts_is_compared_with_an_estimate_of_peoples():
    """A reference of people who answered each prompt once has no pairs within prompts, so theirs is
    estimated from the variance between all texts."""
    between = SDSReference.fit(REFERENCE, windows(TEXTS[110:170]))
    given = windows(TEXTS[170:234], 4)
    within = score(given, between).variety.value
    unscaled = replace(between, by_prompt=True)
    assert not between.by_prompt
    assert within == pytest.approx(score(given, unscaled).variety.value / WITHIN_VARIANCE**0.5)


def test_prompts_that_few_texts_have_are_ignored():
    """Eight answers among sixty texts do not lead to a comparison within prompts."""
    given = windows(TEXTS[110:170])
    groups = ("p",) * 8 + ("",) * 52
    sds_reference = SDSReference.fit(REFERENCE, replace(given, prompts=groups, groups=groups))
    assert not sds_reference.by_prompt


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_texts_are_refused(count):
    sds_reference = SDSReference.fit(REFERENCE, windows(TEXTS[110:170]))
    with pytest.raises(ValueError, match="accepted: 8 or more"):
        score(windows([*TEXTS[170 : 170 + count], *[SHORT.text] * 9]), sds_reference)
    assert score(windows(TEXTS[170:178]), sds_reference).texts == 8


def test_answers_to_too_many_prompts_are_refused():
    sds_reference = SDSReference.fit(REFERENCE, windows(TEXTS[110:170], 4))
    for prompts in (0, 4):
        with pytest.raises(ValueError, match="no prompt has 8"):
            score(windows(TEXTS[170:198], prompts), sds_reference)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("texts", [[TEXTS[0]] * 20, [soup(TEXTS[0])] * 20], ids=["copies", "soup"])
def test_a_reference_of_equal_texts_is_refused(texts):
    with pytest.raises(ValueError, match="accepted"):
        SDSReference.fit(REFERENCE, windows(texts))
