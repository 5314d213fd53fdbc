"""An interpolated model has the weights between two models', and everything else of the first."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dftserve import checkpoint, pretrained
from dftserve.cli import main
from dftserve.spec import CheckpointInfo
from dftserve.train.interpolate import interpolate
from dftserve.train.run import train
from tests.training import FAMILIES, save_model, save_store, small_run, tokenizer


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    return save_model(tmp_path / "tuned", seed=1), save_model(tmp_path / "other", seed=2)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """In fp64."""
    found = load_file(folder / "model.safetensors")
    return {name: weight.double().numpy() for name, weight in found.items()}


def change(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_is_the_weighted_mean(family, tied, tmp_path):
    tuned, other = (
        save_model(tmp_path / name, family, tied=tied, seed=seed)
        for seed, name in enumerate(("tuned", "other"))
    )
    interpolate(str(tuned), str(other), share=0.3, out=tmp_path / "out")
    ours, theirs, mixed = map(weights, (tuned, other, tmp_path / "out"))
    assert mixed.keys() == ours.keys()
    for name, weight in mixed.items():
        np.testing.assert_allclose(
            weight, 0.3 * ours[name] + 0.7 * theirs[name], rtol=1e-5, atol=1e-7
        )
    assert any((ours[name] != theirs[name]).any() for name in ours)


def test_half_precision_is_rounded_once_and_kept(two, tmp_path):
    for folder in two:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    interpolate(*map(str, two), share=0.5, out=tmp_path / "out")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in two)
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        mean = (ours[name].double() + theirs[name].double()) / 2
        assert torch.equal(weight, mean.to(torch.bfloat16)), name


@pytest.mark.parametrize("wide", [0, 1])
def test_float32_of_one_model_is_not_rounded_to_the_other_ones_half_precision(wide, two, tmp_path):
    half = two[1 - wide]
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    interpolate(*map(str, two), share=0.5, out=tmp_path / "out")
    ours, theirs = map(load_file, (folder / "model.safetensors" for folder in two))
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(weight, (ours[name].float() + theirs[name].float()) / 2)


def test_weights_on_a_line_have_logits_between_in_a_linear_layer(two, tmp_path):
    """Of models that differ only in their last layer, logits are interpolated too."""
    tuned, other = (save_model(tmp_path / n, tied=False, seed=1) for n in ("a", "b"))
    found = load_file(other / "model.safetensors")
    found["lm_head.weight"] = found["lm_head.weight"] + 1.0
    save_file(found, other / "model.safetensors", metadata={"format": "pt"})
    interpolate(str(tuned), str(other), share=0.25, out=tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    a, b, mixed = (
        AutoModelForCausalLM.from_pretrained(each)(ids).logits
        for each in (tuned, other, tmp_path / "out")
    )
    torch.testing.assert_close(mixed, 0.25 * a + 0.75 * b)


# ── Everything else ──────────────────────────────────────────────────────────────────────────────


def test_the_rest_is_the_tuned_models(two, tmp_path):
    tuned, other = two
    named = tokenizer()
    named.chat_template = "{{ messages[0].content }}"
    named.save_pretrained(tuned)
    (tuned / "tokenizer.model").write_bytes(b"sentencepiece")
    change(tuned, eos_token_id=3, dtype="float32")
    out = tmp_path / "out"
    interpolate(str(tuned), str(other), share=0.5, out=out)
    assert AutoTokenizer.from_pretrained(out).chat_template == named.chat_template
    assert (out / "tokenizer.model").read_bytes() == b"sentencepiece"
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 3


def test_it_is_a_checkpoint_that_says_how_it_was_made(tmp_path):
    base = save_model(tmp_path / "base")
    run = small_run(base, save_store(tmp_path / "store"), tmp_path / "run", steps=2)
    tuned, out = train(run), tmp_path / "out"
    interpolate(str(tuned), str(base), share=0.5, out=out)
    checkpoint.verify(out)
    record = json.loads((out / "run.json").read_text())
    assert record["share"] == 0.5
    assert record["models"]["tuned"]["name"] == "run/final"
    assert record["models"]["other"]["name"] == "base"
    info = CheckpointInfo.read(out)
    assert info.recipe.startswith("weights: 0.5 of run/final and 0.5 of base; the former: ")
    assert CheckpointInfo.read(tuned).recipe in info.recipe
    # What was measured on the tuned model's weights does not hold for others.
    assert info == CheckpointInfo(recipe=info.recipe)


def test_a_model_can_be_tuned_from_it(two, tmp_path):
    interpolate(*map(str, two), share=0.5, out=tmp_path / "out")
    run = small_run(tmp_path / "out", save_store(tmp_path / "store"), tmp_path / "run", steps=1)
    assert (train(run) / "model.safetensors").exists()


def test_the_command_prints_the_folder(two, tmp_path):
    out = tmp_path / "out"
    words = ["checkpoint", "interpolate", *map(str, two), "--share", ".9", "--out", str(out)]
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stdout) == (0, f"{out}\n"), done.output
    assert json.loads((out / "run.json").read_text())["share"] == 0.9


def test_settings_that_differ_by_less_than_float32_are_the_same(two, tmp_path):
    """A GGUF file stores 1e-5 as 9.99999974e-06."""
    change(two[0], rms_norm_eps=1e-5)
    change(two[1], rms_norm_eps=float(np.float32(1e-5)), attention_dropout=0.1, pad_token_id=1)
    interpolate(*map(str, two), share=0.5, out=tmp_path / "out")


# ── Refused ──────────────────────────────────────────────────────────────────────────────────────


def refused(models: Iterable[Path], out: Path, share: float = 0.5) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        interpolate(*map(str, models), share=share, out=out)
    assert not out.exists()
    return str(error.value)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_share_that_is_not_between_two_models(share, two, tmp_path):
    assert "share: got" in refused(two, tmp_path / "out", share)


def test_an_existing_output_is_not_touched(two, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists; choose another"):
        interpolate(*map(str, two), share=0.5, out=out)
    assert not any(out.iterdir())


def test_a_model_that_cannot_be_saved_is_refused_before_the_other_one_is_read(
    two, tmp_path, monkeypatch
):
    (two[0] / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    loaded, load = [], pretrained.load
    monkeypatch.setattr(
        pretrained, "load", lambda found, **given: loaded.append(found) or load(found, **given)
    )
    assert "cannot be saved" in refused(two, tmp_path / "out")
    assert [each.name for each in loaded] == [str(two[0])]


def test_an_output_that_cannot_be_written_is_refused_before_the_weights_are_read(
    two, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(pretrained, "load", None)
    assert "cannot be made: Not a directory" in refused(two, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
        {"rms_norm_eps": 1e-3},
        {"num_attention_heads": 1},
        {"hidden_act": "gelu"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_models_that_compute_something_else_from_their_weights(settings, two, tmp_path):
    """Some of these leave every shape as it is, so the mean would be a broken model."""
    change(two[1], **settings)
    message = refused(two, tmp_path / "out")
    assert "config.json" in message
    assert next(iter(settings)) in message


def test_models_of_two_families(tmp_path):
    models = save_model(tmp_path / "a"), save_model(tmp_path / "b", "mistral")
    assert "model_type" in refused(models, tmp_path / "out")


def test_tied_and_untied_weights(tmp_path):
    models = (save_model(tmp_path / f"{tied}", tied=tied) for tied in (True, False))
    assert "tie_word_embeddings" in refused(models, tmp_path / "out")


def test_tokens_with_other_ids(two, tmp_path):
    path = two[1] / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
    path.write_text(json.dumps(content))
    assert "'w3', 'w4'" in refused(two, tmp_path / "out")


def test_a_model_and_itself(two, tmp_path):
    assert "the same weights" in refused((two[0], two[0]), tmp_path / "out")


def test_a_run_in_place_of_its_checkpoint_names_the_checkpoint(two, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    two[0].rename(run / "final")
    assert str(run / "final") in refused((run, two[1]), tmp_path / "out")
