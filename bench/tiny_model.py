"""A small untrained Llama, for benches that measure the cost of a step and not its output."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARIES = (4096, 131_072)
TOKENS = {4096: 128, 131_072: 32}
"""Output tokens of a request, by vocabulary; 32 for others."""
MAX_LENGTH = 512
EOS_ID = 0


@contextmanager
def saved(vocabulary: int) -> Iterator[str]:
    """A temporary folder with the model and its tokenizer."""
    with TemporaryDirectory() as folder:
        save_model(Path(folder), vocabulary)
        save_tokenizer(Path(folder), vocabulary)
        yield folder


def save_model(folder: Path, vocabulary: int) -> None:
    """Save a Llama of about five million parameters and a head; its logits have a realistic
    spread."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    # Three nats of spread: a few dozen tokens survive the guard, as they do for trained models.
    torch.nn.init.normal_(model.lm_head.weight, std=3.0 / config.hidden_size**0.5)
    model.to(torch.bfloat16).save_pretrained(folder)


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """Save a tokenizer whose token i is the word "wi"; an HTTP server does not start without a
    tokenizer."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token=f"w{EOS_ID}"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{EOS_ID}")
    tokenizer.save_pretrained(folder)
