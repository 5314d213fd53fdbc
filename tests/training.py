"""Small fixtures for tests of training: a tokenizer, models of several families, a store."""

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from dftserve import checkpoint
from dftserve.fingerprints import tokenizer_fingerprint
from dftserve.targets import store
from dftserve.targets.document import Document
from dftserve.targets.encoding import encode_text
from dftserve.targets.source import DenseSource
from dftserve.train.config import StoreConfig, TrainConfig

WORDS = [f"w{i}" for i in range(89)]
VOCABULARY = len(WORDS) + 2

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": VOCABULARY}

FAMILIES = {
    "llama": lambda tied: LlamaConfig(**SMALL, tie_word_embeddings=tied),
    "gpt2": lambda tied: GPT2Config(
        **GPT2, eos_token_id=1, pad_token_id=0, bos_token_id=None, tie_word_embeddings=tied
    ),
    "qwen3": lambda tied: Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=tied),
    "gemma2": lambda tied: Gemma2Config(
        **SMALL,
        head_dim=16,
        sliding_window=8,
        final_logit_softcapping=3.0,
        tie_word_embeddings=tied,
    ),
    "mistral": lambda tied: MistralConfig(**SMALL, sliding_window=8, tie_word_embeddings=tied),
    "cohere": lambda tied: CohereConfig(**SMALL, logit_scale=0.3, tie_word_embeddings=tied),
}


def save_config(config: TrainConfig, path: Path) -> Path:
    """Save a config file for `dftserve train`, with the default divergence and without LoRA."""
    content = {k: v for k, v in asdict(config).items() if k not in ("divergence", "lora")}
    path.write_text(json.dumps(content))
    return path


def small_run(
    model: Path, targets: Path | tuple[StoreConfig, ...], output: Path, **changed: Any
) -> TrainConfig:
    """A run of six steps that evaluates, saves and logs on the way, with settings `changed`."""
    run = TrainConfig(
        model=str(model),
        targets=str(targets) if isinstance(targets, Path) else targets,
        output=str(output),
        max_length=64,
        batch_size=2,
        steps=6,
        learning_rate=1e-2,
        save_every=2,
        evaluate_every=3,
        log_every=1,
    )
    return replace(run, **changed)


def save_sealed(folder: Path, files: Mapping[str, str]) -> Path:
    """Save files as a sealed checkpoint, with valid checksums but no model."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    checkpoint.seal(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<end>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")


def small_model(family: str = "llama", *, tied: bool = True, seed: int = 0):
    torch.manual_seed(seed)
    config = FAMILIES[family](tied)
    config._attn_implementation = "eager" if family == "gemma2" else "sdpa"
    return AutoModelForCausalLM.from_config(config).eval()


def save_model(folder: Path, family: str = "llama", **given) -> Path:
    small_model(family, **given).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def documents(count: int, *, seed: int = 0, longest: int = 40) -> list[Document]:
    """Random documents in which each word is mostly followed by the next of the list, so that there
    is something to learn."""
    source = random.Random(seed)

    def text() -> str:
        indices = [source.randrange(len(WORDS))]
        for _ in range(source.randint(1, longest)):
            jump = source.random() < 0.2
            indices.append(source.randrange(len(WORDS)) if jump else indices[-1] + 1)
        return " ".join(WORDS[index % len(WORDS)] for index in indices)

    return [encode_text(tokenizer(), text()) for _ in range(count)]


def save_texts(folder: Path, count: int, *, words: int = 60) -> Path:
    """Save text files of runs through the list of words, from random starts."""
    folder.mkdir()
    source = random.Random(0)
    for i in range(count):
        indices = [source.randrange(len(WORDS))]
        while len(indices) < words:
            jump = source.random() < 0.5
            indices.append(source.randrange(len(WORDS)) if jump else indices[-1] + 1)
        text = " ".join(WORDS[index % len(WORDS)] for index in indices)
        (folder / f"{i:02}.txt").write_text(text)
    return folder


class Noise(DenseSource):
    """A random target, deterministic for each document."""

    vocabulary = VOCABULARY

    def describe(self):
        return {"kind": "noise"}

    def read(self, documents):
        return [self._rows(document) for document in documents]

    def _rows(self, document):
        generator = torch.Generator().manual_seed(int(document.tokens_N.sum()))
        shape = (len(document.positions_T), VOCABULARY)
        logprobs_TV = (2 * torch.randn(shape, generator=generator)).log_softmax(dim=1)
        return lambda start, stop: logprobs_TV[start:stop]


def save_store(
    folder: Path, *, count: int = 60, heldout: int = 8, seed: int = 0, longest: int = 40
) -> Path:
    splits = {
        "train": documents(count, seed=seed, longest=longest),
        "heldout": documents(heldout, seed=seed + 1, longest=longest),
    }
    source = Noise()
    plan = store.plan(
        source,
        splits,
        tokenizer=tokenizer_fingerprint(tokenizer()),
        template=None,
        corpus={},
        k=6,
        draws=6,
        seed=seed,
    )
    store.write(folder, plan, source, splits)
    return folder
