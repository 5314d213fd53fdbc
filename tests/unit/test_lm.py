"""A model gives the same results as its own forward, or is refused with a reason."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dftserve.evaluate.metrics.likelihood import token_nats
from dftserve.lm import LanguageModel
from dftserve.pretrained import ModelFiles, _warn_float32, dtype_for, examine, load
from dftserve.targets.run import Job, build
from dftserve.train.config import TrainConfig
from dftserve.train.plan import plan_of
from dftserve.train.prepare import prepare
from dftserve.train.run import train
from tests.training import SMALL, VOCABULARY, save_model, save_store, small_model, tokenizer

RESCALED = {
    "falcon_h1": {"lm_head_multiplier": 0.25, "head_dim": 16, "mamba_d_ssm": 32, "mamba_n_heads": 2,
                  "mamba_d_state": 8, "mamba_d_head": 16},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "head_dim": 16, "lru_width": 32,
                        "block_types": ["recurrent", "attention"]},
    "hyperclovax": {"logits_scaling": 0.25, "head_dim": 16},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "mpt": {"logit_scale": "inv_sqrt_d_model", "d_model": 32, "n_heads": 2, "n_layers": 2},
    "minicpm3": {"num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
                 "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "llama4_text": {"head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 2},
}  # fmt: skip
LEAKING = {
    "gpt_oss": {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bloom": {"n_head": 2, "n_layer": 2},
}


def family(kind: str, **given):
    """A model whose logits vary enough to detect an omitted cap or scale."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **{**SMALL, "initializer_range": 0.3, "init_std": 0.3, **given}
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", RESCALED)
def test_logits_of_chunks_are_the_models_own(kind):
    model = family(kind, **RESCALED[kind])
    ids_BN = torch.randint(2, VOCABULARY, (2, 11))
    with torch.no_grad():
        own_BNV = model(ids_BN).logits
        wrapped = LanguageModel(model, "m")
        ours_BNV = wrapped.head.logits(wrapped.states(input_ids=ids_BN).hidden_BND)
    torch.testing.assert_close(ours_BNV, own_BNV, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(ids_BN).logits, own_BNV), "the model is unchanged"


def test_an_unknown_factor_on_the_logits_is_refused():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args, **given):
            output = super().forward(*args, **given)
            output.logits = output.logits * 1.5
            return output

    with pytest.raises(ValueError, match=r"m \(Odd\) computes its logits in an unsupported way"):
        LanguageModel(Odd(small_model().config), "m")


def test_a_second_use_of_the_output_layer_is_refused():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args, **given):
            output = super().forward(*args, **given)
            output.logits = self.lm_head(self.model(args[0] if args else given["input_ids"])[0])
            return output

    with pytest.raises(ValueError, match="by 2 uses of an output layer"):
        LanguageModel(Odd(small_model().config), "m")


def test_a_model_that_is_not_causal_is_refused():
    model = family("bert", is_decoder=False)
    with pytest.raises(ValueError, match=r"m \(BertLMHeadModel\) is not causal: another ending"):
        LanguageModel(model, "m")


@pytest.mark.parametrize("kind", LEAKING)
def test_a_family_that_mixes_packed_documents_is_detected(kind):
    assert LanguageModel(family(kind, **LEAKING[kind]), "m").packing_leak() is not None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "cohere"])
def test_a_family_that_separates_packed_documents_is_packed(kind):
    assert LanguageModel(small_model(kind), "m").packing_leak() is None


CHUNKED = {"attention_chunk_size": 64, "layer_types": ["chunked_attention", "full_attention"]}
LONGROPE = {
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize(
    ("kind", "given"),
    [("llama4_text", {**RESCALED["llama4_text"], **CHUNKED}), ("phi3", LONGROPE)],
    ids=["attention in chunks", "positions rescaled"],
)
def test_leaks_that_depend_on_length_are_found_at_the_runs_lengths(kind, given):
    model = LanguageModel(family(kind, **given), "m")
    assert model.packing_leak() is None
    assert model.packing_leak(100, 200) is not None


def test_attention_chunks_longer_than_a_document_still_leak_in_a_packed_row():
    """Also if the lengths of row, chunk and document are powers of two, as is common."""
    model = LanguageModel(family("llama4_text", **RESCALED["llama4_text"], **CHUNKED), "m")
    assert model.packing_leak(32, 256) is not None


def test_a_text_whose_result_depends_on_a_longer_text_in_its_batch_is_refused(tmp_path):
    model = family("phi3", **LONGROPE)
    LanguageModel(model, "m").check_batch(64)
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    store = save_store(tmp_path / "store", longest=120)
    run = TrainConfig(model=str(base), targets=str(store), output=str(tmp_path / "run"))
    message = r"with one of .*original_max_position_embeddings: 64.* batch_size 1"
    for call in (train, plan_of):
        with pytest.raises(ValueError, match=message):
            call(replace(run, max_length=128))
    assert not (tmp_path / "run").exists()
    assert prepare(replace(run, max_length=64)).not_packed_because is None
    assert "others in its row" in (prepare(replace(run, batch_size=1)).not_packed_because or "")


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (
            "llama4_text",
            {**RESCALED["llama4_text"], **CHUNKED},
            "_chunk_size is 64, .*200",
        ),
        ("phi3", LONGROPE, "original_max_position_embeddings is 64, .*100"),
    ],
    ids=["attention in chunks", "positions rescaled"],
)
def test_leaks_beyond_the_length_that_is_tried_are_found_in_the_configuration(kind, given, message):
    model = LanguageModel(family(kind, **given), "m")
    assert re.search(message, model.packing_leak(100, 200, most=60) or "")
    assert model.packing_leak(24, 60, most=60) is None


def test_a_batch_longer_than_the_length_that_is_tried_is_refused_by_the_configuration():
    model = LanguageModel(family("phi3", **LONGROPE), "m")
    model.check_batch(64, most=60)
    with pytest.raises(ValueError, match=r"with one of 65 .*original_max.*: 64.* batch_size 1"):
        model.check_batch(65, most=60)


def test_checks_respect_their_length_limit():
    seen, model = [], small_model()
    model.model.embed_tokens.register_forward_pre_hook(
        lambda layer, given: seen.append(given[0].shape[1])
    )
    model = LanguageModel(model, "m")
    assert model.packing_leak(500, 1000, most=100) is None
    model.check_batch(500, most=100)
    assert max(seen) == 100


BOUNDED = {
    "whisper": {"max_target_positions": 64, "d_model": 32, "decoder_layers": 2,
                "encoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
    "mpt": {"max_seq_len": 64, "d_model": 32, "n_heads": 2, "n_layers": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", BOUNDED)
def test_limits_of_positions_under_other_names_are_respected(kind, tmp_path):
    config = transformers.AutoConfig.for_model(kind, **BOUNDED[kind])
    with pytest.raises(ValueError, match="accepted: max_length of at most 64"):
        ModelFiles(tmp_path, "m", config).check_length(65, "max_length")


def test_limits_of_positions_that_no_configuration_names_are_found_before_the_first_step():
    class Short(transformers.LlamaForCausalLM):
        def forward(self, *args, **given):
            if given["input_ids"].shape[1] > 100:
                raise IndexError("index out of range in self")
            return super().forward(*args, **given)

    model = LanguageModel(Short(small_model().config), "m")
    model.check_batch(100)
    for check in (model.check_batch, model.packing_leak):
        with pytest.raises(ValueError, match=r"does not read .*: IndexError: index out of range"):
            check(101)


# ── Refusals before any work ─────────────────────────────────────────────────────────────────────


def edit(folder: Path, name: str, **changes) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def remove_tensor(folder: Path, tensor: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[tensor]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def quantise(method):
    return lambda folder: edit(folder, "config.json", quantization_config={"quant_method": method})


def add_tokens(folder: Path) -> None:
    larger = tokenizer()
    larger.add_tokens([f"new{i}" for i in range(9)])
    larger.save_pretrained(folder)


EARLY = {
    "bitsandbytes": (quantise("bitsandbytes"), "quantised .*bitsandbytes"),
    "gptq": (quantise("gptq"), "quantised .*gptq"),
    "awq": (quantise("awq"), "quantised .*awq"),
    "fp8": (quantise("fp8"), "quantised .*fp8"),
    "compressed-tensors": (quantise("compressed-tensors"), "quantised .*compressed-tensors"),
    "truncated": (truncate, "cut short"),
    "custom code": (
        lambda folder: edit(
            folder, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"}
        ),
        "code of its own .*never runs",
    ),
    "no such family": (
        lambda folder: edit(folder, "config.json", model_type="mine"),
        "model_type 'mine'",
    ),
    "damaged configuration": (
        lambda folder: edit(folder, "config.json", num_attention_heads=5),
        r"base/config\.json: transformers cannot use it \(.*attention heads.*correct it",
    ),
    "tokens": (add_tokens, f"{VOCABULARY + 9} tokens and its embedding {VOCABULARY}"),
    "no folder": (shutil.rmtree, "there is no such folder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return save_store(tmp_path_factory.mktemp("targets") / "store")


@pytest.mark.parametrize("kind", EARLY)
def test_every_command_refuses_an_unusable_model_and_writes_nothing(
    kind, store, tmp_path, monkeypatch
):
    """And does not load weights, read a corpus or contact the hub first."""
    base = save_model(tmp_path / "base")
    damage, message = EARLY[kind]
    damage(base)

    def never(*args, **given):
        raise AssertionError("work was begun")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    monkeypatch.setattr("dftserve.targets.run.read_all", never)
    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    monkeypatch.setattr("dftserve.targets.store.TargetStore.__getitem__", never)
    run = TrainConfig(model=str(base), targets=str(store), output=str(tmp_path / "run"))
    job = Job(corpus=tmp_path / "corpus", model=str(base), recipe="creative", out=tmp_path / "out")
    for call in (
        lambda: train(run),
        lambda: plan_of(run),
        lambda: build(job, lambda line: None),
        lambda: token_nats(base, ["w1 w2"]),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            call()
        assert "trust_remote_code" not in str(refused.value)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


def test_a_teacher_is_refused_before_the_corpus_is_read(tmp_path, monkeypatch):
    base, teacher = save_model(tmp_path / "base"), save_model(tmp_path / "teacher")
    quantise("awq")(teacher)
    monkeypatch.setattr("dftserve.targets.run.read_all", lambda *_: pytest.fail("read"))
    job = Job(
        corpus=tmp_path / "corpus",
        model=str(base),
        recipe="creative",
        out=tmp_path / "out",
        values={"teacher": str(teacher)},
    )
    with pytest.raises(ValueError, match="teacher is quantised"):
        build(job, lambda line: None)


def test_a_native_family_with_custom_code_is_loaded_without_that_code(tmp_path):
    base = save_model(tmp_path / "base")
    edit(base, "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (base / "evil.py").write_text("raise SystemExit('ran')")
    assert type(load(examine(base), dtype=torch.float32)).__name__ == "LlamaForCausalLM"


BF16 = {"avx512_bf16": True}


@pytest.mark.parametrize(
    ("capabilities", "stored", "requested", "loaded"),
    [
        ({}, "bfloat16", "auto", torch.float32),
        ({}, "float16", "auto", torch.float32),
        ({"avx512_bf16": False}, "bfloat16", "auto", torch.float32),
        (BF16, "bfloat16", "auto", torch.bfloat16),
        ({"amx_bf16": True}, "bfloat16", "auto", torch.bfloat16),
        ({}, "float64", "auto", torch.float64),
        ({}, "bfloat16", "bfloat16", torch.bfloat16),
        ({}, "bfloat16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_auto_is_float32_on_a_cpu_without_bfloat16_instructions(
    capabilities, stored, requested, loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    small_model().to(getattr(torch, stored)).save_pretrained(tmp_path)
    examined = examine(tmp_path)
    assert load(examined, dtype=requested).dtype is loaded
    on_gpu = dtype_for(examined, requested, "cuda")
    assert on_gpu == requested, "a GPU keeps the weights' own dtype"


def test_float32_in_place_of_auto_is_logged_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    _warn_float32.cache_clear()
    small_model().to(torch.bfloat16).save_pretrained(tmp_path)
    examined = examine(tmp_path)
    for dtype in ("auto", "auto", "float32"):
        dtype_for(examined, dtype, "cpu")
    assert [record.name for record in caplog.records] == ["dftserve.pretrained"]
    assert "are loaded in float32" in caplog.text


def test_a_model_is_loaded_without_a_warning(tmp_path, monkeypatch, caplog):
    for name in ("transformers", "dftserve"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    load(examine(save_model(tmp_path / "base", tied=True)), dtype=torch.float32)
    assert not caplog.records


def test_an_adapter_next_to_the_weights_is_refused(tmp_path):
    """transformers would add it to the weights, which their digest does not cover."""
    base = save_model(tmp_path / "base", tied=True)
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).save_pretrained(base)
    with pytest.raises(ValueError, match=r"has an adapter_config\.json.*Merge the adapter"):
        examine(base)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_lack_a_tensor_are_refused_with_its_name(tied, tmp_path):
    base = save_model(tmp_path / "base", tied=tied)
    load(examine(base), dtype=torch.float32)
    remove_tensor(base, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        load(examine(base), dtype=torch.float32)


def test_unused_weights_are_refused_with_their_names(tmp_path):
    base = save_model(tmp_path / "base")
    edit(base, "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"does not use: model\.layers\.1"):
        load(examine(base), dtype=torch.float32)


def test_weights_of_another_shape_are_refused_with_both_shapes(tmp_path, capfd):
    base = save_model(tmp_path / "base")
    edit(base, "config.json", intermediate_size=64)
    with pytest.raises(
        ValueError, match=r"mlp\.down_proj\.weight is 32 × 48 in its weights"
    ) as error:
        load(examine(base), dtype=torch.float32)
    assert "32 × 64 by its config.json (and 5 more)" in str(error.value)
    assert str(error.value).startswith(str(base))
    assert "MISMATCH" not in capfd.readouterr().err


def test_a_family_that_zeroes_a_loaded_row_is_refused_with_a_remedy(tmp_path):
    """Youtu's initialiser zeroes the padding token's row of a model that was loaded."""
    torch.manual_seed(0)
    small = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16, "qk_nope_head_dim": 8}
    given = {**SMALL, **small, "qk_rope_head_dim": 8, "pad_token_id": 3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("youtu", **given))
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 1.0
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'padding token, 3, .* to zero.*"pad_token_id": null'):
        load(examine(tmp_path), dtype=torch.float32)
    edit(tmp_path, "config.json", pad_token_id=None)
    loaded = load(examine(tmp_path), dtype=torch.float32)
    assert bool((loaded.get_input_embeddings().weight[3] == 1.0).all())


def test_a_missing_shard_is_refused_by_name(tmp_path):
    base = tmp_path / "base"
    small_model().save_pretrained(base, max_shard_size="20KB")
    tokenizer().save_pretrained(base)
    examine(base)
    next(base.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"no model-00002.* which model\.safetensors\.index\.json"):
        examine(base)


def test_documents_longer_than_the_positions_are_refused_before_the_weights(store, tmp_path):
    base = save_model(tmp_path / "base", "gpt2")
    edit(base, "config.json", n_positions=16)
    run = TrainConfig(model=str(base), targets=str(store), output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="accepted: max_length of at most 16"):
        train(run)
    assert not (tmp_path / "run").exists()
