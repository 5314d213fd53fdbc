"""Target stores of documents that a bench generates, without a corpus or a chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dftserve.targets import store
from dftserve.targets.document import Document
from dftserve.targets.source import Source


def write(
    folder: Path, source: Source, documents: Mapping[str, Sequence[Document]], *, tokenizer: str
) -> None:
    """Write the store of a source, with six entries and six draws per row.

    Args:
        documents: by split.
        tokenizer: its fingerprint, by `tokenizer_fingerprint`.
    """
    plan = store.plan(
        source,
        documents,
        tokenizer=tokenizer,
        template=None,
        corpus={},
        k=6,
        draws=6,
        seed=0,
    )
    store.write(folder, plan, source, documents)
