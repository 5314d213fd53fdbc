"""What a target without a teacher is worth on real prose: bits per byte of unseen authors.

    DFTSERVE_DATA=path/to/data OMP_NUM_THREADS=1 python bench/real_text.py
    python bench/real_text.py --tokens 1000000     # adds this size to the results of others

A small model is trained on .1M and 1M tokens of public-domain novels, by plain fine-tuning, with
label smoothing, and toward the `ngram` target mixed with the text at two weights. Early stopping
and the choice of the temperature use the text of other authors; the score is on the text of a third
group of authors. Seeds determine the training documents and the initial weights; the methods share
both for each seed, so the differences are paired. Prints a table, then one JSON document, which is
also written to bench/results after every run.
"""

import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np
import target_stores
import torch
from scipy.stats import t as student
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from dftserve.corpus.prepare import cut
from dftserve.corpus.read import read
from dftserve.corpus.text import Text
from dftserve.fingerprints import tokenizer_fingerprint
from dftserve.lm import LanguageModel
from dftserve.pretrained import examine, load
from dftserve.targets import store
from dftserve.targets.document import Document
from dftserve.targets.encoding import encode_text
from dftserve.targets.ngram import Ngram
from dftserve.train.config import DivergenceConfig, TrainConfig
from dftserve.train.data import Collator, Rows, model_inputs
from dftserve.train.run import train

from provenance import machine, versions

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "real_text.json"

VALIDATION_AUTHORS, TEST_AUTHORS = 3, 4
VOCABULARY, LONGEST, WORDS = 2048, 256, 180
EPOCHS = {100_000: 8.0, 1_000_000: 2.0}
DOCUMENTS = {"heldout": 100, "test": 240}
"""Numbers of documents by authors that are not trained on, drawn once."""
METHODS: Mapping[str, DivergenceConfig] = {
    "sft": DivergenceConfig(name="sft"),
    "label smoothing .1": DivergenceConfig(name="label_smoothing", epsilon=0.1),
    "ngram, weight .3": DivergenceConfig(name="forward_kl", target_weight=0.3),
    "ngram, weight .6": DivergenceConfig(name="forward_kl", target_weight=0.6),
}
TEMPERATURES = tuple(round(0.8 + 0.05 * step, 2) for step in range(9))


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────


def authors() -> dict[str, list[Text]]:
    """Documents of about WORDS words, by file; each file is a novel."""
    data = os.environ.get("DFTSERVE_DATA")
    if data is None or not (Path(data) / "prose").is_dir():
        raise click.UsageError("DFTSERVE_DATA is not set to a folder that contains prose/.")
    found = {text.origin: cut(text, WORDS) for text in read(Path(data) / "prose")}
    return {name: found[name] for name in sorted(found)}


def divided(found: Mapping[str, list[Text]]) -> dict[str, list[str]]:
    """Training, validation and test text, split by book, in the same way for every seed."""
    names = random.Random(0).sample(list(found), len(found))
    sides = {
        "test": names[:TEST_AUTHORS],
        "heldout": names[TEST_AUTHORS : TEST_AUTHORS + VALIDATION_AUTHORS],
        "train": names[TEST_AUTHORS + VALIDATION_AUTHORS :],
    }
    texts = {side: [t.content for n in of for t in found[n]] for side, of in sides.items()}
    few = {side: random.Random(1).sample(texts[side], count) for side, count in DOCUMENTS.items()}
    return texts | few


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def drawn(documents: Sequence[Document], tokens: int, seed: int) -> list[Document]:
    """Documents in random order, until they have `tokens` tokens."""
    chosen, count = [], 0
    for document in random.Random(seed).sample(list(documents), len(documents)):
        chosen.append(document)
        count += len(document.tokens_N)
        if count >= tokens:
            return chosen
    raise click.UsageError(f"the training text has {count} tokens; --tokens asks for {tokens}.")


# ── One run ──────────────────────────────────────────────────────────────────────────────────────


def start(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_store(
    folder: Path, tokenizer: PreTrainedTokenizerFast, sides: Mapping[str, Sequence[Document]]
) -> None:
    source = Ngram(sides["train"], vocabulary=VOCABULARY, order=5)
    target_stores.write(folder, source, sides, tokenizer=tokenizer_fingerprint(tokenizer))


def run(place: Path, method: DivergenceConfig, tokens: int, seed: int) -> Path:
    """Train, and return the checkpoint with the best validation loss."""
    output = place / "run"
    shutil.rmtree(output, ignore_errors=True)
    steps_of_epoch = math.ceil(tokens / LONGEST / 8)
    return train(
        TrainConfig(
            model=str(place / "start"),
            targets=str(place / "targets"),
            output=str(output),
            divergence=method,
            epochs=EPOCHS.get(tokens, 3.0),
            max_length=LONGEST,
            batch_size=8,
            learning_rate=4e-3,
            warmup=0.05,
            weight_decay=0.1,
            evaluate_every=steps_of_epoch if tokens < 500_000 else steps_of_epoch // 4,
            patience=3,
            keep=1,
            log_every=10_000,
            seed=seed,
        )
    )


@torch.no_grad()
def nats(folder: Path, rows: Rows, temperatures: Sequence[float]) -> np.ndarray:
    """Σ −ln p of the rows' tokens, for each temperature."""
    model = load(examine(folder), dtype=torch.float32)
    language_model, total = LanguageModel(model, str(folder)), np.zeros(len(temperatures))
    for batch in DataLoader(rows, batch_size=16, collate_fn=Collator()):  # type: ignore[arg-type]
        hidden_TD = language_model.states(**model_inputs(batch)).hidden_BND.flatten(0, 1)
        logits_TV = language_model.head.logits(hidden_TD[batch["positions_T"]])
        for index, temperature in enumerate(temperatures):
            total[index] += float(
                torch.nn.functional.cross_entropy(
                    logits_TV / temperature, batch["labels_R"], reduction="sum"
                )
            )
    return total


def score(
    folder: Path, targets: store.TargetStore, test: Rows, test_bytes: int
) -> dict[str, float]:
    """Bits per byte on the test text, at temperature 1 and at the best one on validation text."""
    validation = Rows(targets, "heldout", longest=LONGEST, packing=True, seed=0)
    best = TEMPERATURES[int(nats(folder, validation, TEMPERATURES).argmin())]
    plain, tuned = nats(folder, test, (1.0, best)) / math.log(2) / test_bytes
    return {
        "bits_per_byte": float(tuned),
        "at_temperature_1": float(plain),
        "temperature": best,
    }


# ── The bench ────────────────────────────────────────────────────────────────────────────────────


def interval(values: Sequence[float]) -> dict[str, float]:
    """The mean with its 95 % t interval over seeds."""
    mean, count = float(np.mean(values)), len(values)
    reach = float(student.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5)
    return (
        {"mean": mean, "low": mean - reach, "high": mean + reach} if count > 1 else {"mean": mean}
    )


def summary(runs: Sequence[Mapping]) -> dict[str, dict]:
    """Bits per byte, and the paired difference from SFT, by size and method."""
    found: dict[str, dict] = {}
    for tokens in sorted({each["tokens"] for each in runs}):
        of = {(r["method"], r["seed"]): r["bits_per_byte"] for r in runs if r["tokens"] == tokens}
        seeds = [s for s in sorted({s for _, s in of}) if all((m, s) in of for m in METHODS)]
        if not seeds:
            continue
        found[str(tokens)] = {
            method: {
                "bits_per_byte": interval([of[method, s] for s in seeds]),
                "less_than_sft": interval([of["sft", s] - of[method, s] for s in seeds]),
                "seeds": len(seeds),
            }
            for method in METHODS
        }
    return found


def write(runs: Sequence[Mapping], sides: Mapping[str, int]) -> str:
    document = {
        "bench": "real_text",
        "versions": versions("transformers", "numpy"),
        "machine": machine(),
        "characters": sides,
        "vocabulary": VOCABULARY,
        "summary": summary(runs),
        "runs": runs,
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text + "\n", encoding="utf-8")
    return text


def known() -> list[dict]:
    """The runs of earlier calls: each size takes about an hour and may be measured on its own."""
    return json.loads(RESULT.read_text(encoding="utf-8"))["runs"] if RESULT.exists() else []


@click.command()
@click.option("--tokens", "sizes", type=int, multiple=True, default=(100_000, 1_000_000))
@click.option("--seeds", default=5, show_default=True)
def main(sizes: tuple[int, ...], seeds: int) -> None:
    """Bits per byte of unseen authors, with and without n-gram targets."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    texts = divided(authors())
    tokenizer = train_tokenizer(texts["train"])
    documents = {side: [encode_text(tokenizer, text) for text in of] for side, of in texts.items()}
    test_bytes = sum(len(text.encode()) for text in texts["test"])
    characters = {side: sum(map(len, of)) for side, of in texts.items()}
    runs = [run_ for run_ in known() if run_["tokens"] not in sizes]
    with tempfile.TemporaryDirectory() as place_name:
        place = Path(place_name)
        build_store(place / "test", tokenizer, {"train": documents["test"]})
        opened = store.TargetStore(place / "test")
        test = Rows(opened, "train", longest=LONGEST, packing=True, seed=0)
        for tokens in sizes:
            for seed in range(seeds):
                shutil.rmtree(place / "targets", ignore_errors=True)
                chosen = drawn(documents["train"], tokens, seed)
                sides = {"train": chosen, "heldout": documents["heldout"]}
                build_store(place / "targets", tokenizer, sides)
                start(place / "start", tokenizer, seed)
                targets = store.TargetStore(place / "targets")
                for name, method in METHODS.items():
                    scores = score(run(place, method, tokens, seed), targets, test, test_bytes)
                    runs.append({"tokens": tokens, "seed": seed, "method": name, **scores})
                    print(f"{tokens:>9,} seed {seed} {name:20}{scores}", flush=True)
                    write(runs, characters)
    print(write(runs, characters))


if __name__ == "__main__":
    main()
