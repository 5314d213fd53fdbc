"""A model's folder, looked through before transformers or vLLM open its files by name.

    check_model_folder(Path("models/base"))

Weights may be links to anywhere: they often lie on other disks, and are read as safetensors, which
nothing else passes for. All else of a model can reach what is trained or saved from it (a chat
template stands in every prompt), and must be the folder's own; see `bounded_files` for what that
means in the Hugging Face cache.

Standard library only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dftserve.bounded_files import check, read_json, real_file

LARGEST_TEXT = 256 << 20
"""Bytes of a model's file that is no weights; the largest tokenizer.json have some 40 MiB."""
LARGEST_WEIGHTS = 1 << 40
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
FOLDERS = ("additional_chat_templates",)
NUMBERS: Mapping[str, int] = {
    "vocab_size": (1 << 24) - 1,
    "hidden_size": 1 << 20,
    "n_embd": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 4096,
    "n_layer": 4096,
    "num_layers": 4096,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "num_experts": 1 << 16,
    "num_local_experts": 1 << 16,
}
"""Whole numbers of a config.json that decide what is allocated, and the most of each."""


def check_model_folder(folder: Path) -> None:
    """Refuse what a loader would open in a model's folder and should not.

    Raises:
        ValueError: a FIFO, device or socket; a text that is a link out of the folder, or larger
            than `LARGEST_TEXT`; settings that are not JSON, too deep, or name sizes that no
            model has.
        OSError: a folder that cannot be read.
    """
    for place in (folder, *(folder / name for name in FOLDERS)):
        if place.is_dir():
            for path in sorted(place.iterdir()):
                _check_file(path, folder)
    for name in SETTINGS:
        if (folder / name).exists():
            given = read_json(folder / name, within=folder, largest=LARGEST_TEXT, finite=False)
            _check_numbers(given, folder / name)


def _check_file(path: Path, folder: Path) -> None:
    if path.suffix in TEXTS:
        real_file(path, within=folder, largest=LARGEST_TEXT)
    elif path.exists() and not path.is_dir():
        check(path, path.stat(), LARGEST_WEIGHTS)


def _check_numbers(given: Any, path: Path) -> None:
    if isinstance(given, Mapping):
        for name, value in given.items():
            most = NUMBERS.get(name)
            if most is not None and isinstance(value, int | float) and not 0 <= value <= most:
                raise ValueError(f"{path}: {name}: got {value}; accepted: from 0 to {most:,}.")
            _check_numbers(value, path)
    elif isinstance(given, list):
        for each in given:
            _check_numbers(each, path)
