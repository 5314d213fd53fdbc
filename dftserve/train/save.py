"""Test saving a checkpoint before the first step, and read it back after the last.

Shapes: T trained positions of a batch.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dftserve import lm, pretrained
from dftserve.bounded_files import read_bytes
from dftserve.library_writes import writing
from dftserve.model_folder import LARGEST_TEXT
from dftserve.train.data import model_inputs
from dftserve.train.divergences import SFT, TargetRows
from dftserve.train.head import head_loss
from dftserve.train.model import TARGET_NAMES

SAME_NLL = 1e-3
"""Maximal difference in nats a token between a saved model and the trained one."""


COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
    "video_preprocessor_config.json",
)
"""Files of a model's folder that neither the model nor the tokenizer saves, and that training does
not change: without the first ones vLLM does not load a model that also reads images, and without
the SentencePiece model llama.cpp does not convert Gemma to GGUF."""


class SaveError(OSError):
    """The final checkpoint could not be written; the message says where the trained weights are."""


def try_save(model: Any, tokenizer: Any, name: str) -> int:
    """Save everything but the weights to a temporary folder; returns the bytes of those files.

    Args:
        model: the causal LM, without adapters.
        name: the model's name in error messages.

    Raises:
        ValueError: transformers refuses to save it, for example because of a
            generation_config.json with `temperature` but without `do_sample`.
        OSError: the temporary folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with writing(Path(folder)):
                model.save_pretrained(folder, state_dict={})
                tokenizer.save_pretrained(folder)
            return sum(path.stat().st_size for path in Path(folder).iterdir())
        except OSError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200].rstrip(". ")
            raise ValueError(
                f"{name} loads but cannot be saved, so the result would be lost: {reason}. "
                "Correct the model's config.json, generation_config.json or tokenizer first."
            ) from error


def copy_companions(base: Path, folder: Path) -> None:
    """Copy the `COMPANIONS` of a model's folder that `folder` does not have yet."""
    for name in COMPANIONS:
        if (base / name).exists() and not (folder / name).exists():
            content = read_bytes(base / name, within=base, largest=LARGEST_TEXT)
            (folder / name).write_bytes(content)


@torch.no_grad()
def nll(language_model: lm.LanguageModel, batch: Mapping[str, Tensor]) -> float:
    """Mean −ln p of a batch's own tokens in float32, nats; runs on the model's device."""
    model, device = language_model.model, language_model.model.device
    was_training = model.training
    model.eval()
    inputs = {name: value.to(device) for name, value in model_inputs(batch).items()}
    hidden_BND = language_model.states(**inputs).hidden_BND
    positions_T = batch["positions_T"].to(device)
    hidden_TD = hidden_BND.reshape(-1, hidden_BND.shape[-1])[positions_T]
    target = TargetRows(**{name: batch[name].to(device) for name in TARGET_NAMES})
    losses = head_loss(language_model.head, hidden_TD, target, SFT()).loss
    model.train(was_training)
    return float(losses) / len(positions_T)


def check_reloaded(folder: Path, trained: float, batch: Mapping[str, Tensor]) -> None:
    """Load the saved model and compare its likelihood of a batch with the trained model's.

    Args:
        trained: `nll` of the trained model on the same batch.

    Raises:
        ValueError: it cannot be loaded, or its likelihood differs.
    """
    model = pretrained.load(pretrained.examine(folder), dtype=torch.float32)
    saved = nll(lm.LanguageModel(model, folder.name), batch)
    if not abs(saved - trained) <= SAME_NLL:
        raise ValueError(
            f"the saved model is not the trained one: {saved:.4f} nats a token on held-out text "
            f"instead of {trained:.4f}"
        )
