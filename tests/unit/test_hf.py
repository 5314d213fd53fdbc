"""The transformers processor: the same law through a real `generate()`."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from dftserve.hf import DiversityProcessor, sampling
from dftserve.sampling import TokenClasses
from dftserve.sampling.draws import draw_key
from dftserve.sampling.token_classes import IN_WORD
from tests.conftest import long
from tests.future import no_future_warnings
from tests.group_reference import cut_reference as codes_cut_reference
from tests.group_reference import drawn_reference, first_code_reference
from tests.profiles import random_profile
from tests.reference import cut_reference, draw_reference, reference, words_reference
from tests.style_reference import style_reference

pytestmark = no_future_warnings

EOS = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=301,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(40)
    return model


def generate(model, prompt, processor, config, seed=0):
    torch.manual_seed(seed)
    processors = LogitsProcessorList([processor] if processor else [])
    return model.generate(
        prompt,
        logits_processor=processors,
        generation_config=config,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )


@pytest.mark.parametrize("draws", [30, long(200)])
def test_generate_samples_the_law(model, draws):
    random = np.random.default_rng(0)
    for draw in range(draws):
        t = float(random.uniform(0.3, 1.8))
        diversity = {"level": float(random.uniform(0.01, 1))}
        if draw % 4 == 0:
            diversity |= {"law": "dynatemp", "dynatemp_range": float(random.uniform(0.1, 1))}
        processor = DiversityProcessor(diversity, temperature=t, stop_ids=[EOS])
        prompt = torch.tensor(random.integers(4, 301, size=(2, 5)))
        out = generate(model, prompt, processor, sampling(t, max_new_tokens=1))
        for r in range(2):
            expected = reference(
                out.logits[0][r].numpy(), temperature=t, stop_ids={EOS}, **diversity
            )
            if expected.margin < 1e-4:
                continue
            got_V = torch.log_softmax(out.scores[0][r].double(), 0).numpy()
            assert (np.isinf(got_V) == np.isinf(expected.log_p_V)).all()
            likely_V = expected.log_p_V > -25
            np.testing.assert_allclose(got_V[likely_V], expected.log_p_V[likely_V], atol=2e-4)
            assert processor.statistics.entropy_after_R[r] == pytest.approx(
                expected.entropy_after, abs=1e-3
            )


def test_nothing_is_cut_after_the_processor(model):
    """transformers cuts to 50 tokens by default; `sampling` must not."""
    prompt = torch.tensor([[5, 6, 7]])
    wide = DiversityProcessor({"level": 1, "min_p": 1e-9})
    out = generate(model, prompt, wide, sampling(max_new_tokens=1))
    kept = int((out.scores[0][0] > -math.inf).sum())
    expected = int((out.logits[0][0] >= out.logits[0][0].max() + math.log(1e-9)).sum())
    assert kept == expected > 50


def test_diversity_0_changes_nothing(model):
    prompt = torch.tensor([[5, 6, 7]])
    config = sampling(max_new_tokens=12)
    plain = generate(model, prompt, None, config).sequences
    off = generate(model, prompt, DiversityProcessor(0), config).sequences
    assert torch.equal(plain, off)


def test_budget_meets_its_target():
    """Random rows replace a model: their entropies are spread around two nats."""
    torch.manual_seed(0)
    natural = _mean_entropy({"level": 0.001})
    for share in (0.7, 1.1):
        diversity = {"law": "budget", "target_entropy": share * natural}
        assert _mean_entropy(diversity) == pytest.approx(share * natural, rel=0.1)


def _mean_entropy(diversity, rows=4, steps=200):
    """The mean entropy that a processor reaches over sequences of random logits."""
    processor = DiversityProcessor(diversity, stop_ids=[EOS])
    entropies, text_RL = [], torch.zeros(rows, 5, dtype=torch.int64)
    for _ in range(steps):
        scores_RV = processor(text_RL, torch.randn(rows, 301) * 2.5)
        text_RL = torch.cat((text_RL, scores_RV.argmax(dim=1, keepdim=True)), dim=1)
        entropies.append(processor.statistics.entropy_after_R.mean().item())
    return float(np.mean(entropies))


def words_tokenizer():
    """For the model's vocabulary: words with and without a leading blank, marks and digits."""
    pieces = ["<s>", "<pad>", "<unk>", "</s>"]
    for n in range(297):
        text = f"{chr(97 + n % 26)}{chr(97 + n // 26)}"
        pieces.append((f"Ġ{text}", text, f"'{text}", f"{n}", f"!{n}")[n % 5])
    made = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>")


def test_generate_samples_the_law_words(model):
    """After a prompt that ends in a word, in a blank, and in a special token."""
    tokenizer = words_tokenizer()
    classes = TokenClasses.from_tokenizer(tokenizer)
    assert len({*classes.classes_after(IN_WORD)}) == 3
    for level, last in itertools.product((0.3, 1.0), (5, 4, 8, 0)):
        diversity = {"law": "words", "level": level}
        processor = DiversityProcessor(
            diversity, temperature=0.8, stop_ids=[EOS], tokenizer=tokenizer
        )
        prompt = torch.tensor([[7, 9, last]])
        out = generate(model, prompt, processor, sampling(0.8, max_new_tokens=1))
        class_V = classes.classes_after(int(classes.states()[last]))
        expected = words_reference(
            out.logits[0][0].numpy(), class_V, temperature=0.8, level=level, stop_ids={EOS}
        )
        assert expected.margin > 1e-4
        got_V = torch.log_softmax(out.scores[0][0].double(), 0).numpy()
        assert (np.isinf(got_V) == np.isinf(expected.log_p_V)).all()
        likely_V = expected.log_p_V > -25
        np.testing.assert_allclose(got_V[likely_V], expected.log_p_V[likely_V], atol=2e-4)


@pytest.mark.parametrize(
    "diversity",
    [
        {"law": "guard", "min_p": 0.05},
        {"law": "top_n_sigma", "n_sigma": 1.5},
        {"law": "xtc", "xtc_probability": 0.5, "xtc_threshold": 0.05},
    ],
    ids=lambda diversity: diversity["law"],
)
def test_generate_samples_the_truncating_laws(model, diversity):
    """Each row of a batch and each step has its own draw, given by the seed."""
    processor = DiversityProcessor(diversity, temperature=0.8, stop_ids=[EOS], seed=7)
    prompt = torch.tensor([[7, 9, 5], [4, 8, 6]])
    config = sampling(0.8, max_new_tokens=8, eos_token_id=None)
    out = generate(model, prompt, processor, config)
    for step, (logits_RV, scores_RV) in enumerate(zip(out.logits, out.scores, strict=True)):
        for r in range(2):
            draw = draw_reference(draw_key(7, r), 3 + step)
            expected = cut_reference(
                logits_RV[r].numpy(), temperature=0.8, stop_ids={EOS}, draw=draw, **diversity
            )
            if expected.margin < 1e-4:
                continue
            got_V = torch.log_softmax(scores_RV[r].double(), 0).numpy()
            assert (np.isinf(got_V) == np.isinf(expected.log_p_V)).all()
            likely_V = expected.log_p_V > -25
            np.testing.assert_allclose(got_V[likely_V], expected.log_p_V[likely_V], atol=2e-4)


def test_without_a_seed_each_text_draws_differently():
    diversity = {"law": "xtc", "xtc_probability": 0.5, "xtc_threshold": 0.1}
    scores_RV = torch.tensor([[0.5, 0.3, 0.2]]).log()

    def excluded(processor):
        texts = [torch.zeros(1, 5 + step, dtype=torch.int64) for step in range(64)]
        return [bool(processor(text, scores_RV)[0, 0] == -torch.inf) for text in texts]

    seeded, free = DiversityProcessor(diversity, seed=1), DiversityProcessor(diversity)
    assert excluded(seeded) == excluded(seeded) != excluded(DiversityProcessor(diversity, seed=2))
    assert excluded(free) != excluded(free)


def test_rows_with_equal_prompts_are_a_group(model):
    """Four texts for each of two prompts: four codes draw their first tokens from the law of
    `reference`, after the processor's own cuts."""
    diversity = {"level": 0.5, "group": True}
    prompts = torch.tensor([[5, 6, 7]] * 4 + [[8, 9, 10]] * 4)
    for cuts in ({}, {"top_k": 3}):
        processor = DiversityProcessor(diversity, stop_ids=EOS, seed=11, **cuts)
        output = generate(model, prompts, processor, sampling(max_new_tokens=3))
        for row in range(8):
            law = reference(
                output.logits[0][row].numpy(), temperature=1.0, level=0.5, stop_ids=frozenset([EOS])
            )
            code = first_code_reference(f"11 {row // 4}", row % 4, 4)
            p_V = codes_cut_reference(np.exp(law.log_p_V), **cuts)
            token, _ = drawn_reference(p_V, code)
            assert output.sequences[row, 3] == token
        other = generate(model, prompts, processor, sampling(max_new_tokens=3), seed=1)
        assert torch.equal(other.sequences[:, 3], output.sequences[:, 3])


@pytest.mark.parametrize(
    "diversity", [{"level": 0.5, "group": True}, {"law": "budget", "target_entropy": 2.0}]
)
def test_a_call_whose_prompt_is_one_token_longer_is_a_new_call(diversity):
    """With the same number of rows; the result is that of a fresh processor."""
    scores_RV = torch.randn(2, 301, generator=torch.Generator().manual_seed(0)) * 3
    used, fresh = (DiversityProcessor(diversity, seed=5) for _ in range(2))
    for length in range(3, 60):
        used(torch.full((2, length), 9), scores_RV)
    prompt = torch.full((2, 60), 11)
    for text in (prompt, torch.nn.functional.pad(prompt, (0, 1), value=12)):
        assert torch.equal(used(text, scores_RV), fresh(text, scores_RV))


def steps_of(processor, texts, scores_RV):
    return torch.stack([processor(text, scores_RV) for text in texts])


def test_a_prompt_with_a_token_that_could_not_be_drawn_is_a_new_call():
    """Its text is the last one and one token more; an ended row may be padded with any token."""
    scores_RV = torch.tensor([[5.0, 3.0, 2.0, 0.0]] * 2).log()
    processor = DiversityProcessor({"law": "xtc", "xtc_probability": 0.5, "xtc_threshold": 0.1})
    steps_of(processor, [torch.full((2, length), 2) for length in range(3, 6)], scores_RV)
    begun = processor._controls
    for appended, is_new in (([2, 2], False), ([2, 3], False), ([3, 2], False), ([3, 3], True)):
        text = torch.cat((processor._ids_RL, torch.tensor(appended)[:, None]), dim=1)
        processor(text, scores_RV)
        assert (processor._controls is not begun) == is_new, appended


def test_after_a_reset_the_next_step_is_a_new_call():
    """As with a fresh processor; without a reset, the text of an earlier call is continued."""
    diversity = {"law": "budget", "target_entropy": 0.9}
    scores_RV = torch.randn(2, 301, generator=torch.Generator().manual_seed(0)) * 3
    best_R1 = scores_RV.argmax(dim=1, keepdim=True)
    reset, fresh, not_reset = (DiversityProcessor(diversity) for _ in range(3))
    for used in (reset, not_reset):
        steps_of(used, [best_R1.expand(2, length) for length in range(3, 60)], scores_RV)
    reset.reset()
    prompt = best_R1.expand(2, 60)
    wanted_RV = fresh(prompt, scores_RV)
    assert torch.equal(reset(prompt, scores_RV), wanted_RV)
    assert not torch.equal(not_reset(prompt, scores_RV), wanted_RV)


def test_the_object_form_of_group_is_refused():
    group = {"id": "a", "index": 0, "size": 2}
    with pytest.raises(ValueError, match=r"diversity\.group: got the object form; accepted: true"):
        DiversityProcessor({"level": 0.5, "group": group})


def test_words_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenizer: got none; accepted: the model's tokenizer"):
        DiversityProcessor({"law": "words", "level": 0.5})


def test_a_wrong_diversity_is_refused():
    with pytest.raises(ValueError, match="level"):
        DiversityProcessor(1.5)


@pytest.mark.parametrize("temperature", [0, 0.0, -1, float("nan")])
def test_a_wrong_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        DiversityProcessor(0.5, temperature=temperature)


def test_stop_ids_are_accepted_in_the_forms_of_configurations():
    """`eos_token_id` is a number, a list or None, and tokenizers return None."""
    for given, ids in ((EOS, [EOS]), (None, []), ([EOS, None, 7], [EOS, 7]), ({EOS}, [EOS])):
        processor = DiversityProcessor(0.5, stop_ids=given)
        same = DiversityProcessor(0.5, stop_ids=ids)
        scores_RV = torch.randn(2, 301, generator=torch.Generator().manual_seed(0)) * 3
        rows = torch.tensor([[5], [6]])
        assert torch.equal(processor(rows, scores_RV), same(rows, scores_RV))
    for wrong in (["</s>"], [-1], [True]):
        with pytest.raises(ValueError, match="accepted: token ids"):
            DiversityProcessor(0.5, stop_ids=wrong)


def test_beams_are_refused(model):
    with pytest.raises(ValueError, match=r"num_beams: got 4; accepted: 1"):
        sampling(num_beams=4)
    config = sampling(max_new_tokens=2)
    config.num_beams = 2
    prompt = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="several beams; accepted: 1"):
        generate(model, prompt, DiversityProcessor(0.5, stop_ids=EOS), config)
    config.num_beams, config.num_return_sequences = 1, 2
    generate(model, prompt, DiversityProcessor(0.5, stop_ids=EOS), config)


def toy_style(vocabulary=301):
    """A profile whose phrases consist of the tokens 0 to 3."""
    profile = random_profile(7, vocabulary)
    return SimpleNamespace(**vars(profile), name="toy", strength=1.0, max_kl=0.05), profile


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_a_style_depends_on_the_answer_of_each_row_and_matches_fp64(model, strength):
    """Two rows with different prompts; a phrase that one prompt begins does not count."""
    style, profile = toy_style()
    request = {"name": "toy", "strength": strength}
    processor = DiversityProcessor(
        0, temperature=0.8, stop_ids=EOS, style=request, profiles=[style], seed=0
    )
    prompt = torch.tensor([[5, 0, 1], [9, 8, 7]])
    # Logits under which phrases are likely.
    logits_TRV = torch.randn(5, 2, 301, generator=torch.Generator().manual_seed(1))
    logits_TRV[..., :4] += 3
    answer_RT = torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 2, 2]])
    spent_R = [0.0, 0.0]
    for t, logits_RV in enumerate(logits_TRV):
        text_RL = torch.cat((prompt, answer_RT[:, :t]), dim=1)
        got_RV = processor(text_RL, logits_RV)
        for r in range(2):
            answer, before = answer_RT[r, :t].tolist(), int(text_RL[r, -1])
            expected = style_reference(
                logits_RV[r].numpy(),
                profile.factors(answer),
                profile.delta_VV[before],
                temperature=0.8,
                log_guard=math.log(0.05),
                strength=strength,
                allowance=style.max_kl * (t + 1) - spent_R[r],
                stop_ids={EOS},
            )
            assert expected.margin > 1e-4
            spent_R[r] += expected.tilt_kl
            log_p_V = (got_RV[r] / 0.8).log_softmax(0).double().numpy()
            kept_V = np.isfinite(expected.log_p_V)
            assert (np.isfinite(log_p_V) == kept_V).all(), (t, r)
            np.testing.assert_allclose(log_p_V[kept_V], expected.log_p_V[kept_V], atol=2e-3)
    assert min(spent_R) > 0


def test_a_style_that_is_off_leaves_the_rows_and_a_wrong_one_is_refused():
    style, _ = toy_style()
    off = DiversityProcessor(0, style={"name": "toy", "strength": 0}, profiles=[style])
    scores = torch.randn(2, 301)
    assert off(torch.tensor([[1], [2]]), scores) is scores
    with pytest.raises(ValueError, match=r"style\.name: got 'other'; accepted: toy"):
        DiversityProcessor(0, style="other", profiles=[style])
    with pytest.raises(ValueError, match="give `profiles`"):
        DiversityProcessor(0, style="toy")
    with pytest.raises(ValueError, match="with the law 'xtc'"):
        DiversityProcessor({"law": "xtc", "xtc_probability": 0.5}, style="toy", profiles=[style])
