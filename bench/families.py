"""Which model families of transformers can be trained, end to end? With a tiny model of each.

    python bench/families.py [--only llama,mamba] [--output FILE.json]

For every causal family of the installed transformers, in its own process:
    head       logits from our chunked output layer, against the model's own, on fresh tokens
    packing    log-probabilities of a document after two different documents in its row
    steps      five optimizer steps on a target store, with the trainer
    reload     logits of the saved checkpoint, loaded by transformers, against the trained model's
The outcome of a family is `packed`, `unpacked` (trained with one document per row), `refused` with
the reason that a user would see, `failed`, or `not tried` if no tiny model could be made.

Random weights do not show what a family learns, but they show whether it is computed correctly.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from inspect import signature
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import click
import numpy as np
import target_stores
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dftserve.checkpoint import FINAL
from dftserve.fingerprints import tokenizer_fingerprint
from dftserve.targets import store
from dftserve.targets.document import Document, load_tokenizer
from dftserve.targets.ngram import Ngram
from dftserve.train import final_checkpoint
from dftserve.train.config import DivergenceConfig, TrainConfig
from dftserve.train.prepare import Prepared, make_trainer, prepare

from provenance import machine, versions

RESULT = Path(__file__).parent / "results" / "families.json"
VOCABULARY, WORDS, DOCUMENTS, STEPS = 96, 90, 24, 5
MOST_PARAMETERS = 4_000_000
"""Maximum number of parameters of a tiny model."""
SECONDS = 180
"""Time limit for one family."""
SAME = 1e-3
"""Maximum difference between two computations of the same logits, as a share of their spread."""

TINY: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("vocab_size_per_layer_input",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_dim", "emb_dim"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "dff", "dim_ff", "d_inner", "feed_forward_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_blocks", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_layers_per_stack"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_attention_heads"), 2),
    **dict.fromkeys(("swa_num_key_value_heads", "num_query_groups", "mamba_n_groups"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "d_head", "kv_channels"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "context_length"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "dense_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("index_head_dim", "index_n_heads", "index_topk"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("mamba_d_ssm", "mamba_chunk_size", "chunk_size", "moe_layer_end_index"), 64),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "router_hidden_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("pad_token_id", "sep_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("cls_token_id", "mask_token_id", "unk_token_id"), 0),
    "initializer_range": 0.1,
    "init_std": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "sliding_window": 8,
}
"""Values for the attributes of these names, where a configuration has them."""

OWN: Mapping[str, Mapping[str, Any]] = {
    "mpt": {"attn_config": {"alibi": True}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    **{key: {"head_dim": 8} for key in ("axk1", "deepseek_v3", "longcat_flash", "youtu")},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"num_attention_heads": 4, "hidden_size": 64, "rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": 64,
        "laurel_rank": 8,
        "initializer_range": 0.02,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **{key: {"layer_types": ["conv", "full_attention"]} for key in ("lfm2", "lfm2_moe")},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mimo_v2_flash": {"num_attention_heads": 4, "v_head_dim": 16, "head_dim": 16},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"]},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    **{key: {"layers_block_type": ["linear_attention", "hybrid"]} for key in ("zamba", "zamba2")},
    "zaya": {"num_experts_per_tok": 1},
}
"""Further values that single families need."""


@dataclass(frozen=True)
class Row:
    """The outcome of a family."""

    family: str
    model: str
    outcome: str
    reason: str | None = None
    parameters: int | None = None
    head: float | None = None
    """The largest difference of logits, as a share of their spread."""
    packing: float | None = None
    """The largest change of logits with the preceding document, likewise; None if not packed."""
    reload: float | None = None
    loss: tuple[float, float] | None = None
    """Loss of the first and the last step, in nats per token."""


@click.command()
@click.option("--only", help="Families, separated by commas; the output's other rows are kept.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULT)
def main(only: str | None, output: Path) -> None:
    families = only.split(",") if only else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    start = time.monotonic()
    with TemporaryDirectory() as folder:
        # Imports what the trainer needs, so that the forked process of each family has it.
        row_of("llama", Path(folder))
        rows = []
        for family in families:
            rows.append(isolated_row_of(family))
            click.echo(f"{family:24}{rows[-1].outcome:10}{rows[-1].reason or ''}"[:160], err=True)
    document = {
        "machine": machine(),
        "versions": versions("transformers"),
        "steps": STEPS,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "outcomes": {},
        "rows": [asdict(row) for row in rows],
    }
    if only and output.exists():
        document = merged(json.loads(output.read_text()), document)
    document["outcomes"] = dict(Counter(row["outcome"] for row in document["rows"]))
    output.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps(document["outcomes"]))


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The rows of both documents, the newer one of each family.

    Raises:
        ClickException: `before` was made with other versions, so the rows cannot share a table.
    """
    for name in ("versions", "steps"):
        if before[name] != now[name]:
            raise click.ClickException(
                f"{name}: the output has {before[name]}, this run {now[name]}; run all families, "
                "or name another --output."
            )
    newer = {row["family"]: row for row in now["rows"]}
    rows = [newer.pop(row["family"], row) for row in before["rows"]]
    return {**before, "rows": [*rows, *newer.values()]}


def isolated_row_of(family: str) -> Row:
    """The family's row, from a child process, whose crash or hang does not affect the others."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, theirs))
    process.start()
    theirs.close()
    row = None
    with suppress(EOFError):
        if ours.poll(SECONDS):
            row = ours.recv()
    if row is None:
        process.kill()
    process.join()
    name = class_name(family)
    return row or Row(family, name, "failed", f"its process ended with {process.exitcode}")


def _child(family: str, answer: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sink = Path(os.devnull).open("w")  # noqa: SIM115
    with redirect_stdout(sink), redirect_stderr(sink), TemporaryDirectory() as folder:
        os.dup2(sink.fileno(), 2)
        answer.send(row_of(family, Path(folder)))
    answer.close()
    os._exit(0)


def row_of(family: str, folder: Path) -> Row:
    name = class_name(family)
    try:
        model = tiny(family)
    except Exception as error:  # noqa: BLE001
        return Row(family, name, "not tried", f"no tiny model: {_line(error)}")
    parameters = sum(value.numel() for value in model.parameters())
    try:
        model.save_pretrained(folder / "base")
        tokenizer().save_pretrained(folder / "base")
    except Exception as error:  # noqa: BLE001
        why = f"transformers does not save a random one: {_line(error)}"
        return Row(family, name, "not tried", why, parameters)
    del model
    config = config_of(save_store(folder), folder)
    try:
        prepared = prepare(config)
    except ValueError as error:
        reason = str(error).replace(str(folder / "base"), "the model")
        return Row(family, name, "refused", reason, parameters)
    try:
        return trained(family, parameters, config, prepared, folder)
    except Exception as error:  # noqa: BLE001
        print(traceback.format_exc(), file=sys.__stdout__)
        return Row(family, name, "failed", _line(error), parameters)


def class_name(family: str) -> str:
    given = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return given if isinstance(given, str) else given[0]


def tiny(family: str) -> Any:
    """A small random model of the family.

    Raises:
        ValueError: it takes images or sound, or cannot be made small enough.
    """
    torch.manual_seed(0)
    kind: Any = CONFIG_MAPPING[family]
    known = kind().to_dict()
    parts = [name for name in known if name.endswith("_config") and name not in OWN.get(family, {})]
    parts = [name for name in parts if isinstance(known[name], dict) and name != "rope_config"]
    inner = [name for name in parts if "model_type" in known[name]]
    if inner:
        raise ValueError(f"it has {', '.join(inner)}; its text model is a family of its own")
    given = {name: TINY[name] for name in TINY if name in known or name in kind.attribute_map}
    kinds = list(dict.fromkeys(known.get("layer_types") or ()))
    if len(kinds) > 1:
        # One layer of each kind.
        given |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    config = kind(**{**given, **OWN.get(family, {})})
    with torch.device("meta"):
        count = sum(v.numel() for v in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters at the smallest tried")
    return AutoModelForCausalLM.from_config(config).eval()


def config_of(targets: Path, folder: Path) -> TrainConfig:
    return TrainConfig(
        model=str(folder / "base"),
        targets=str(targets),
        output=str(folder / "run"),
        divergence=DivergenceConfig(name="forward_kl"),
        steps=STEPS,
        max_length=64,
        batch_size=2,
        learning_rate=1e-3,
        schedule="constant",
        log_every=1,
    )


def trained(
    family: str, parameters: int, config: TrainConfig, prepared: Prepared, folder: Path
) -> Row:
    language_model = prepared.loaded.language_model
    ids_BN = torch.randint(2, WORDS, (2, 23), generator=torch.Generator().manual_seed(5))
    head = head_gap(language_model, ids_BN)
    is_packed = prepared.not_packed_because is None
    packing = packing_gap(language_model, ids_BN) if is_packed else None
    trainer = make_trainer(config, prepared.loaded.model, prepared.material)
    trainer.args.save_strategy = "no"
    trainer.train()
    losses = [line["divergence"] for line in trainer.state.log_history if "divergence" in line]
    language_model.model.eval()
    final_checkpoint.write(folder / FINAL, config, prepared, steps=STEPS, metrics={})
    again = AutoModelForCausalLM.from_pretrained(folder / FINAL, dtype=torch.float32).eval()
    with torch.no_grad():
        # Without a cache, as in training: some families do not support one for so few layers.
        given = {"use_cache": False} if "use_cache" in signature(again.forward).parameters else {}
        reload = gap(again(ids_BN, **given).logits, language_model.own_logits(input_ids=ids_BN))
    gaps = {"head": head, "packing": packing or 0.0, "reload": reload}
    wrong = [f"{name}: {value:.2g} of the spread" for name, value in gaps.items() if value > SAME]
    return Row(
        family,
        class_name(family),
        "failed" if wrong else "packed" if is_packed else "unpacked",
        "; ".join(wrong) or prepared.not_packed_because,
        parameters,
        head,
        packing,
        reload,
        (losses[0], losses[-1]),
    )


@torch.no_grad()
def head_gap(language_model: Any, ids_BN: torch.Tensor) -> float:
    hidden_BND = language_model.states(input_ids=ids_BN).hidden_BND
    ours_BNV = language_model.head.logits(hidden_BND.reshape(*ids_BN.shape, -1))
    return gap(ours_BNV, language_model.own_logits(input_ids=ids_BN))


@torch.no_grad()
def packing_gap(language_model: Any, ids_BN: torch.Tensor) -> float:
    """Compares the logits of the same second half after two different first halves."""
    half = ids_BN.shape[1] // 2
    ids_BN = torch.cat([ids_BN[:, :half], ids_BN[:1, half:].expand(2, -1)], dim=1)
    rest = ids_BN.shape[1] - half
    positions_BN = torch.cat([torch.arange(half), torch.arange(rest)]).expand(2, -1)
    hidden_BND = language_model.states(input_ids=ids_BN, position_ids=positions_BN).hidden_BND
    logits_BNV = language_model.head.logits(hidden_BND.reshape(*ids_BN.shape, -1))[:, half:]
    return gap(logits_BNV[0], logits_BNV[1])


def gap(ours: torch.Tensor, own: torch.Tensor) -> float:
    """The largest difference, as a share of the spread of a position's logits."""
    spread = float(own.float().std(dim=-1).mean())
    return float((ours.float() - own.float()).abs().max()) / max(spread, 1e-12)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, WORDS)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")


def save_store(folder: Path) -> Path:
    """A store of documents that mostly count upwards, with an n-gram target.

    Its fingerprint is that of the saved tokenizer as transformers loads it, which for some families
    adds tokens.
    """
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(folder / "base")))
    folder = folder / "targets"
    random = np.random.default_rng(0)
    splits = {split: [random_document(random) for _ in range(DOCUMENTS)] for split in store.SPLITS}
    source = Ngram(splits["train"], vocabulary=WORDS, order=2, min_count=1)
    target_stores.write(folder, source, splits, tokenizer=fingerprint)
    return folder


def random_document(random: np.random.Generator) -> Document:
    steps_N = np.where(random.random(random.integers(8, 40)) < 0.2, 7, 1)
    tokens_N = 2 + (random.integers(0, WORDS) + steps_N.cumsum()) % (WORDS - 2)
    trained_N = np.ones(len(tokens_N), dtype=bool)
    trained_N[0] = False
    return Document(tokens_N.astype(np.int32), trained_N)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


if __name__ == "__main__":
    main()
