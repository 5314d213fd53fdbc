"""The plug-in in deployments: in an existing environment, on vLLM 0.31, with speculative decoding,
on two ranks, and in run-batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.client import LIVELY, chat_body, gather, get, metric, post
from tests.conftest import SHIM, Engine, engine_running
from tests.environment import Environment, build_wheels, make_environment, uv
from tests.parity import test_groups

pytestmark = pytest.mark.long

NGRAM = json.dumps(
    {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> list[Path]:
    return build_wheels(tmp_path_factory.mktemp("wheels"))


def check_field(engine: Engine) -> None:
    """The field is honoured and reported, and a wrong value is refused."""
    body = chat_body(diversity=0.5, max_tokens=16, n=2)
    content = post(engine, "/v1/chat/completions", body).json()
    tokens = sum(choice["tokens"] for choice in content["diversity"]["choices"])
    assert tokens == content["usage"]["completion_tokens"]
    assert post(engine, "/v1/chat/completions", body | {"diversity": 2}).status_code == 400


def test_the_wheels_change_no_other_line_of_an_environment(bare_environment, wheels, record_values):
    before = bare_environment.frozen()
    bare_environment.install(*wheels)
    try:
        added = bare_environment.frozen() - before
        assert before <= bare_environment.frozen()
        names = {line.replace("-", "_").split(" ")[0].split("==")[0] for line in added}
        assert names == {"dftserve", "dftserve_vllm"}
        record_values(lines_before=len(before), changed=0, added=sorted(names))
    finally:
        _remove(bare_environment)
    assert bare_environment.frozen() == before


def _remove(environment: Environment) -> None:
    uv("pip", "uninstall", "--python", environment.python, "dftserve", "dftserve-vllm")


def test_no_wheel_contains_the_vllm_stub(wheels):
    import zipfile

    for wheel in wheels:
        names = zipfile.ZipFile(wheel).namelist()
        assert not [name for name in names if name.startswith(("vllm-", "vllm/"))]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_vllm_031(runner, wheels, model_folder, tmp_path, tmp_path_factory, record_values):
    environment = _environment_031(tmp_path_factory, wheels)
    with environment.serves(), engine_running(f"{runner}_031", model_folder, tmp_path) as engine:
        capabilities = get(engine, "/v1/dft/capabilities").json()
        assert capabilities["vllm"].startswith("0.31")
        assert capabilities["runner"].lower() == runner
        check_field(engine)
        record_values(vllm=capabilities["vllm"], runner=capabilities["runner"])


_made_031: list[Environment] = []


def _environment_031(tmp_path_factory, wheels: list[Path]) -> Environment:
    if not _made_031:
        environment = make_environment(tmp_path_factory.mktemp("vllm031"), "0.31.0")
        environment.install(*wheels)
        _made_031.append(environment)
    return _made_031[0]


def test_v2_with_speculative_decoding(model_folder, tmp_path, record_values):
    """With several rows per request and step, statistics count accepted tokens, `budget` meets its
    target, and a group's texts are those of their codes."""
    flags = ("--speculative-config", NGRAM)
    with engine_running("v2_ngram", model_folder, tmp_path, *flags) as engine:
        assert get(engine, "/v1/dft/capabilities").json()["speculative_decoding"] == "ngram"
        check_field(engine)
        free = chat_body(diversity={"level": 0.01}, max_tokens=256, **LIVELY)
        natural = _entropies(gather(engine, [("/v1/chat/completions", free)] * 8))
        target = 0.9 * natural
        with_budget = free | {"diversity": {"law": "budget", "target_entropy": target}}
        reached = _entropies(gather(engine, [("/v1/chat/completions", with_budget)] * 8))
        accepted = metric(engine, "vllm:spec_decode_num_accepted_tokens_total")
        assert accepted > 0, "no draft was accepted, so the test shows nothing"
        assert reached == pytest.approx(target, rel=0.1)
        group_tokens = test_groups.check(engine, 4)
        record_values(
            accepted_drafts=accepted, target=target, reached=reached, of_groups=group_tokens
        )


def _entropies(answers) -> float:
    """The mean entropy after the field; asserts that every accepted token is counted once."""
    means = []
    for answer in answers:
        content = answer.json()
        statistics = content["diversity"]["choices"][0]
        assert statistics["tokens"] == content["usage"]["completion_tokens"] == 256
        means.append(statistics["mean_entropy_after"])
    return float(np.mean(means))


def test_v1_with_speculative_decoding_refuses_the_field_with_the_reason(model_folder, tmp_path):
    flags = ("--speculative-config", NGRAM)
    with engine_running("v1_ngram", model_folder, tmp_path, *flags) as engine:
        refused = post(engine, "/v1/chat/completions", chat_body(diversity=0.5, max_tokens=4))
        assert refused.status_code == 400
        assert "V2" in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == "diversity"
        # No top_k: on a CPU, V1's own rejection sampler may read it from memory never written.
        neutral = {"top_k": 0, "top_p": 1.0}
        body = chat_body(diversity=0, max_tokens=4, **neutral)
        plain = post(engine, "/v1/chat/completions", body)
        assert plain.status_code == 200
        capabilities = get(engine, "/v1/dft/capabilities").json()
        assert capabilities["active"] is False


def test_two_ranks_agree(model_folder, tmp_path, record_values):
    """With tensor parallel size 2, seeded texts with the field are those of one rank."""
    folder = _even_heads(model_folder, tmp_path / "model")
    texts = {}
    for ranks in (1, 2):
        flags = (f"--tensor-parallel-size={ranks}",)
        env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))}
        with engine_running(f"v1_tp{ranks}", folder, tmp_path, *flags, env=env) as engine:
            check_field(engine)
            bodies = [chat_body(diversity=0.6, seed=seed, max_tokens=24) for seed in range(32)]
            answers = gather(engine, [("/v1/chat/completions", body) for body in bodies])
            texts[ranks] = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    same = sum(a == b for a, b in zip(texts[1], texts[2], strict=True))
    record_values(seeds=32, identical=same)
    # Two ranks sum in another order: a rare token may differ, a wrong rank would change all texts.
    assert same >= 30


def _even_heads(model_folder: Path, folder: Path) -> Path:
    """A model whose heads two ranks can share, with the stories' tokenizer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


def test_vllm_loads_the_plug_in_as_an_endpoint_plug_in(model_folder, tmp_path):
    """If VLLM_PLUGINS names the plug-in, vLLM itself adds the route, without a warning."""
    env = {"VLLM_PLUGINS": "dftserve"}
    with engine_running("v1", model_folder, tmp_path, env=env) as engine:
        check_field(engine)
        assert get(engine, "/v1/dft/capabilities").json()["active"]
        assert get(engine, "/v1/dft/capabilities", key=None).status_code == 401
        log = engine.log.read_text(errors="replace")
    assert "Loaded endpoint plugin dftserve" in log
    assert "VLLM_PLUGINS is not set" not in log


def test_run_batch_honours_or_refuses_the_field_by_line(model_folder, tmp_path):
    lines = [
        {
            "custom_id": str(value),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": chat_body(diversity=value, max_tokens=8) | {"model": str(model_folder)},
        }
        for value in (0.5, 1.5)
    ]
    input_file, output_file = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    input_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [
        *(Path(sys.executable).parent / "vllm", "run-batch", "-i", input_file, "-o", output_file),
        *("--model", model_folder, "--enforce-eager", "--max-model-len", "512"),
        *("--kv-cache-memory-bytes", "64000000", "--dtype", "float32"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SHIM)}
    environment |= {"TEST_FAULT_FILE": str(tmp_path / "fault")}
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = {
        entry["custom_id"]: entry for entry in map(json.loads, output_file.read_text().splitlines())
    }
    assert answers["0.5"]["response"]["status_code"] == 200
    assert answers["1.5"]["response"]["status_code"] == 400
