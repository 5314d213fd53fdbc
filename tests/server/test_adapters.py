"""LoRA adapters at several strengths, served by vLLM on a CPU together with their base.

Each token's probabilities are those of transformers and peft at the same scale, and `style` selects
an adapter.
"""

import json
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from dftserve.adapter_strengths import flags, scale
from dftserve.spec import LONGEST_NAME
from dftserve.stories.grammar import generate
from tests.client import chat_body, gather, get, post, sync_client
from tests.conftest import engine_running
from tests.reference import reference
from tests.served_distribution import (
    LOG_PROBABILITY,
    NATS,
    NEAR_THRESHOLD,
    complete,
    plain,
    sampled_tokens,
    served_log_p,
    stop_ids,
    vocabulary_of,
    worst_difference,
)

pytestmark = pytest.mark.long

RANK, ALPHA = 8, 8
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
LEAST_DIFFERENCE = 0.3
"""Nats by which the most changed token of each step must differ between two strengths."""
SCALES = {"demo": 0.0, "tales-0.5": 0.5, "tales-1": 1.0}
"""The adapter's scale by the requested model."""
TOKENS = 4


@pytest.fixture(scope="module")
def tuned(model_folder, tmp_path_factory):
    """The test model with a random LoRA, in float32, and the folder of that LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("lora") / "tales"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def adapted(model_folder, tuned, styles_folder, tmp_path_factory):
    """An engine with the style profile `habits` and the LoRA at two strengths."""
    path = tmp_path_factory.mktemp("adapted")
    folders = scale(tuned[1], [0.5, 1.0], path / "adapters")
    env = {"DFTSERVE_STYLES": str(styles_folder)}
    with engine_running("v1", model_folder, path, *shlex.split(flags(folders)), env=env) as engine:
        yield engine


def logits_LV(tuned, scale: float, tokens: list[int]) -> np.ndarray:
    """Logits of transformers and peft after each token, with the LoRA at this scale."""
    from peft.tuners.lora import LoraLayer

    model, _ = tuned
    layers = [each for each in model.modules() if isinstance(each, LoraLayer)]
    assert len(layers) == len(TARGETS) * model.config.num_hidden_layers
    for layer in layers:
        layer.scaling["default"] = scale * ALPHA / RANK
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().numpy()


def log_p(logits_V: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.tensor(logits_V), -1).numpy()


def prompts(engine, count: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(engine.model_folder) / "tokenizer.json"))
    source = random.Random(5)
    texts = (generate(source).text.split() for _ in range(count))
    return [tokenizer.encode(" ".join(words[: source.randrange(3, 20)])).ids for words in texts]


def test_each_strength_in_one_batch_is_peft_s(adapted, tuned, record_values):
    vocabulary, worst, least_change = vocabulary_of(adapted), dict.fromkeys(SCALES, 0.0), np.inf
    cases = [(name, prompt) for prompt in prompts(adapted, 5) for name in SCALES]
    shaping = {"max_tokens": TOKENS, "ignore_eos": True}
    bodies = [plain(prompt, **shaping) | {"model": name} for name, prompt in cases]
    answers = complete(adapted, bodies, vocabulary)
    for (name, prompt), answer in zip(cases, answers, strict=True):
        assert answer.json()["model"] == name
        text = [*prompt, *sampled_tokens(answer.json()["choices"][0])]
        rows = {each: logits_LV(tuned, s, text)[len(prompt) - 1 :] for each, s in SCALES.items()}
        for step in range(TOKENS):
            served_V = served_log_p(answer, vocabulary, step)
            error = float(np.abs(served_V - log_p(rows[name][step])).max())
            worst[name] = max(worst[name], error)
            others = [log_p(rows[each][step]) for each in SCALES if each != name]
            least_change = min(least_change, *(np.abs(served_V - other).max() for other in others))
    record_values(steps=len(cases) * TOKENS, worst_logprob=worst, least_change=float(least_change))
    assert max(worst.values()) <= LOG_PROBABILITY, worst
    assert least_change >= LEAST_DIFFERENCE


def test_the_field_goes_by_the_adapter_s_logits(adapted, tuned, record_values):
    vocabulary, worst, checked = vocabulary_of(adapted), 0.0, 0
    stops = stop_ids(adapted)
    cases = [(name, prompt) for prompt in prompts(adapted, 5) for name in SCALES]
    bodies = [
        {"prompt": prompt, "model": name, "diversity": 0.5, "temperature": 0.8}
        for name, prompt in cases
    ]
    for (name, prompt), answer in zip(cases, complete(adapted, bodies, vocabulary), strict=True):
        logits_V = logits_LV(tuned, SCALES[name], prompt)[-1]
        expected = reference(logits_V, temperature=0.8, level=0.5, stop_ids=stops)
        if expected.margin < NEAR_THRESHOLD:
            continue
        checked += 1
        sampled_V = served_log_p(answer, vocabulary)
        worst = max(worst, worst_difference(sampled_V, expected.log_p_V, name))
        statistics = answer.json()["diversity"]["choices"][0]
        assert statistics["mean_entropy_before"] == pytest.approx(expected.entropy_before, abs=NATS)
        assert statistics["mean_entropy_after"] == pytest.approx(expected.entropy_after, abs=NATS)
        assert statistics["mean_temperature"] == pytest.approx(expected.temperature, rel=1e-4)
    record_values(checked=checked, worst_logprob=worst)
    assert checked > len(cases) // 2


STYLES = {
    "as trained": ("tales", {"name": "tales", "strength": 1.0}, 1.0),
    "nearest": ({"name": "tales", "strength": 0.6}, {"name": "tales", "strength": 0.6}, 0.5),
    "of two as near": (
        {"name": "tales", "strength": 0.75},
        {"name": "tales", "strength": 0.75},
        0.5,
    ),
}


@pytest.mark.parametrize("case", STYLES)
@pytest.mark.parametrize("diversity", [None, 0.5])
def test_a_style_takes_the_nearest_adapter(adapted, tuned, case, diversity):
    style, echoed, strength = STYLES[case]
    vocabulary, (prompt,) = vocabulary_of(adapted), prompts(adapted, 1)
    taken = f"tales-{strength:g}"
    body = plain(prompt) | {"style": style}
    body |= {} if diversity is None else {"diversity": diversity}
    by_style, by_model = complete(
        adapted,
        [body, {k: v for k, v in body.items() if k != "style"} | {"model": taken}],
        vocabulary,
    )
    content = by_style.json()
    assert content["model"] == taken
    assert content["style"] == echoed | {"adapter": taken, "effective_strength": strength}
    assert json.loads(by_style.headers["x-dftserve-style"]) == content["style"]
    assert ("diversity" in content) == (diversity is not None)
    got_V, expected_V = (served_log_p(answer, vocabulary) for answer in (by_style, by_model))
    np.testing.assert_allclose(got_V, expected_V, atol=LOG_PROBABILITY)
    if diversity is None:
        own_V = log_p(logits_LV(tuned, strength, prompt)[-1])
        np.testing.assert_allclose(got_V, own_V, atol=LOG_PROBABILITY)


ROUTES = {
    "/v1/chat/completions": chat_body(max_tokens=4),
    "/v1/chat/completions/batch": {"model": "demo", "max_tokens": 4}
    | {"messages": [[{"role": "user", "content": text}] for text in ("One", "Two")]},
    "/v1/completions": {"model": "demo", "prompt": ["Once", "Then"], "max_tokens": 4, "n": 2},
    "/v1/responses": {"model": "demo", "input": "Once", "max_output_tokens": 4},
    "/v1/messages": {"model": "demo", "max_tokens": 4}
    | {"messages": [{"role": "user", "content": "Once"}]},
}


def test_every_route_accepts_a_style_with_an_adapter(adapted):
    echo = {"name": "tales", "strength": 1.0, "adapter": "tales-1", "effective_strength": 1.0}
    fields = {"vllm_xargs": {"style": "tales"}}
    for (path, _), answer in zip(
        ROUTES.items(),
        gather(adapted, [(path, ROUTES[path] | fields) for path in ROUTES]),
        strict=True,
    ):
        assert answer.status_code == 200, (path, answer.text)
        assert answer.json()["style"] == echo, path


def test_streams_and_greedy_texts_use_and_report_the_adapter(adapted):
    client = sync_client(adapted)
    body = chat_body(max_tokens=4, temperature=0)
    with client.chat.completions.create(
        **body, stream=True, extra_body={"style": "tales"}
    ) as stream:
        chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {"tales-1"}
    assert chunks[-1].model_extra["style"]["adapter"] == "tales-1"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    by_model = post(adapted, "/v1/chat/completions", body | {"model": "tales-1"}).json()
    assert text == by_model["choices"][0]["message"]["content"]


REFUSED = [
    ({"style": "tale"}, "style.name", "accepted: habits, tales."),
    ({"style": {"name": "tales", "max_kl": 0.1}}, "style.max_kl", "none with an adapter"),
    ({"style": "tales", "model": "tales-0.5"}, "style.name", "selects the adapter 'tales-0.5'"),
    ({"style": "tales-1"}, "style.name", "accepted: habits, tales."),
    ({"style": "t" * (LONGEST_NAME + 1)}, "style.name", "characters"),
]


def test_invalid_styles_are_refused(adapted):
    body = {"model": "demo", "prompt": "Once", "max_tokens": 2}
    for fields, parameter, message in REFUSED:
        answer = post(adapted, "/v1/completions", body | fields)
        assert answer.status_code == 400, (fields, answer.text)
        assert answer.json()["error"]["param"] == parameter
        assert message in answer.json()["error"]["message"]
    beam = body | {"style": "tales", "use_beam_search": True, "n": 2}
    assert post(adapted, "/v1/completions", beam).json()["error"]["param"] == "style"


def test_strength_0_and_profiles_use_no_adapter(adapted):
    body = {"model": "demo", "prompt": "Once", "max_tokens": 4, "seed": 1}
    off, profile, both = (
        post(adapted, "/v1/completions", body | fields).json()
        for fields in (
            {"style": {"name": "tales", "strength": 0}},
            {"style": "habits"},
            {"style": "habits", "model": "tales-1"},
        )
    )
    assert (off["model"], off["style"]["strength"]) == ("demo", 0)
    assert (profile["model"], both["model"]) == ("demo", "tales-1")
    assert profile["style"]["choices"][0]["effective_strength"] >= 0
    assert both["style"]["choices"][0]["effective_strength"] >= 0


def test_capabilities_name_the_adapters(adapted):
    capabilities = get(adapted, "/v1/dft/capabilities").json()
    assert capabilities["adapters"] == {"tales": [0.5, 1.0]}
    assert capabilities["styles"] == ["habits"]
    assert capabilities["hooks_missing"] == {}
