"""The law `words` in the plug-in: the last token of each row on both runners, and refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dftserve_vllm import engine, vocabulary
from dftserve_vllm.processor import DiversityProcessor
from dftserve_vllm.v1 import V1Processor
from dftserve_vllm.v2 import V2Processor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor.interface import BatchUpdate

from dftserve.sampling import Controls, TokenClasses, control_row, get_backend, transform
from dftserve.spec import parse
from tests.vllm_config import config
from tests.vllm_requests import params_of

V = 40
WORDS = {"law": "words", "level": 0.8}
# Cycles through the classes, and through texts that end outside a word, inside one, or at a joiner.
PACKED_V = np.array([0b00_10_01 | (v % 3) << 6 if v % 2 else v % 3 * 21 for v in range(V)])
CLASSES = TokenClasses(PACKED_V.astype(np.uint8))


@pytest.fixture(autouse=True)
def classes(monkeypatch):
    monkeypatch.setattr(vocabulary, "token_classes", lambda vllm_config: CLASSES)


def params(diversity=WORDS):
    return SamplingParams(temperature=0.9, extra_args={"diversity": diversity})


def expected(logits_RV, last, *, logits_divisor=1.0, diversity=WORDS):
    """The rows after these last tokens, computed by the transform."""
    after_RV = logits_RV.clone()
    row = control_row(
        parse(diversity), temperature=0.9, logits_divisor=logits_divisor, stop_ids=frozenset()
    )
    controls = Controls.stack([row] * len(after_RV)).after(torch.tensor(last))
    transform(after_RV, controls, None, get_backend("cpu", token_classes=CLASSES))
    return after_RV


def test_v1_reads_the_last_token_of_the_prompt_and_then_of_the_output():
    outputs = [[], [5]]
    processor = V1Processor(config(), torch.device("cpu"), False)
    added = [(0, params(), [7, 3], outputs[0]), (1, params(), None, outputs[1])]
    processor.update_state(BatchUpdate(2, removed=[], added=added, moved=[]))
    torch.manual_seed(0)
    for last in ([3, 5], [9, 1], [11, 2]):
        logits_RV = torch.randn(2, V)
        after_RV = logits_RV.clone()
        processor.apply(after_RV)
        assert torch.equal(after_RV, expected(logits_RV, last, logits_divisor=0.9))
        other = [token + 2 for token in last]
        assert not torch.equal(after_RV, expected(logits_RV, other, logits_divisor=0.9))
        for output, token in zip(outputs, {3: [9, 1], 9: [11, 2]}.get(last[0], []), strict=False):
            output.append(token)
    assert processor.state.faults == 0


def test_v1_treats_a_prompt_of_embeddings_as_ending_outside_a_word():
    processor = V1Processor(config(), torch.device("cpu"), False)
    added = [(0, params(), None, [])]
    processor.update_state(BatchUpdate(1, removed=[], added=added, moved=[]))
    logits_RV = torch.randn(1, V)
    after_RV = logits_RV.clone()
    processor.apply(after_RV)
    assert torch.equal(after_RV, expected(logits_RV, [-1], logits_divisor=0.9))


def test_v2_reads_each_rows_input_token_including_drafts():
    """Two requests; the first has two drafts and so three rows, each after its own input token."""
    states = SimpleNamespace(
        max_num_reqs=4,
        device=torch.device("cpu"),
        prefill_len=SimpleNamespace(np=np.ones(4, int), gpu=torch.ones(4)),
        prompt_len=SimpleNamespace(np=np.ones(4, int)),
    )
    speculative = SimpleNamespace(num_speculative_tokens=2)
    given = config()
    given.speculative_config = speculative
    processor = V2Processor(given, states)
    assert processor.add_request(1, params())
    assert processor.add_request(2, params())
    processor.apply_staged_writes()
    context = SimpleNamespace(
        idx_mapping_np=np.array([1, 2]),
        expanded_idx_mapping=torch.tensor([1, 1, 1, 2]),
        expanded_local_pos=torch.tensor([0, 1, 2, 0]),
        pos=torch.tensor([4, 5, 6, 9]),
        input_ids=torch.tensor([3, 4, 5, 7], dtype=torch.int32),
    )
    logits_RV = torch.randn(4, V)
    after_RV = logits_RV.clone()
    processor.apply(after_RV, context)
    assert processor.state.faults == 0
    assert torch.equal(after_RV, expected(logits_RV, [3, 4, 5, 7]))


def engine_config(*, v2=False, asynchronous=False, processors=None):
    return SimpleNamespace(
        model_config=SimpleNamespace(
            is_diffusion=False, override_generation_config={}, logits_processors=processors
        ),
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
        speculative_config=None,
        use_v2_model_runner=v2,
    )


class Tokenizer:
    """A tokenizer whose tokens are bytes."""

    def get_vocab(self):
        return {b"a": 0, b" a": 1}


@pytest.mark.parametrize(
    ("given", "tokenizer", "names"),
    [
        (engine_config(), None, "--skip-tokenizer-init"),
        (engine_config(), object(), "of no known form"),
        (engine_config(asynchronous=True), Tokenizer(), "--no-async-scheduling"),
    ],
    ids=["no tokenizer", "unknown", "V1, asynchronous"],
)
def test_words_is_refused_with_a_reason_and_other_laws_are_not(
    monkeypatch, given, tokenizer, names
):
    monkeypatch.setattr(engine, "_config", given)
    monkeypatch.setattr("vllm.tokenizers.cached_tokenizer_from_config", lambda config: tokenizer)
    with pytest.raises(VLLMValidationError, match=names):
        params_of(diversity=WORDS)
    with pytest.raises(ValueError, match=names):
        DiversityProcessor.validate_params(params())
    assert params_of(diversity=0.5).extra_args["diversity"]["law"] == "gated"
    assert params_of(diversity={"law": "words", "level": 0}).extra_args is None


@pytest.mark.parametrize(
    "given",
    [
        engine_config(),
        engine_config(v2=True, asynchronous=True),
        engine_config(asynchronous=True, processors=["ours"]),
    ],
    ids=["V1", "V2", "V1 by flag"],
)
def test_words_is_accepted(monkeypatch, given):
    monkeypatch.setattr(engine, "_config", given)
    monkeypatch.setattr("vllm.tokenizers.cached_tokenizer_from_config", lambda config: Tokenizer())
    assert params_of(diversity=WORDS).extra_args["diversity"]["law"] == "words"
