"""The doctor reports the style profiles that a server would load, and why one is refused."""

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
    """Profiles that fit the model and some that do not; two have a file with a flipped bit."""
    root = tmp_path / "styles"
    own = {"vocabulary": VOCABULARY, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer())}
    for name, values in {
        "human": own,
        "other": own | {"tokenizer_fingerprint": OTHER},
        "wide": own | {"vocabulary": VOCABULARY + 1},
        "manifest": own,
        "tensors": own,
    }.items():
        profile.write(root / name, stored(name=name, **values))
    for file in (root / "manifest" / profile.MANIFEST, root / "tensors" / profile.TENSORS):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    return root


def style_findings(environment, model=None):
    """The findings about styles, by name."""
    reported = doctor.examine(environment, model)
    return {each.name: each for each in reported if each.name.startswith(("style", STYLES))}


def test_without_a_model_profiles_are_read_but_not_matched_to_one(folder):
    reported = style_findings({STYLES: str(folder)})
    states = {name: each.state for name, each in reported.items()}
    good, broken = ("human", "other", "wide"), ("manifest", "tensors")
    expected = {f"style {name}": "ok" for name in good}
    assert states == expected | {f"style {name}": "error" for name in broken}
    assert "--model" in reported["style human"].text
    for name, file in (("manifest", profile.MANIFEST), ("tensors", profile.TENSORS)):
        assert file in reported[f"style {name}"].text


def test_with_a_model_the_doctor_refuses_the_profiles_that_the_server_refuses(
    folder, tmp_path, monkeypatch
):
    model = save_model(tmp_path / "model")
    reported = style_findings({STYLES: str(folder)}, str(model))
    assert {name for name, each in reported.items() if each.state == "ok"} == {"style human"}
    assert "fits the model" in reported["style human"].text
    assert "another tokenizer" in reported["style other"].text
    assert f"{VOCABULARY} columns" in reported["style wide"].text

    monkeypatch.setattr("dftserve_vllm.vocabulary.tokenizer", lambda _: tokenizer())

    class Config:
        def get_vocab_size(self):
            return VOCABULARY

    served = engine_styles._load(folder, engine_styles.vocabulary.Identity(Config()))
    assert [f"style {each.name}" for each in served.profiles] == ["style human"]
    assert {f"style {name}" for name in served.refused} == reported.keys() - {"style human"}


@pytest.mark.parametrize("model", [None, "nowhere"])
def test_a_missing_folder_is_an_error_and_an_empty_one_a_warning(tmp_path, model):
    reported = style_findings({STYLES: str(tmp_path / "nowhere")}, model)
    assert reported[STYLES].state == "error"
    if model is None:
        assert style_findings({STYLES: str(tmp_path)})[STYLES].state == "warning"
    else:  # The model is looked up before the profiles.
        assert "nowhere" in style_findings({STYLES: str(tmp_path)}, model)[STYLES].text
    assert style_findings({}) == style_findings({STYLES: ""}) == {}


def test_the_second_profile_of_a_name_is_an_error(tmp_path):
    for name in ("a", "b"):
        profile.write(tmp_path / name, stored(name="same"))
    reported = [each for each in doctor.examine({STYLES: str(tmp_path)}) if "same" in each.name]
    assert [each.state for each in reported] == ["ok", "error"]
    assert "another profile" in reported[1].text


def test_the_styles_option_overrides_the_environment_and_model_needs_styles(folder, tmp_path):
    arguments = ["doctor", "--styles", str(folder), "--json"]
    result = CliRunner().invoke(main, arguments, env={STYLES: str(tmp_path / "nowhere")})
    names = {each["name"] for each in json.loads(result.stdout)["findings"]}
    assert {"style human", "style tensors"} <= names
    assert result.exit_code == 1
    alone = CliRunner().invoke(main, ["doctor", "--model", "m"], env={STYLES: ""})
    assert alone.exit_code == 2
    assert "--styles DIR" in alone.stderr
