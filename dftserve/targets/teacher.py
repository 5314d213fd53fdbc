"""A causal language model as a source: its predictions at each position of a text.

    teacher = Teacher.load("models/base", vocabulary=len(tokenizer))

The decoder processes a batch of documents at once. The head, whose output needs most of the memory,
is applied chunk by chunk when rows are requested.

Shapes: B documents in a batch, N tokens of the longest, T trained positions of a document, R of
them in one chunk, D hidden, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor
from transformers import PreTrainedModel

from dftserve import lm, pretrained
from dftserve.bounded_files import chunks, open_file
from dftserve.model_folder import LARGEST_WEIGHTS, weight_files
from dftserve.targets.document import Document
from dftserve.targets.source import DenseSource, Rows


class Teacher(DenseSource):
    """softmax(logits / temperature) over the first `vocabulary` columns of a causal LM's head."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocabulary: int,
        name: str,
        temperature: float = 1.0,
        tokens_N: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            model: any causal LM of transformers; it is set to evaluation mode.
            vocabulary: V, of the tokenizer; further columns of the head are padding.
            name: used in descriptions, together with a digest of the weights.
            temperature: above 0; 1 is the model as it was trained.
            tokens_N: a text to check the model with; see `lm.LanguageModel`.

        Raises:
            ValueError: a temperature of 0 or less, a head narrower than the vocabulary, or a model
                that `lm.LanguageModel` refuses.
        """
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}; accepted: above 0.")
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.name = name
        self.temperature = temperature
        self._lm = lm.LanguageModel(model, name, tokens_N)
        columns = len(self._lm.head.weight_VD)
        if columns < vocabulary:
            raise ValueError(
                f"vocabulary: got {vocabulary}; {name} has {columns} tokens: tokenizer and model "
                "do not belong together."
            )

    @classmethod
    def load(
        cls,
        model: str | Path | pretrained.ModelFiles,
        *,
        vocabulary: int,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        temperature: float = 1.0,
        tokens_N: Sequence[int] | None = None,
    ) -> "Teacher":
        """Load from a folder, or by name from the Hugging Face hub; only safetensors, never code.

        Args:
            dtype: "auto" keeps that of the weights; float32 on a CPU without bfloat16 instructions.
            device: None: the first GPU, or the CPU if there is none.

        Raises:
            ValueError: as `pretrained.examine`, `pretrained.load` and the constructor.
        """
        files = model if isinstance(model, pretrained.ModelFiles) else pretrained.examine(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = pretrained.load(files, dtype=dtype, device=device)
        folder = pretrained.weights_folder(files)
        is_local = Path(files.name).is_dir()
        teacher = cls(
            loaded,
            vocabulary=vocabulary,
            name=folder.resolve().name if is_local else files.name,
            temperature=temperature,
            tokens_N=tokens_N,
        )
        digest = blake3(_config(loaded).encode())
        for file in weight_files(folder):
            digest.update(file.name.encode())
            with open_file(file, largest=LARGEST_WEIGHTS) as opened:
                for chunk in chunks(opened, file, largest=LARGEST_WEIGHTS):
                    digest.update(chunk)
        teacher.digest = digest.hexdigest()
        return teacher

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of the configuration and the weights: of their files, or else of the state
        dict."""
        digest = blake3(_config(self.model).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def positions(self) -> int | None:
        """The model's context length in tokens; None if its configuration has no limit."""
        return self._lm.positions

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": "teacher",
            "name": self.name,
            "blake3": self.digest,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "temperature": self.temperature,
            "vocabulary": self.vocabulary,
        }

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        states = self.states(
            [document.tokens_N for document in documents],
            [document.positions_T for document in documents],
        )
        return [self._rows(states_TD) for states_TD in states]

    def _rows(self, states_TD: Tensor) -> Rows:
        def rows(start: int, stop: int) -> Tensor:
            return self.logprobs(states_TD[start:stop])

        return rows

    @torch.no_grad()
    def states(self, texts: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> list[Tensor]:
        """The hidden states from which the tokens at `positions` are predicted, each [T, D].

        One padded forward pass of the decoder. Padding is on the right, where no earlier position
        attends to it, so a text's states do not depend on the batch.

        Args:
            texts: token ids, int [N] each.
            positions: int64 [T] each, 1 or more.

        Raises:
            ValueError: a text is longer than the model's context.
        """
        self._check_lengths(texts)
        longest = max(map(len, texts), default=0)
        ids_BN = torch.zeros(len(texts), longest, dtype=torch.int64)
        mask_BN = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, tokens_N in enumerate(texts):
            ids_BN[row, : len(tokens_N)] = torch.from_numpy(tokens_N.astype(np.int64))
            mask_BN[row, : len(tokens_N)] = 1
        states_BND = self._decode(ids_BN, mask_BN)
        return [
            states_BND[row, torch.from_numpy(where_T - 1).to(states_BND.device)]
            for row, where_T in enumerate(positions)
        ]

    @torch.no_grad()
    def logprobs(self, states_RD: Tensor) -> Tensor:
        """ln p of hidden states: float32 [R, V] on the model's device, nats."""
        logits_RV = self._lm.head.logits(states_RD)[:, : self.vocabulary].float()
        return (logits_RV / self.temperature).log_softmax(dim=1)

    def _decode(self, ids_BN: Tensor, mask_BN: Tensor) -> Tensor:
        device = self.model.device
        inputs = {"input_ids": ids_BN.to(device), "attention_mask": mask_BN.to(device)}
        return self._lm.states(**inputs).hidden_BND.reshape(*ids_BN.shape, -1)

    def _check_lengths(self, texts: Sequence[np.ndarray]) -> None:
        most = self.positions
        long = [len(tokens_N) for tokens_N in texts if most and len(tokens_N) > most]
        if long:
            raise ValueError(
                f"texts of {', '.join(map(str, long))} tokens; {self.name} accepts up to {most}. "
                "Split the documents, or take a model with a longer context."
            )


def _config(model: PreTrainedModel) -> str:
    """The configuration without fields that do not affect the logits, as JSON."""
    config = model.config.to_dict()
    kept = {key: config[key] for key in config if key not in _NOT_HASHED}
    return json.dumps(kept, sort_keys=True, default=str)


_NOT_HASHED = ("transformers_version", "_name_or_path")
