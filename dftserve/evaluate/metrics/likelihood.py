"""Likelihood of texts under a causal language model: bits per byte, and the surprisal of tokens.

    bits_of(held_out_human_texts, token_nats("models/tuned", held_out_human_texts))
    surprisal_of(token_nats("models/reference", outputs))

Bits per byte of held-out human text measures coverage: lower is better. The surprisal of outputs
should match that of human text in mean and spread; neither should be minimised.

Shapes: T tokens of a text, N texts.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dftserve.evaluate.metrics.intervals import Estimate, over_units, sum_by_group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dftserve.targets.document import Document
    from dftserve.targets.teacher import Teacher

WINDOW = 1024
"""Default limit of the window in tokens: enough context, even for models with more positions."""


@dataclass(frozen=True)
class Surprisal:
    """−ln p of each token given the tokens before it, in nats, over all tokens of all texts."""

    mean: Estimate
    sd: Estimate
    tokens: int


def bits_of(texts: Sequence[str], nats: Sequence[NDArray], groups: Sequence[str] = ()) -> Estimate:
    """Σ −log₂ p(token) / Σ bytes of UTF-8, over texts, from the result of `token_nats`. The
    interval resamples texts, or groups of them (`intervals.sum_by_group`) if there are groups.

    Comparable between models with different tokenizers, since the bytes are the same.
    """
    units_N2 = _sorted_units(
        [
            (nats_T.sum() / np.log(2), len(text.encode()))
            for text, nats_T in zip(texts, nats, strict=True)
        ],
        groups,
    )

    def ratio(weights_N: NDArray, units_N2: NDArray) -> float:
        bits, size = weights_N @ units_N2
        return float(bits / size)

    return over_units(units_N2, ratio)


def surprisal_of(nats: Sequence[NDArray], groups: Sequence[str] = ()) -> Surprisal:
    """Mean and standard deviation of the tokens' surprisal, from the result of `token_nats`;
    intervals and `groups` as in `bits_of`."""
    # Centred on the common mean, to avoid subtracting large squares.
    centre = float(np.concatenate(nats).mean())
    units_N3 = _sorted_units(
        [(len(t), (t - centre).sum(), ((t - centre) ** 2).sum()) for t in nats], groups
    )

    def mean(weights_N: NDArray, units_N3: NDArray) -> float:
        count, total, _ = weights_N @ units_N3
        return float(centre + total / count)

    def sd(weights_N: NDArray, units_N3: NDArray) -> float:
        count, total, squares = weights_N @ units_N3
        return float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))

    return Surprisal(over_units(units_N3, mean), over_units(units_N3, sd), sum(map(len, nats)))


def token_nats(
    model: str | Path,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> list[NDArray]:
    """−ln p of each text's tokens: float64 [T] each, nats.

    The first token is predicted from the tokenizer's begin token, or from its end token if it has
    none, as lm-eval does. The text's end is not scored.

    Args:
        model: a folder, or a name on the Hugging Face hub; safetensors only, no remote code.
        window: tokens that the model reads at once; None: its positions, at most `WINDOW`.
        stride: tokens by which the window moves on, below `window`; None: half of it. Each token is
            scored once: in a text longer than a window, with `window − stride` tokens of context or
            more, except at the text's start.
        batch_size: windows read at a time.

    Raises:
        ValueError: no texts, an empty one, a model or a tokenizer that cannot be used, or numbers
            that are not accepted.
    """
    from dftserve.pretrained import examine
    from dftserve.targets.document import load_tokenizer
    from dftserve.targets.teacher import Teacher

    if not texts:
        raise ValueError("texts: got none; accepted: at least one.")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; accepted: 1 or more.")
    found_model = examine(model)
    tokenizer = load_tokenizer(str(model))
    found_model.check_tokenizer(tokenizer)
    # Texts are cut into windows here, so suppress the warning for each long text.
    tokenizer.model_max_length = sys.maxsize
    encoded = [_encoded(tokenizer, text, index) for index, text in enumerate(texts)]
    teacher = Teacher.load(found_model, vocabulary=len(tokenizer), tokens_N=encoded[0].tolist())
    window, stride = _windows_of(teacher, window, stride)
    nats = [np.empty(len(tokens_T) - 1) for tokens_T in encoded]
    for index, first, nats_T in _scored(teacher, encoded, window, stride, batch_size):
        nats[index][first : first + len(nats_T)] = nats_T
    return nats


def _sorted_units(rows: Sequence[tuple[float, ...]], groups: Sequence[str]) -> NDArray:
    """Sum the rows of each group and sort the sums, so that the draws of a bootstrap do not depend
    on the order of the texts."""
    return np.array(sorted(sum_by_group(np.array(rows, float), groups).tolist()), float)


def _encoded(tokenizer: "PreTrainedTokenizerBase", text: str, index: int) -> NDArray:
    """int32 [1 + T]: the start token, which predicts the first, and the T tokens of the text."""
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer has neither a begin nor an end token, so a "
            "text's first token cannot be predicted; accepted: a tokenizer that has one."
        )
    tokens = tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
    if not tokens:
        raise ValueError(f"texts[{index}]: got {text[:40]!r}, which has no token; leave it out.")
    return np.array([start, *tokens], dtype=np.int32)  # type: ignore[misc]


def _windows_of(teacher: "Teacher", window: int | None, stride: int | None) -> tuple[int, int]:
    most = teacher.positions
    window = min(WINDOW, most or WINDOW) if window is None else window
    stride = window // 2 if stride is None else stride
    if most and window > most:
        raise ValueError(
            f"window: got {window}; accepted: up to {most}, {teacher.name}'s positions."
        )
    if not 1 <= stride < window:
        raise ValueError(
            f"window, stride: got {window} and {stride}; accepted: a stride of at least 1 below "
            "the window."
        )
    return window, stride


def _scored(
    teacher: "Teacher", encoded: Sequence[NDArray], window: int, stride: int, batch_size: int
) -> Iterator[tuple[int, int, NDArray]]:
    """Yields (index of a text, index of a token, −ln p of the tokens from there); each token is
    scored once."""
    windows = [
        (index, first, piece)
        for index, tokens_T in enumerate(encoded)
        for first, piece in _windows(tokens_T, window, stride)
    ]
    # Windows of similar lengths share a batch, for less padding.
    windows.sort(key=lambda each: len(each[2].tokens_N), reverse=True)
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        scores = teacher.token_logprobs([piece for *_, piece in batch])
        for (index, first, _), logprobs_T in zip(batch, scores, strict=True):
            yield index, first, -logprobs_T


def _windows(tokens_T: NDArray, window: int, stride: int) -> Iterator[tuple[int, "Document"]]:
    """Yields (index in the text of the first token to score, the window that scores it)."""
    from dftserve.targets.document import Document

    new, start = 1, 0
    while new < len(tokens_T):
        stop = min(start + window, len(tokens_T))
        yield new - 1, Document(tokens_T[start:stop], np.arange(start, stop) >= new)
        new, start = stop, start + stride
