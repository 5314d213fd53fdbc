"""Find a model's files: in the given folder, or in the local Hugging Face cache.

    folder = folder_of("models/base")
    folder = folder_of("openai-community/gpt2")     fetched, except for its weights

Every command that loads a model calls this before it imports anything heavy, so a misspelt name is
reported at once, together with the most similar folder name. Each call queries the hub through
huggingface_hub, with its retries; if the hub cannot be reached, files from an earlier fetch are
used.

Importing this loads neither torch nor transformers.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from dftserve.digest import joined_digest, sampled_digest
from dftserve.model_folder import CONFIG, weight_files
from dftserve.spec import FINAL, nearest, question

ALL_BUT_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
WEIGHTS_TOO = (*ALL_BUT_WEIGHTS, "model*.safetensors")
MOST_ENTRIES = 1000
"""Entries of a folder that are searched for a similar name."""


def folder_of(model: str | Path, patterns: Sequence[str] = ALL_BUT_WEIGHTS) -> Path:
    """The folder itself, or the local folder of the files fetched from the hub.

    Args:
        patterns: of the files to fetch if `model` is a name on the hub.

    Raises:
        ValueError: there is no such folder, and the hub does not provide such a model.
    """
    check_path(model)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(patterns)))
    except GatedRepoError:
        why = "gives it only to accounts with access (`hf auth login`)"
    except RepositoryNotFoundError:
        why = "has no model of that name"
    except LocalEntryNotFoundError:
        why = "cannot be reached, and it was not fetched before"
    except HFValidationError:
        why = "does not accept such a name"
    except (HfHubHTTPError, OSError) as error:
        why = f"does not give it ({type(error).__name__})"
    raise ValueError(
        f"model: got {str(model)!r}; there is no such folder here{_near(Path(model))}, and the "
        f"Hugging Face hub {why}; accepted: a folder that save_pretrained() wrote, or a model's "
        "name on the hub."
    ) from None


def weights_digest(folder: Path) -> str:
    """BLAKE3 of a model's config.json and weights; large files are sampled (`sampled_digest`).

    Raises:
        ValueError: no readable weights.
        OSError: from the system.
    """
    return joined_digest(
        [sampled_digest(path) for path in (folder / CONFIG, *weight_files(folder))]
    )


def check_path(model: str | Path) -> None:
    """Raises ValueError if `model` is written as a path and there is no such folder, or if it is
    the folder of a run, whose checkpoint is the model."""
    text = str(model)
    if Path(text).is_dir():
        _check_not_a_run(Path(text))
        return
    first = Path(text).parts[0] if Path(text).parts else ""
    is_path = (
        text.startswith((".", "/", "~"))
        or text.endswith("/")
        or text.count("/") != text.strip("/").count("/")
        or text.count("/") > 1
        or os.sep * 2 in text
        or "\\" in text
        or Path(text).exists()
        or ("/" in text and Path(first).is_dir())
    )
    if is_path:
        raise ValueError(
            f"model: got {text!r}; there is no such folder{_near(Path(text))}; give the model's."
        )


def _check_not_a_run(folder: Path) -> None:
    checkpoint = folder / FINAL
    if (checkpoint / CONFIG).exists() and not (folder / CONFIG).exists():
        raise ValueError(
            f"model: got {str(folder)!r}, the folder of a run; give its checkpoint, {checkpoint}."
        )


def _near(path: Path) -> str:
    """A question that suggests the sibling folder with the most similar name; may be empty."""
    siblings = []
    try:
        with os.scandir(path.parent) as entries:
            for entry, _ in zip(entries, range(MOST_ENTRIES), strict=False):
                if entry.is_dir():
                    siblings.append(entry.name)
    except OSError:
        return ""
    sibling = nearest(path.name, sorted(siblings))
    return question(sibling and str(path.parent / sibling))
