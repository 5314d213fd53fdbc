"""A causal language model as a source: what it would write at each position of a text.

    teacher = Teacher.load("models/base", vocabulary=len(tokenizer))

The decoder reads a batch of documents at once; the head, whose output is what fills memory, is
applied chunk by chunk when rows are asked for.

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
from transformers import AutoModelForCausalLM, PreTrainedModel

from dftserve.bounded_files import chunks, open_file
from dftserve.gguf import resolve
from dftserve.model_folder import LARGEST_WEIGHTS, check_model_folder
from dftserve.targets.document import Document
from dftserve.targets.source import DenseSource, Rows

OWN_TOLERANCE = 0.02
"""How far, of the largest logit, ours may lie from the model's own: bfloat16 and no more."""


class Teacher(DenseSource):
    """softmax(logits / temperature) over the first `vocabulary` columns of a causal LM's head."""

    def __init__(
        self, model: PreTrainedModel, *, vocabulary: int, name: str, temperature: float = 1.0
    ) -> None:
        """
        Args:
            model: any causal LM of transformers; it is set to evaluation mode.
            vocabulary: V, the tokenizer's; further columns of the head are padding.
            name: what descriptions call it; the weights' digest stands beside it.
            temperature: above 0; 1 is the model as it was trained.

        Raises:
            ValueError: a temperature of 0 or less, a head narrower than the vocabulary, or an
                architecture that makes its logits in a way that this class does not know.
        """
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}; accepted: above 0.")
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.name = name
        self.temperature = temperature
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"{name} ({type(model).__name__}) has no output head; accepted: a causal language "
                "model."
            )
        self._head = head
        self._check_logits()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        vocabulary: int,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        temperature: float = 1.0,
    ) -> "Teacher":
        """From a folder, or a name on the Hugging Face hub; safetensors only, no code from there.

        Args:
            dtype: "auto" keeps the weights' own.
            device: None is the first GPU, or the CPU where there is none.

        Raises:
            ValueError: nothing there that can be loaded, or as the constructor.
        """
        path = resolve(str(path))
        folder = _folder(path)
        check_model_folder(folder)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise ValueError(
                f"{path} has no .safetensors file; accepted: a causal language model saved by "
                "save_pretrained(). Convert other formats first."
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} cannot be loaded as a causal language model: {error}"
            ) from None
        model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))  # type: ignore[arg-type]
        name = folder.resolve().name if Path(path).is_dir() else str(path)
        teacher = cls(model, vocabulary=vocabulary, name=name, temperature=temperature)
        digest = blake3(_config(model).encode())
        for file in weights:
            digest.update(file.name.encode())
            with open_file(file, largest=LARGEST_WEIGHTS) as opened:
                for chunk in chunks(opened, file, largest=LARGEST_WEIGHTS):
                    digest.update(chunk)
        teacher.digest = digest.hexdigest()
        return teacher

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of the configuration and the weights: their files, or the state in memory."""
        digest = blake3(_config(self.model).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

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

    @torch.inference_mode()
    def states(self, texts: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> list[Tensor]:
        """The hidden states from which the tokens at `positions` are predicted, each [T, D].

        One padded forward of the decoder. Padding stands on the right, where no earlier position
        sees it, so a text's states do not depend on the batch.

        Args:
            texts: token ids, int [N] each.
            positions: int64 [T] each, 1 or more.

        Raises:
            ValueError: a text longer than the model's positions.
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
        """ln p of hidden states: float32 [R, V] on the CPU, nats."""
        logits_RV = self._logits(states_RD)[:, : self.vocabulary].float().cpu()
        return (logits_RV / self.temperature).log_softmax(dim=1)

    def _decode(self, ids_BN: Tensor, mask_BN: Tensor) -> Tensor:
        device = self.model.device
        output = self.model.get_decoder()(
            input_ids=ids_BN.to(device), attention_mask=mask_BN.to(device), use_cache=False
        )
        return output.last_hidden_state

    def _logits(self, states_RD: Tensor) -> Tensor:
        """The head, and what some architectures do after it."""
        config = self.model.config.get_text_config()
        logits_RV = self._head(states_RD)
        scale = getattr(config, "logit_scale", None)  # Cohere
        if scale is not None:
            logits_RV = logits_RV * scale
        divisor = getattr(config, "logits_scaling", None)  # Granite
        if divisor is not None:
            logits_RV = logits_RV / divisor
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        if cap is not None:
            logits_RV = torch.tanh(logits_RV / cap) * cap
        return logits_RV

    def _check_lengths(self, texts: Sequence[np.ndarray]) -> None:
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        long = [len(tokens_N) for tokens_N in texts if most and len(tokens_N) > most]
        if long:
            raise ValueError(
                f"texts of {', '.join(map(str, long))} tokens; {self.name} accepts up to {most}. "
                "Split the documents, or take a model with a longer context."
            )

    @torch.inference_mode()
    def _check_logits(self) -> None:
        """Compare with the model's own forward: an unknown rescaling must not pass unseen."""
        ids_BN = torch.arange(2)[None]
        ours_NV = self._logits(self._decode(ids_BN, torch.ones_like(ids_BN))[0]).float()
        if ours_NV.shape[1] < self.vocabulary:
            raise ValueError(
                f"vocabulary: got {self.vocabulary}; {self.name} knows {ours_NV.shape[1]} tokens: "
                "tokenizer and model do not belong together."
            )
        own_NV = self.model(input_ids=ids_BN.to(self.model.device)).logits[0].float()
        apart = float((ours_NV - own_NV).abs().max())
        if not apart <= OWN_TOLERANCE * max(float(own_NV.abs().max()), 1e-6):
            raise ValueError(
                f"{self.name} ({type(self.model).__name__}) makes its logits in a way not known "
                f"here: they are {apart:.3g} from the head's. Accepted: a linear head with "
                "logit_scale, logits_scaling or final_logit_softcapping, as in Llama, Qwen, "
                "Cohere, Granite and Gemma. Serve this model with vLLM and use the served teacher."
            )


def _folder(path: str | Path) -> Path:
    """The folder itself, or where the hub's files lie on this machine."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = ["*.safetensors", "*.safetensors.index.json", "config.json"]
        return Path(snapshot_download(str(path), allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"teacher: got {str(path)!r}, which is no folder, and the Hugging Face hub does not "
            f"give it either ({type(error).__name__}); accepted: a folder that save_pretrained() "
            "wrote, or a model's name on the hub."
        ) from None


def _config(model: PreTrainedModel) -> str:
    """What of the configuration bears on the logits; not by whom and where it was written."""
    told = model.config.to_dict()
    told = {key: told[key] for key in told if key not in ("transformers_version", "_name_or_path")}
    return json.dumps(told, sort_keys=True, default=str)
