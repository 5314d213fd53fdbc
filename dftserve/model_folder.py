"""Checks of a model's folder before transformers or vLLM open its files by name.

    check_model_folder(Path("models/base"))     for every loader
    check_full_precision(config, "models/base") for commands that read logits or train
    weight_files(Path("models/base"))           the safetensors files, each complete

Weights may be links to anywhere: they are often stored on other disks, and no other kind of file
passes for safetensors. Every other file of a model can end up in what is trained or saved from it
(a chat template is part of every prompt), and must belong to the folder itself; see
`bounded_files` for what that means in the Hugging Face cache.

Standard library only.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dftserve.bounded_files import check, open_file, parse_json, read_json, real_file

LARGEST_TEXT = 256 << 20
"""Maximal bytes of a file other than weights; the largest tokenizer.json have about 40 MiB."""
LARGEST_WEIGHTS = 1 << 40
"""Maximal bytes of a file of weights."""
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHERWISE = (
    "accepted: a causal language model saved by save_pretrained() in safetensors. Convert other "
    "formats first."
)
LARGEST_HEADER = 100_000_000
"""Maximal bytes of a safetensors file's header, as the format defines it."""
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
"""Integers of a config.json that determine allocations, with the maximum of each."""


def check_model_folder(folder: Path) -> None:
    """Refuse files of a model's folder that a loader would open but should not.

    Raises:
        ValueError: a FIFO, device or socket; a text file that is a link out of the folder, or
            larger than `LARGEST_TEXT`; settings that are not JSON, are nested too deeply, or
            contain sizes that no model has.
        OSError: a folder that cannot be read.
    """
    for directory in (folder, *(folder / name for name in FOLDERS)):
        if directory.is_dir():
            for path in sorted(directory.iterdir()):
                _check_file(path, folder)
    for name in SETTINGS:
        if (folder / name).exists():
            content = read_json(folder / name, within=folder, largest=LARGEST_TEXT, finite=False)
            _check_numbers(content, folder / name)


def _check_file(path: Path, folder: Path) -> None:
    if path.suffix in TEXTS:
        real_file(path, within=folder, largest=LARGEST_TEXT)
    elif path.exists() and not path.is_dir():
        check(path, path.stat(), LARGEST_WEIGHTS)


def _check_numbers(content: Any, path: Path) -> None:
    if isinstance(content, Mapping):
        for name, value in content.items():
            most = NUMBERS.get(name)
            if most is not None and isinstance(value, int | float) and not 0 <= value <= most:
                raise ValueError(f"{path}: {name}: got {value}; accepted: from 0 to {most:,}.")
            _check_numbers(value, path)
    elif isinstance(content, list):
        for each in content:
            _check_numbers(each, path)


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────


def check_full_precision(config: Mapping[str, Any], model: str) -> None:
    """Refuse a quantised model: its weights have no gradient, and its logits differ from those of
    the original.

    Args:
        config: the content of its config.json.
        model: the model's name in the error message.

    Raises:
        ValueError: bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors or any other method.
    """
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, Mapping) else {}):
        for name in ("quantization_config", "compression_config"):
            quantisation = settings.get(name)
            if quantisation:
                method = (
                    quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
                )
                raise ValueError(
                    f"{model} is quantised ({name}: {method or 'of an unnamed method'}); accepted: "
                    "weights in float32, bfloat16 or float16. Use the model that it was made from."
                )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a loader reads, each of the size that its header implies.

    Raises:
        ValueError: no file, a missing shard of the index, or a file that is truncated or is not in
            safetensors format.
    """
    index = folder / INDEX
    names = [WEIGHTS] if (folder / WEIGHTS).exists() or not index.exists() else _shards(index)
    for name in names:
        if not (folder / name).exists():
            why = f", which {INDEX} names; copy it again." if index.exists() else f"; {OTHERWISE}"
            raise ValueError(f"{folder} has no {name}{why}")
        _check_whole(folder / name)
    return [folder / name for name in names]


def _shards(index: Path) -> list[str]:
    content = read_json(index, within=index.parent, largest=LARGEST_TEXT)
    shards = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(shards, Mapping) or not shards:
        raise ValueError(f"{index}: it has no weight_map; copy it again.")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: got {name!r}; accepted: names of files in its folder.")
    return names


def _check_whole(path: Path) -> None:
    """Compare the file's size with its format: 8 bytes of header length, the header, and tensors up
    to the last offset."""
    with open_file(path, largest=LARGEST_WEIGHTS) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise ValueError(f"{path} is not a complete safetensors file; copy it again.")
        header = parse_json(file.read(length), str(path))
    try:
        ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ValueError(f"{path} is not a complete safetensors file; copy it again.") from None
    if size != expected:
        raise ValueError(
            f"{path}: got {size:,} bytes; its header names {expected:,}: it was cut short or "
            "damaged. Copy it again."
        )
