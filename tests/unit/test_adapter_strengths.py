"""Scaling an adapter: only what it adds to each weight is scaled."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dftserve.adapter_strengths import CONFIG, WEIGHTS, flags, scale
from dftserve.cli import main

SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def adapter(folder, **settings):
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(SETTINGS | settings))
    torch.manual_seed(0)
    weights = {"a.lora_A.weight": torch.randn(4, 6), "a.lora_B.weight": torch.randn(5, 4)}
    save_file(weights, folder / WEIGHTS)
    return folder


def added(folder, root=False) -> torch.Tensor:
    """What a plain LoRA adds to its weight, computed from its files: alpha/r·BA."""
    settings, weights = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    rank = settings["r"] ** 0.5 if root else settings["r"]
    product = weights["a.lora_B.weight"].double() @ weights["a.lora_A.weight"].double()
    return settings["lora_alpha"] / rank * product


@pytest.mark.parametrize("root", [False, True])
def test_the_added_weights_scale_exactly(tmp_path, root):
    whole = adapter(tmp_path / "prose", use_rslora=root, alpha_pattern={"q_proj": 4})
    strengths = [0.25, 0.5, 1.0]
    folders = scale(whole, strengths, tmp_path / "out")
    assert [each.name for each in folders] == ["prose-0.25", "prose-0.5", "prose-1"]
    for folder, strength in zip(folders, strengths, strict=True):
        assert torch.equal(added(folder, root), strength * added(whole, root))
        settings = json.loads((folder / CONFIG).read_text())
        assert settings["alpha_pattern"] == {"q_proj": 4 * strength}
    assert f"prose-0.5={folders[1].resolve()}" in flags(folders)
    assert "--max-lora-rank 8 " in flags(folders)
    assert "--max-loras 4 " in flags(folders), "one is empty: what vLLM adds to the base on a CPU"


@pytest.mark.parametrize("pattern", [None, {}, {"q_proj": 16}])
def test_the_highest_rank_is_found(tmp_path, pattern):
    whole = adapter(tmp_path / "prose", rank_pattern=pattern)
    assert f"--max-lora-rank {16 if pattern else 8} " in flags(
        scale(whole, [1.0], tmp_path / "out")
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_alpha": "8"}, "numbers"),
        ({"r": 0}, "above 0"),
        ({"alpha_pattern": [1]}, "no objects"),
    ],
)
def test_adapters_that_do_not_scale_are_refused_with_the_reason(tmp_path, settings, message):
    folder = adapter(tmp_path / "prose", **settings)
    arguments = ["checkpoint", "scale", str(folder), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strengths", ["0", "1.5", "x", "", ".5,0.5", "nan"])
def test_invalid_strengths_are_refused(tmp_path, strengths):
    folder = adapter(tmp_path / "prose")
    arguments = ["checkpoint", "scale", str(folder), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*arguments, "--strengths", strengths])
    assert result.exit_code == 2
    assert "accepted" in result.output


def test_missing_and_linked_weights_are_refused(tmp_path):
    folder = adapter(tmp_path / "prose")
    weights = folder / WEIGHTS
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="safetensors"):
        scale(folder, [0.5], tmp_path / "out")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=WEIGHTS):
        scale(folder, [0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_an_adapter_is_refused_with_advice(tmp_path):
    command = ["checkpoint", "scale", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code != 0
    assert f"{tmp_path / CONFIG}: there is no such file; name the folder" in result.output
    assert not (tmp_path / "out").exists()
