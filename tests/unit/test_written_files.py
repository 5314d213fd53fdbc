"""No written file is a pickle, except the state that the Trainer of transformers resumes from."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dftserve.styles import profile
from dftserve.train.config import LoraConfig, TrainConfig
from dftserve.train.run import train
from tests.styles import stored
from tests.training import save_model, save_store

TRAINER_STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
"""Files of torch.save: zip files with a pickle. The Trainer reads them with `weights_only`."""
PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)
BEGINNINGS = tuple(b"\x80" + bytes([protocol]) for protocol in PROTOCOLS)


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle or contains one, like those of torch.save or of object arrays."""
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(archive.read(name).startswith(BEGINNINGS) for name in archive.namelist())
    is_of_objects = content.startswith(b"\x93NUMPY") and b"'|O'" in content[:200]
    return content.startswith(BEGINNINGS) or is_of_objects


def pickles(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path.relative_to(folder) for path in files if is_pickle(path)]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_training_run_pickles_only_the_trainer_state(tmp_path, lora):
    paths = {"model": str(save_model(tmp_path / "model")), "output": str(tmp_path / "run")}
    paths["targets"] = str(save_store(tmp_path / "store"))
    train(TrainConfig(**paths, steps=2, save_every=1, batch_size=2, max_length=64, lora=lora))
    assert pickles(tmp_path / "model") == []
    assert pickles(tmp_path / "store") == []
    found = pickles(tmp_path / "run")
    assert {path.name for path in found} == TRAINER_STATE
    assert all(path.parts[0].startswith("checkpoint-") for path in found)


def test_a_style_profile_has_no_pickle(tmp_path):
    profile.write(tmp_path / "style", stored())
    assert pickles(tmp_path / "style") == []


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(pickle.dumps({"a": 1})),
        lambda path: torch.save({"a": torch.zeros(2)}, path),
        lambda path: np.save(path.open("wb"), np.array([{}], object)),
    ],
)
def test_each_kind_of_pickle_is_detected(tmp_path, write):
    write(tmp_path / "file")
    assert pickles(tmp_path) == [Path("file")]


def test_plain_arrays_are_not_pickles(tmp_path):
    np.save(tmp_path / "plain.npy", np.zeros(3))
    np.savez(tmp_path / "more.npz", a=np.zeros(3))
    assert pickles(tmp_path) == []
