"""What could not be saved is refused before the first step; what was saved is what was trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dftserve.targets.store import TargetStore
from dftserve.train.adapters import modules_of
from dftserve.train.config import LoraConfig, TrainConfig, load
from dftserve.train.data import Collator, Rows
from dftserve.train.divergences import SFT
from dftserve.train.model import attach
from dftserve.train.plan import plan_of
from dftserve.train.run import SaveError, make_trainer, prepare, train
from tests.training import SMALL, save_model, save_store, small_model, tokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return save_store(tmp_path_factory.mktemp("targets") / "store")


@pytest.fixture
def run(store, tmp_path) -> TrainConfig:
    return TrainConfig(
        model=str(save_model(tmp_path / "base")),
        targets=str(store),
        output=str(tmp_path / "run"),
        max_length=64,
        batch_size=2,
        steps=2,
        learning_rate=1e-2,
        evaluate_every=2,
        log_every=1,
    )


# ── Before the first step ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", [train, plan_of])
def test_a_generation_config_that_cannot_be_saved_ends_the_run_before_it_begins(call, run):
    path = Path(run.model) / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.7, "top_p": 0.9}))
    with pytest.raises(ValueError, match=r"cannot be saved, .*temperature.*do_sample"):
        call(run)
    assert not Path(run.output).exists()


@pytest.mark.parametrize("call", [train, plan_of])
def test_a_tokenizer_that_cannot_be_saved_likewise(call, run, monkeypatch):
    def refuse(*args, **given):
        raise TypeError("no such thing")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse)
    with pytest.raises(ValueError, match=r"cannot be saved, .*no such thing"):
        call(run)
    assert not Path(run.output).exists()


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ("embed_tokens", "tied to the output layer's"),
        (("q_proj", "embed_tokens"), "got 'embed_tokens', whose weights are tied"),
        ("lm_head", "the output layer"),
        ("q_prj", "got 'q_prj'; accepted: all-linear, or one or more of .*q_proj"),
        ("self_attn", "got 'self_attn'; accepted"),
        ((), "got none"),
    ],
)
def test_adapters_that_would_not_survive_are_refused_by_name(modules, says, run):
    with pytest.raises(ValueError, match=says):
        train(replace(run, lora=LoraConfig(modules=modules)))
    assert not Path(run.output).exists()


def test_one_name_or_a_list_of_modules():
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


# ── After the last ───────────────────────────────────────────────────────────────────────────────


def test_adapters_on_an_embedding_of_its_own_are_what_was_trained(run, tmp_path):
    base = save_model(tmp_path / "untied", tied=False)
    lora = LoraConfig(rank=4, modules=("embed_tokens", "q_proj"))
    final = train(replace(run, model=str(base), lora=lora))
    before, after = (load_file(each / "model.safetensors") for each in (base, final))
    name = "model.embed_tokens.weight"
    assert not torch.equal(before[name], after[name])


def spoiled(save):
    """As a save that changes the weights on their way."""

    def saved(self, folder, *args, **given):
        save(self, folder, *args, **given)
        path = Path(folder) / "model.safetensors"
        if Path(folder).name.startswith("final") and path.exists():
            weights = load_file(path)
            weights["model.embed_tokens.weight"] += 1
            save_file(weights, path, metadata={"format": "pt"})

    return saved


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_another_model_than_the_trained_one_is_not_kept_and_the_trained_one_is(
    lora, run, monkeypatch
):
    saved = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoiled(saved))
    config = replace(run, lora=lora)
    with pytest.raises(SaveError, match=r"not the trained one.* weights are in .*checkpoint-2"):
        train(config)
    assert not (Path(run.output) / "final").exists()
    kept = "model.safetensors" if lora is None else "adapter_model.safetensors"
    assert (Path(run.output) / "checkpoint-2" / kept).exists()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", saved)
    assert train(config).name == "final"


# ── One document a row ───────────────────────────────────────────────────────────────────────────


def test_a_family_that_does_not_keep_documents_apart_is_trained_unpacked(run, tmp_path, capsys):
    torch.manual_seed(0)
    opt = AutoConfig.for_model("opt", **SMALL, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3)
    AutoModelForCausalLM.from_config(opt).save_pretrained(tmp_path / "opt")
    tokenizer().save_pretrained(tmp_path / "opt")
    config = replace(run, model=str(tmp_path / "opt"))
    planned = plan_of(config)
    assert planned.rows == planned.documents
    assert "one document a row" in planned.shown()
    assert "computed in fp32\n" in planned.shown()
    final = train(config)
    assert "one document a row, not packed: a document's log-prob" in capsys.readouterr().err
    told = json.loads((final / "run.json").read_text())["data"]["packing"]
    assert told["used"] is False
    assert told["refused_because"]
    assert plan_of(run).not_packed_because is None


def test_a_plan_says_where_bfloat16_has_no_instructions(run, monkeypatch):
    bf16 = replace(run, precision="bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert "no instructions: fp32 is many times as fast" in plan_of(bf16).shown()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    assert plan_of(bf16).precision == "bf16"


def test_an_unpacked_batch_is_each_document_alone(store):
    rows = Rows(TargetStore(store), "train", longest=64, packing=False, seed=0)
    model, divergence = small_model("gpt2"), SFT()
    attach(model, divergence)
    together = model(**Collator(packing=False)([rows[i] for i in range(9)])).loss
    alone = sum(model(**Collator(packing=False)([rows[i]])).loss for i in range(9))
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_filled_with_a_token_of_their_own(store, packing):
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
def test_a_routers_loss_is_trained_where_the_configuration_asks_for_it(kind, run, store, tmp_path):
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    losses = {}
    for asked in (True, False):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind, **SMALL, **experts, output_router_logits=asked, router_aux_loss_coef=0.7
        )
        model, twin = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
        twin.load_state_dict(model.state_dict())
        rows = Rows(TargetStore(store), "train", longest=64, packing=False, seed=0)
        batch = Collator(packing=False)([rows[3]])
        attach(model, SFT())
        model.save_pretrained(tmp_path / f"{asked}")
        trainer = make_trainer(run, model, prepare(run).material)
        ours = trainer.compute_loss(model, batch)
        own = twin(batch["input_ids"], labels=batch["input_ids"]).loss
        torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)
        ours.backward()
        losses[asked] = float(ours)
    assert losses[True] > losses[False] + 0.3
