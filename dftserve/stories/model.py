"""Train the stories' language model from scratch: a tokenizer and a small Llama, on two cores.

    from dftserve.stories.model import STEPS, build
    build({Path("build/stories"): STEPS})

Shapes: B dialogues in a batch, N tokens of the longest of them, V the vocabulary.
"""

import random
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from dftserve.library_writes import writing
from dftserve.stories.grammar import PROMPTS, generate

STEPS = 440
"""Training steps of the whole model: about a minute on two cores."""

VOCABULARY = 4096
BATCH = 16
END, PAD = "<|end|>", "<|pad|>"
SPECIALS = [END, PAD, "<|user|>", "<|assistant|>"]
"""The first tokens of the vocabulary, in this order."""
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build(stages: Mapping[Path, int], *, seed: int = 0) -> None:
    """Train one model and save it to each folder of `stages` after that many steps.

    A folder is written atomically, and an existing one is replaced. Each holds an ordinary Hugging
    Face checkpoint: safetensors, tokenizer, chat template, generation config. The same stages and
    seed give the same weights on the same machine.
    """
    rng = random.Random(seed)
    tokenizer = train_tokenizer(rng)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(architecture())
    let_attention_copy(model)
    for step in train(model, batches(tokenizer, rng), max(stages.values())):
        for folder, last in stages.items():
            if step == last:
                save(folder, model, tokenizer)


def train_tokenizer(rng: random.Random, stories: int = 12_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly VOCABULARY tokens, trained on `stories` stories."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for prompt, story in islice(dialogues(rng), stories) for text in (prompt, story))
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != VOCABULARY:
        raise RuntimeError(
            f"the stories hold {bpe.get_vocab_size()} tokens, not {VOCABULARY}; give more stories"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def architecture() -> LlamaConfig:
    """Two million parameters; heads of size 64, which every attention backend supports."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=896,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(END),
        pad_token_id=SPECIALS.index(PAD),
    )


@torch.no_grad()
def let_attention_copy(model: LlamaForCausalLM) -> None:
    """Initialise each layer to attend to equal tokens and copy them.

    Keys equal queries, and the output map is the transpose of the value map (mimetic
    initialisation, arXiv 2305.09828). Stories repeat the hero's name, and a minute of training is
    too short to learn copying from a random initialisation.
    """
    layers = cast(Iterable[Any], model.model.layers)
    for attention in (layer.self_attn for layer in layers):
        for first, second, gain in (
            (attention.v_proj, attention.o_proj, 2.0),
            (attention.q_proj, attention.k_proj, 0.5),
        ):
            torch.nn.init.orthogonal_(first.weight, gain=gain**0.5)
            second.weight.copy_(first.weight.T if second is attention.o_proj else first.weight)


def dialogues(rng: random.Random) -> Iterator[tuple[str, str]]:
    """An endless sequence of prompts and stories that answer them."""
    while True:
        prompt = rng.choice(list(PROMPTS))
        yield prompt, generate(rng, prompt).text


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An endless sequence of (tokens_BN, labels_BN); all but the assistant's tokens have the label
    -100."""
    source = dialogues(rng)
    while True:
        rows = [encode(tokenizer, *dialogue) for dialogue in islice(source, BATCH)]
        longest = max(len(tokens) for tokens, _ in rows)
        yield (
            torch.tensor([t + [tokenizer.pad_token_id] * (longest - len(t)) for t, _ in rows]),
            torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
        )


def encode(
    tokenizer: PreTrainedTokenizerFast, prompt: str, story: str
) -> tuple[list[int], list[int]]:
    """The tokens of one dialogue, in the server's format, and their labels."""
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    answer = tokenizer(story + END)["input_ids"]
    return question + answer, [-100] * len(question) + answer


def train(
    model: LlamaForCausalLM, data: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int
) -> Iterator[int]:
    """Train, yielding the number of each step after it.

    Muon for the matrices, AdamW for the embedding and the norms, one cosine schedule for both.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.model.layers.parameters() if weight.ndim < 2]
    others += [model.model.norm.weight, model.model.embed_tokens.weight]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.03, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.016, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [get_cosine_schedule_with_warmup(each, 15, steps) for each in optimizers]
    model.train()
    bar = trange(1, steps + 1, desc="training the stories' model")
    for step in bar:
        tokens_BN, labels_BN = next(data)
        logits_BNV = model(tokens_BN[:, :-1]).logits
        loss = cross_entropy(logits_BNV.flatten(0, 1), labels_BN[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        yield step


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a checkpoint next to `folder`, then move it to `folder`."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(folder):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        ).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
