"""The teacher, compared with the model's forward, for single documents and batches."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dftserve.targets.document import Document
from dftserve.targets.teacher import Teacher

V = 97
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ),
    # Far below the size of the logits, so that a missing cap is noticed.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
}


def model_of(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def document(length, seed=0, vocabulary=V):
    rng = np.random.default_rng(seed)
    trained_N = rng.random(length) < 0.7
    trained_N[0], trained_N[-1] = False, True
    return Document(rng.integers(0, vocabulary, length).astype(np.int32), trained_N)


def rows_of(source, doc):
    return source.read([doc])[0](0, len(doc.positions_T))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_equal_those_of_the_model(kind, temperature):
    model, doc = model_of(kind), document(20)
    with torch.no_grad():
        logits_NV = model(torch.from_numpy(doc.tokens_N.astype(np.int64))[None]).logits[0]
    expected_TV = (logits_NV.double()[doc.positions_T - 1] / temperature).log_softmax(1)
    found_TV = rows_of(Teacher(model, vocabulary=V, name="m", temperature=temperature), doc)
    assert found_TV.dtype == torch.float32
    torch.testing.assert_close(found_TV.double(), expected_TV, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_rows_do_not_depend_on_the_batch(kind):
    teacher = Teacher(model_of(kind), vocabulary=V, name="m")
    docs = [document(length, seed) for seed, length in enumerate([5, 30, 2, 17])]
    for doc, rows in zip(docs, teacher.read(docs), strict=True):
        torch.testing.assert_close(
            rows(0, len(doc.positions_T)), rows_of(teacher, doc), atol=2e-5, rtol=1e-5
        )


def test_chunks_equal_the_whole():
    teacher, doc = Teacher(model_of("llama"), vocabulary=V, name="m"), document(30)
    rows, count = teacher.read([doc])[0], len(doc.positions_T)
    parts = [rows(start, min(start + 4, count)) for start in range(0, count, 4)]
    torch.testing.assert_close(torch.cat(parts), rows(0, count), atol=1e-5, rtol=1e-5)


def test_padded_columns_have_no_probability():
    teacher, doc = Teacher(model_of("llama"), vocabulary=90, name="m"), document(20, vocabulary=90)
    logprobs_TV = rows_of(teacher, doc)
    assert logprobs_TV.shape[1] == 90
    assert float(logprobs_TV.logsumexp(1).abs().max()) < 1e-5


def test_a_saved_model_gives_the_same_rows(tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path / "base")
    loaded = Teacher.load(tmp_path / "base", vocabulary=V, device="cpu")
    doc = document(20)
    torch.testing.assert_close(
        rows_of(loaded, doc), rows_of(Teacher(model, vocabulary=V, name="m"), doc)
    )
    assert loaded.describe()["name"] == "base"
    again = Teacher.load(tmp_path / "base", vocabulary=V, device="cpu")
    assert again.describe() == loaded.describe()


def test_descriptions_of_different_weights_differ():
    first = Teacher(model_of("llama"), vocabulary=V, name="m").describe()
    same = Teacher(model_of("llama"), vocabulary=V, name="m").describe()
    changed = model_of("llama")
    with torch.no_grad():
        changed.lm_head.weight[3, 5] += 0.5
    assert first == same
    assert Teacher(changed, vocabulary=V, name="m").describe() != first


def test_invalid_arguments_are_refused(tmp_path):
    teacher = Teacher(model_of("llama"), vocabulary=V, name="m")
    with pytest.raises(ValueError, match="texts of 70, 65 tokens; m accepts up to 64"):
        teacher.read([document(70), document(10), document(65)])
    with pytest.raises(ValueError, match="temperature"):
        Teacher(model_of("llama"), vocabulary=V, name="m", temperature=0.0)
    with pytest.raises(ValueError, match="vocabulary"):
        Teacher(model_of("llama"), vocabulary=V + 1, name="m")
    model_of("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safetensors"):
        Teacher.load(tmp_path, vocabulary=V)


def test_unknown_rescaling_of_logits_is_refused():
    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kw):
            output = super().forward(*args, **kw)
            output.logits = output.logits * 1.5
            return output

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="unsupported way"):
        Teacher(Odd(LlamaConfig(**SIZES)), vocabulary=V, name="m")


class Moved(TorchFunctionMode):
    """Records the number of elements of each tensor that is moved to the CPU or to NumPy."""

    def __init__(self):
        self.sizes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.cpu, torch.Tensor.numpy):
            self.sizes.append(args[0].numel())
        return function(*args, **(kwargs or {}))


def test_only_the_kept_targets_leave_the_device():
    teacher, doc = Teacher(model_of("llama"), vocabulary=V, name="m"), document(30)
    with Moved() as moved:
        targets = teacher.targets([doc], k=4, draws=3, seeds=[0])[0]
    assert len(targets) == len(doc.positions_T)
    assert moved.sizes
    assert max(moved.sizes) == 4 * len(doc.positions_T)
