"""docs/training.md has every setting of a run and of a divergence with the default of the code, and
its notations for several stores are equivalent."""

import inspect
import re
import textwrap

import pytest

from dftserve.train import config as configs
from dftserve.train.divergences import DIVERGENCES
from tests.conftest import ROOT
from tests.document_tables import defaults_of, read, read_default, section

PATH = ROOT / "docs" / "training.md"
TEXT, SETTINGS = PATH.read_text(), read(PATH)
SECTIONS = {"feature_matching": configs.FeatureMatchingConfig, "lora": configs.LoraConfig}
"""Sections that are off by default."""
ALL = [each for each in defaults_of(configs.TrainConfig) if each[0] not in SECTIONS] + [
    each for name, kind in SECTIONS.items() for each in defaults_of(kind, prefix=f"{name}.")
]


@pytest.mark.parametrize(("name", "default"), ALL)
def test_every_setting_has_its_default(name, default):
    assert SETTINGS[name] == default


def test_no_setting_is_unknown():
    assert set(SETTINGS) == {name for name, _ in ALL}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_has_its_own_defaults(name):
    (row,) = re.findall(rf"^\| `{name}`.*", section(TEXT, "Divergences"), re.MULTILINE)
    written = {
        setting: read_default(default)
        for setting, default in re.findall(r"`(\w+)` ([\d.]+)", row.split("|")[3])
    }
    code = inspect.signature(DIVERGENCES[name]).parameters
    assert written == {
        setting: code["weight" if setting == "target_weight" else setting].default
        for setting in configs.TAKES[name]
    }


def test_both_notations_for_several_stores_are_equivalent(tmp_path):
    text = section(TEXT, "Several stores, by weights")
    setting = re.search(r"--set 'targets=(.*)'", text)
    written = re.search(r"\n\n(    targets:\n(?:    .*\n)+)", text)
    assert setting is not None
    assert written is not None
    path = tmp_path / "run.yaml"
    path.write_text(textwrap.dedent(written[1]))
    paths = {"model": "m", "output": "o"}
    from_flag = configs.load(None, {**paths, "targets": setting[1]})
    assert from_flag == configs.load(path, paths)
    assert [store.weight for store in from_flag.stores] == [0.7, 0.3]
