"""The doctor names the style profiles that a server would load, and why one is refused."""

import json

import pytest
from click.testing import CliRunner
from dftserve_vllm import styles as engine_styles

from dftserve import doctor
from dftserve.cli import main
from dftserve.fingerprints import tokenizer_fingerprint
from dftserve.spec import STYLES_VARIABLE as STYLES
from dftserve.styles import profile
from tests.styles import stored
from tests.training import VOCABULARY, save_model, tokenizer

OTHER = "b" * 64


@pytest.fixture
def folder(tmp_path):
    """Profiles that fit the model, and that do not; the files of some are not what was written."""
    place = tmp_path / "styles"
    own = {"vocabulary": VOCABULARY, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer())}
    for name, values in {
        "human": own,
        "other": own | {"tokenizer_fingerprint": OTHER},
        "wide": own | {"vocabulary": VOCABULARY + 1},
        "manifest": own,
        "tensors": own,
    }.items():
        profile.write(place / name, stored(name=name, **values))
    for file in (place / "manifest" / profile.MANIFEST, place / "tensors" / profile.TENSORS):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    return place


def found(environment, model=None):
    """By name, of what concerns styles."""
    said = doctor.examine(environment, model)
    return {each.name: each for each in said if each.name.startswith(("style", STYLES))}


def test_without_a_model_a_profile_is_read_and_its_fit_left_open(folder):
    said = found({STYLES: str(folder)})
    states = {name: each.state for name, each in said.items()}
    good, broken = ("human", "other", "wide"), ("manifest", "tensors")
    expected = {f"style {name}": "ok" for name in good}
    assert states == expected | {f"style {name}": "error" for name in broken}
    assert "--model" in said["style human"].text
    for name, file in (("manifest", profile.MANIFEST), ("tensors", profile.TENSORS)):
        assert file in said[f"style {name}"].text


def test_with_the_model_each_profile_is_judged_as_the_server_does(folder, tmp_path, monkeypatch):
    model = save_model(tmp_path / "model")
    said = found({STYLES: str(folder)}, str(model))
    assert {name for name, each in said.items() if each.state == "ok"} == {"style human"}
    assert "fits the model" in said["style human"].text
    assert "another tokenizer" in said["style other"].text
    assert f"{VOCABULARY} columns" in said["style wide"].text

    monkeypatch.setattr("dftserve_vllm.vocabulary.tokenizer", lambda _: tokenizer())

    class Config:
        def get_vocab_size(self):
            return VOCABULARY

    served = engine_styles._load(folder, engine_styles.vocabulary.Identity(Config()))
    assert [f"style {each.name}" for each in served.profiles] == ["style human"]
    assert {f"style {name}" for name in served.refused} == said.keys() - {"style human"}


@pytest.mark.parametrize("model", [None, "nowhere"])
def test_a_folder_that_is_none_is_an_error_and_an_empty_one_a_warning(tmp_path, model):
    said = found({STYLES: str(tmp_path / "nowhere")}, model)
    assert said[STYLES].state == "error"
    if model is None:
        assert found({STYLES: str(tmp_path)})[STYLES].state == "warning"
    else:  # The model is looked for before the profiles.
        assert "nowhere" in found({STYLES: str(tmp_path)}, model)[STYLES].text
    assert found({}) == found({STYLES: ""}) == {}


def test_two_profiles_of_one_name(tmp_path):
    for place in ("a", "b"):
        profile.write(tmp_path / place, stored(name="same"))
    said = [each for each in doctor.examine({STYLES: str(tmp_path)}) if "same" in each.name]
    assert [each.state for each in said] == ["ok", "error"]
    assert "another profile" in said[1].text


def test_the_command(folder, tmp_path):
    given = ["doctor", "--styles", str(folder), "--json"]
    answer = CliRunner().invoke(main, given, env={STYLES: str(tmp_path / "nowhere")})
    names = {each["name"] for each in json.loads(answer.stdout)["findings"]}
    assert {"style human", "style tensors"} <= names
    assert answer.exit_code == 1
    alone = CliRunner().invoke(main, ["doctor", "--model", "m"], env={STYLES: ""})
    assert alone.exit_code == 2
    assert "--styles DIR" in alone.stderr
