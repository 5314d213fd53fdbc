"""GGUF files as models: each is converted once into an ordinary Hugging Face folder and cached.

    folder = resolve("models/SmolLM2-135M-Instruct.Q4_1.gguf")

`resolve` takes the `model` argument of a command. For a GGUF file, or a folder whose weights are
one, it returns the folder of the converted model: safetensors, tokenizer, chat template, generation
config. Anything else is returned unchanged. transformers reads the format; this module reports what
cannot be converted, detects weights that were not converted, and writes plain weights.

Importing this loads neither torch nor transformers.
"""

import contextlib
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve import atomic, lock
from dftserve.bounded_files import chunks, open_file, real_file
from dftserve.model_folder import LARGEST_WEIGHTS, check_model_folder

SUFFIX, MAGIC = ".gguf", b"GGUF"
CACHE = "DFTSERVE_CACHE"
"""Environment variable that overrides the cache folder."""
ORIGIN = "gguf.json"
"""File in a converted folder that describes the GGUF file it was made from."""
PLAIN_WEIGHTS = ("*.safetensors", "*.bin")
DTYPES = {0: "float32", 1: "float16"}
"""dtype of the converted weights by `general.file_type`; all others become bfloat16."""

Say = Callable[[str], None]


def resolve(model: str, say: Say | None = None) -> str:
    """The converted folder if `model` is a GGUF file or a folder with one; else `model` itself.

    Args:
        say: called with one line when a conversion begins; None prints it to stderr.

    Raises:
        ValueError: a .gguf file in another format, one part of a split model, several files in a
            folder, or an architecture that transformers cannot convert, which is named.
        RuntimeError: the gguf package is not installed.
        OSError: a file that cannot be read, or a disk that cannot be written.
    """
    file = find(model)
    if file is None:
        return model
    digest = sha256_of(file)
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if not folder.exists():  # Another process may have made it while we waited.
                (say or _to_stderr)(f"Converting {file} to {folder}, once.")
                convert(file, folder, digest=digest)
    return str(folder)


def find(model: str) -> Path | None:
    """The GGUF file at `model`, or the one in that folder if it has no other weights.

    Raises:
        ValueError: a .gguf file in another format, or several in a folder.
    """
    path = Path(model)
    if path.is_dir():
        return _only_one(path)
    if path.suffix != SUFFIX:
        return None
    if not os.path.lexists(path):
        raise ValueError(f"model: got {model!r}; there is no such file.")
    with open_file(path, largest=LARGEST_WEIGHTS) as file:
        if (magic := file.read(len(MAGIC))) != MAGIC:
            raise ValueError(
                f"{path}: got a file that begins with {magic!r}; accepted: a GGUF file, which "
                f"begins with {MAGIC!r}. Was its download complete?"
            )
    return path


def _only_one(folder: Path) -> Path | None:
    if any(True for pattern in PLAIN_WEIGHTS for _ in folder.glob(pattern)):
        return None
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (", …" if len(files) > 4 else "")
        raise ValueError(
            f"{folder}: got {len(files)} GGUF files ({names}); accepted: one. Name the file itself."
        )
    return find(str(files[0])) if files else None


def cache_folder() -> Path:
    """$DFTSERVE_CACHE, or `dftserve` in the system's cache folder."""
    if own := os.environ.get(CACHE):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dftserve"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open_file(path, largest=LARGEST_WEIGHTS) as file:
        for chunk in chunks(file, path, largest=LARGEST_WEIGHTS):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time convert: all ranks of torchrun resolve the same file at once."""
    with open(folder.with_name(folder.name + ".lock"), "wb") as file:
        lock.take(file, wait=True)
        yield


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ── Conversion ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Header:
    """The metadata of a GGUF file that determines how it is converted."""

    architecture: str
    file_type: int | None
    """llama.cpp's number for the type of the weights."""
    pre_tokenizer: str | None
    parts: int
    """Number of files that the model is split into."""

    @property
    def dtype(self) -> str:
        return DTYPES.get(-1 if self.file_type is None else self.file_type, "bfloat16")


def convert(file: Path, folder: Path, *, digest: str) -> None:
    """Convert a GGUF file into `folder`, which must not exist; it is written completely or not at
    all.

    Raises:
        ValueError, RuntimeError, OSError: as `resolve`.
    """
    from dftserve.library_writes import writing

    header = read_header(file)
    if header.parts > 1:
        raise ValueError(
            f"{file}: got one of {header.parts} parts of a model; accepted: a whole one. "
            "`llama-gguf-split --merge` of llama.cpp joins them."
        )
    real = real_file(file, largest=LARGEST_WEIGHTS)
    with atomic.folder(folder) as partial, quietly():
        with _refusing(file, header.architecture):
            config = _config(real)
        config.save_pretrained(partial)
        check_model_folder(partial)  # Before the sizes in the config are allocated.
        with _refusing(file, header.architecture):
            model, tokenizer = _model(real, header, config), _tokenizer(real, header, config)
        with writing(folder):
            model.save_pretrained(partial)
            model.generation_config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        (partial / ORIGIN).write_text(json.dumps(_origin(file, header, digest), indent=1) + "\n")


def read_header(file: Path) -> Header:
    """Read the metadata; raises ValueError for a truncated file or one without an architecture."""
    reader_of = _reader()
    try:
        fields = reader_of(file).fields
        values = {
            name: fields[key].contents() if key in fields else None
            for name, key in (
                ("architecture", "general.architecture"),
                ("file_type", "general.file_type"),
                ("pre_tokenizer", "tokenizer.ggml.pre"),
                ("parts", "split.count"),
            )
        }
    except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(
            f"{file}: a GGUF file that cannot be read ({type(error).__name__}: {error}); its "
            "download may have been cut."
        ) from None
    if not isinstance(values["architecture"], str):
        raise ValueError(f"{file}: got a GGUF file that names no architecture.")
    return Header(**{**values, "parts": values["parts"] or 1})


def _reader() -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise RuntimeError(
            "a GGUF file needs the gguf package: pip install 'gguf>=0.17'."
        ) from None
    return GGUFReader


@contextlib.contextmanager
def _refusing(file: Path, architecture: str) -> Iterator[None]:
    """Turn the various errors of transformers for an inconvertible file into one ValueError."""
    try:
        yield
    except (ValueError, KeyError, NotImplementedError, AttributeError, RuntimeError) as error:
        import transformers

        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{file}: got a GGUF of the architecture {architecture!r}, which transformers "
            f"{transformers.__version__} cannot convert ({why}); take the model's own safetensors."
        ) from None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' progress bars and its advice about packed weights, which we unpack."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config(file: Path) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.__dict__.pop(
        "_model_name_or_path", None
    )  # It is the title of the GGUF file, not a path.
    return config


def _model(file: Path, header: Header, config: Any) -> Any:
    """The model with plain weights. Passing `config` saves parsing the file again for it.

    Raises:
        ValueError: the file lacks some weights. They would be initialised at random, and the model
            would load and write nonsense.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        dtype=getattr(torch, header.dtype),
        output_loading_info=True,
        **_unpacked(),
    )
    model, info = loaded
    for what in ("missing_keys", "mismatched_keys"):
        if lacks := sorted(map(str, info.get(what, ()))):
            raise ValueError(f"{what.replace('_', ' ')}: {', '.join(lacks[:3])}")
    # The weights are unpacked now, and must be saved without a quantisation config.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _unpacked() -> dict[str, Any]:
    """Arguments that unpack the weights: from 5.19 on, transformers keeps those of some
    architectures in GGUF's blocks otherwise."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _tokenizer(file: Path, header: Header, config: Any) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, config=config)
    if header.pre_tokenizer == "smollm":
        # Split each digit, also after two spaces; transformers does not support this pre-tokenizer.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer


def _origin(file: Path, header: Header, digest: str) -> dict[str, Any]:
    import transformers

    return {
        "gguf": file.name,
        "sha256": digest,
        "architecture": header.architecture,
        "dtype": header.dtype,
        "transformers": transformers.__version__,
    }
