"""The effect of tuning that bench/headline.py measures at length, in a small form: a real model
with collapsed variety, tuned on a few stories by people, predicts those of others better.
"""

import importlib

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dftserve.evaluate.metrics.likelihood import token_nats

models = importlib.import_module("headline_models")
pytestmark = pytest.mark.long
TEXTS = 24
"""Texts that each model is tuned on, and that are predicted."""
FALSE_ALARM = 1e-3
"""Of each test: the chance that it passes although the effect is not there."""
DFT = "dft"


@pytest.fixture(scope="module")
def nats(data, smollm2_folder, tmp_path_factory) -> dict[str, list[NDArray]]:
    """By model: the nats of each token of stories that none was tuned on."""
    folder = tmp_path_factory.mktemp("headline")
    texts = [story.text[:1000] for story in models.stories()["measure"][:TEXTS]]
    names = (models.BASE, models.START, models.SFT, DFT)
    made = {name: models.make(name, smollm2_folder, folder, 0, TEXTS) for name in names}
    return {name: token_nats(place, texts) for name, place in made.items()}


@pytest.mark.parametrize("name", [models.SFT, DFT])
def test_tuning_on_stories_by_people_predicts_those_of_others_better(nats, name):
    start, tuned = ([nats_T.mean() for nats_T in nats[each]] for each in (models.START, name))
    assert stats.ttest_rel(start, tuned, alternative="greater").pvalue < FALSE_ALARM


def test_tuning_toward_a_teacher_stays_nearer_to_it(nats):
    def distance(name: str) -> list[float]:
        """The mean square of the difference to the teacher, of each story."""
        pairs = zip(nats[name], nats[models.BASE], strict=True)
        return [float(np.square(nats_T - base_T).mean()) for nats_T, base_T in pairs]

    p = stats.ttest_rel(distance(models.SFT), distance(DFT), alternative="greater").pvalue
    assert p < FALSE_ALARM
