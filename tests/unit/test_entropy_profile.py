"""The entropies of a trained model, and the entropy that each level of diversity adds."""

import numpy as np
import pytest
import torch

from dftserve import sampling
from dftserve.lm import LanguageModel
from dftserve.sampling import Controls, backends, control_row, transform
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.spec import parse
from dftserve.targets.store import TargetStore
from dftserve.train import entropy_profile
from dftserve.train.data import Collator, Rows, model_inputs
from dftserve.train.material import some_rows
from tests.training import save_store, small_model

STOPS = frozenset({1})


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(small_model(), "small")


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> list:
    store = TargetStore(save_store(tmp_path_factory.mktemp("targets") / "store"))
    rows = Rows(store, "train", longest=64, packing=True, seed=0)
    collate = Collator(packing=True)
    return [collate(some_rows(rows, 200)[:2]), collate(some_rows(rows, 200)[2:])]


def _logits(model, batches) -> torch.Tensor:
    with torch.no_grad():
        hidden = [
            model.states(**model_inputs(each)).hidden_BND.flatten(0, 1)[each["positions_T"]]
            for each in batches
        ]
        return model.head.logits(torch.cat(hidden))


def _entropies(logits_RV: torch.Tensor, level: float) -> np.ndarray:
    row = control_row(parse(level), temperature=1.0, logits_divisor=1.0, stop_ids=STOPS)
    controls = Controls.stack([row] * len(logits_RV), device=logits_RV.device)
    return transform(logits_RV.clone(), controls, backend=TorchBackend()).entropy_after_R.numpy()


@pytest.mark.parametrize("step", [1, 7])
def test_the_entropy_that_a_level_adds_is_measured_at_every_nth_position(
    model, batches, monkeypatch, step
):
    logits_RV = _logits(model, batches)
    total = logits_RV.numel()
    monkeypatch.setattr(
        entropy_profile, "LEVEL_ELEMENTS", total if step == 1 else total // step + 1
    )
    monkeypatch.setattr(entropy_profile, "AT_ONCE", 3 * logits_RV.shape[1])
    measured = entropy_profile.measure(model, batches, stop_ids=STOPS, tokens=10**6)
    own_R = torch.distributions.Categorical(logits=logits_RV).entropy().numpy()
    assert measured.model_T == pytest.approx(own_R, abs=1e-4)
    for level, mean in measured.by_level.items():
        added_R = _entropies(logits_RV[::step], level) - own_R[::step]
        assert mean == pytest.approx(own_R.mean() + added_R.mean(), abs=1e-4), level


def test_no_kernel_is_compiled_for_a_profile(model, batches, monkeypatch):
    def fail_to_compile(device):
        raise AssertionError(f"a backend was made for {device}")

    monkeypatch.setattr(backends, "checked_class", fail_to_compile)
    with pytest.raises(AssertionError):
        sampling.get_backend("cpu")
    measured = entropy_profile.measure(model, batches, stop_ids=STOPS, tokens=10**6)
    assert measured.suggested is not None
