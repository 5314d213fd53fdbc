"""What cannot be saved is refused before training; what is saved is what was trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dftserve import checkpoint
from dftserve.targets.store import TargetStore
from dftserve.train.adapters import modules_of
from dftserve.train.config import LoraConfig, TrainConfig, load
from dftserve.train.data import Collator, Rows
from dftserve.train.divergences import SFT
from dftserve.train.model import attach
from dftserve.train.plan import plan_of
from dftserve.train.prepare import make_trainer, prepare
from dftserve.train.run import train
from dftserve.train.save import SaveError
from tests.training import SMALL, save_model, save_store, small_model, small_run, tokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return save_store(tmp_path_factory.mktemp("targets") / "store")


@pytest.fixture
def run(store, tmp_path) -> TrainConfig:
    base = save_model(tmp_path / "base")
    return small_run(base, store, tmp_path / "run", steps=2, save_every=500, evaluate_every=2)


# ── Before the first step ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", [train, plan_of])
def test_a_generation_config_that_cannot_be_saved_is_refused_before_training(call, run):
    path = Path(run.model) / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.7, "top_p": 0.9}))
    with pytest.raises(ValueError, match=r"cannot be saved, .*temperature.*do_sample"):
        call(run)
    assert not Path(run.output).exists()


@pytest.mark.parametrize("call", [train, plan_of])
def test_a_tokenizer_that_cannot_be_saved_is_refused_before_training(call, run, monkeypatch):
    def refuse(*args, **given):
        raise TypeError("no such thing")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse)
    with pytest.raises(ValueError, match=r"cannot be saved, .*no such thing"):
        call(run)
    assert not Path(run.output).exists()


@pytest.mark.parametrize("call", [train, plan_of])
def test_a_full_temporary_folder_is_reported_as_such(call, run, tmp_path, monkeypatch):
    full, save = tmp_path / "full", PreTrainedTokenizerFast.save_pretrained
    full.mkdir()
    (full / "tokenizer.json").symlink_to("/dev/full")
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "save_pretrained", lambda self, _: save(self, full)
    )
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        call(run)
    assert not Path(run.output).exists()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("embed_tokens", "tied to the output layer's"),
        (("q_proj", "embed_tokens"), "got 'embed_tokens', whose weights are tied"),
        ("lm_head", "the output layer"),
        ("q_prj", "got 'q_prj'; accepted: all-linear, or one or more of .*q_proj"),
        ("self_attn", "got 'self_attn'; accepted"),
        ((), "got none"),
    ],
)
def test_modules_that_cannot_have_adapters_are_refused_by_name(modules, message, run):
    with pytest.raises(ValueError, match=message):
        train(replace(run, lora=LoraConfig(modules=modules)))
    assert not Path(run.output).exists()


def test_modules_are_one_name_or_a_list():
    model = small_model(tied=False)
    assert modules_of(model, "q_proj") == ["q_proj"]
    assert modules_of(model, ("q_proj", "self_attn.v_proj")) == ["q_proj", "self_attn.v_proj"]
    assert modules_of(model, "embed_tokens") == ["embed_tokens"], "it is tied to nothing"
    given = {"model": "m", "targets": "t", "output": "o"}
    assert load(None, given | {"lora.modules": "q_proj"}).lora.modules == "q_proj"
    assert load(None, given | {"lora.modules": "[q_proj, v_proj]"}).lora.modules == (
        "q_proj",
        "v_proj",
    )


# ── After the last step ──────────────────────────────────────────────────────────────────────────


def test_adapters_on_an_untied_embedding_are_saved(run, tmp_path):
    base = save_model(tmp_path / "untied", tied=False)
    lora = LoraConfig(rank=4, modules=("embed_tokens", "q_proj"))
    final = train(replace(run, model=str(base), lora=lora))
    before, after = (load_file(each / "model.safetensors") for each in (base, final))
    name = "model.embed_tokens.weight"
    assert not torch.equal(before[name], after[name])


def corrupting(save):
    """Wraps `save` so that it changes the weights of the final model."""

    def save_and_corrupt(self, folder, *args, **given):
        save(self, folder, *args, **given)
        path = Path(folder) / "model.safetensors"
        if Path(folder).name.startswith("final") and path.exists():
            weights = load_file(path)
            weights["model.embed_tokens.weight"] += 1
            save_file(weights, path, metadata={"format": "pt"})

    return save_and_corrupt


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_the_configuration_of_a_tuned_model_is_the_models_own(run, tmp_path, lora):
    """The Trainer turns the cache off, and sets the padding token to the tokenizer's."""
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text()) | {"pad_token_id": None}
    path.write_text(json.dumps(config))
    assert config["use_cache"] is True
    assert tokenizer().pad_token_id is not None
    found = json.loads((train(replace(run, lora=lora)) / "config.json").read_text())
    assert found == config


def test_files_that_only_other_loaders_read_are_kept(run, tmp_path):
    """vLLM reads the first of a model with images, and llama.cpp the last."""
    given = {"preprocessor_config.json": b'{"size": 1}', "tokenizer.model": b"\x00pieces"}
    for name, content in given.items():
        (tmp_path / "base" / name).write_bytes(content)
    final = train(run)
    assert {name: (final / name).read_bytes() for name in given} == given
    assert checkpoint.verify(final).beside == ()


def test_modules_that_mamba_does_not_call_have_no_adapter(run, tmp_path):
    """It reads the weight of `dt_proj` itself: an adapter there would silently learn nothing."""
    sizes = {"vocab_size": SMALL["vocab_size"], "hidden_size": 32, "num_hidden_layers": 2}
    ends = {name: SMALL[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = AutoModelForCausalLM.from_config(MambaConfig(**sizes, **ends, state_size=4))
    model.save_pretrained(tmp_path / "mamba")
    tokenizer().save_pretrained(tmp_path / "mamba")
    config = replace(run, model=str(tmp_path / "mamba"), lora=LoraConfig(rank=2))
    for name in ("out_proj", "dt_proj"):
        with pytest.raises(ValueError, match=f"'{name}', which .* more of in_proj, x_proj\\.$"):
            train(replace(config, lora=LoraConfig(modules=name)))
    adapters = load_file(train(config) / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapters} == {"in_proj", "x_proj"}
    assert all(bool(value.any()) for value in adapters.values()), "each of them is trained"


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_saved_model_that_differs_from_the_trained_one_is_deleted_and_its_checkpoint_kept(
    lora, run, monkeypatch
):
    original_save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", corrupting(original_save))
    config = replace(run, lora=lora)
    with pytest.raises(SaveError, match=r"not the trained one.* weights are in .*checkpoint-2"):
        train(config)
    assert not (Path(run.output) / "final").exists()
    weights = "model.safetensors" if lora is None else "adapter_model.safetensors"
    assert (Path(run.output) / "checkpoint-2" / weights).exists()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", original_save)
    assert train(config).name == "final"


# ── One document per row ─────────────────────────────────────────────────────────────────────────


def test_a_model_family_that_mixes_packed_documents_is_trained_unpacked(run, tmp_path, capsys):
    torch.manual_seed(0)
    opt = AutoConfig.for_model("opt", **SMALL, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3)
    AutoModelForCausalLM.from_config(opt).save_pretrained(tmp_path / "opt")
    tokenizer().save_pretrained(tmp_path / "opt")
    config = replace(run, model=str(tmp_path / "opt"))
    planned = plan_of(config)
    assert planned.rows == planned.documents
    assert "one document a row" in planned.as_text()
    assert "computed in fp32\n" in planned.as_text()
    final = train(config)
    assert "one document a row, not packed: a document's log-prob" in capsys.readouterr().err
    packing = json.loads((final / "run.json").read_text())["data"]["packing"]
    assert packing["used"] is False
    assert packing["refused_because"]
    assert plan_of(run).not_packed_because is None


def test_a_plan_warns_where_the_cpu_has_no_bfloat16_instructions(run, monkeypatch):
    bf16 = replace(run, precision="bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert "no instructions: fp32 is many times as fast" in plan_of(bf16).as_text()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    assert plan_of(bf16).precision == "bf16"


def test_the_loss_of_an_unpacked_batch_is_the_sum_over_its_documents(store):
    rows = Rows(TargetStore(store), "train", longest=64, packing=False, seed=0)
    model, divergence = small_model("gpt2"), SFT()
    attach(model, divergence)
    together = model(**Collator(packing=False)([rows[i] for i in range(9)])).loss
    separately = sum(model(**Collator(packing=False)([rows[i]])).loss for i in range(9))
    torch.testing.assert_close(together, separately, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_padded_with_their_last_token(store, packing):
    rows = Rows(TargetStore(store), "train", longest=64, packing=packing, seed=0)
    items = sorted(
        (rows[i] for i in range(9)), key=lambda item: sum(len(d.tokens_N) for d, _ in item)
    )
    ids_BN = Collator(packing=packing)(items)["input_ids"]
    counts = [sum(len(document.tokens_N) for document, _ in item) for item in items]
    assert counts[0] < ids_BN.shape[1], "there is nothing to fill"
    for ids_N, count in zip(ids_BN, counts, strict=True):
        assert set(ids_N[count:].tolist()) <= {int(ids_N[count - 1])}


# ── Routers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "granitemoe"])
def test_the_router_loss_is_included_if_the_configuration_enables_it(kind, run, store, tmp_path):
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    losses = {}
    for with_router_loss in (True, False):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind,
            **SMALL,
            **experts,
            output_router_logits=with_router_loss,
            router_aux_loss_coef=0.7,
        )
        model, twin = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
        twin.load_state_dict(model.state_dict())
        rows = Rows(TargetStore(store), "train", longest=64, packing=False, seed=0)
        batch = Collator(packing=False)([rows[3]])
        attach(model, SFT())
        model.save_pretrained(tmp_path / f"{with_router_loss}")
        trainer = make_trainer(run, model, prepare(run).material)
        ours = trainer.compute_loss(model, batch)
        expected = twin(batch["input_ids"], labels=batch["input_ids"]).loss
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        ours.backward()
        losses[with_router_loss] = float(ours)
    assert losses[True] > losses[False] + 0.3
