"""A GGUF file as a model: it is converted once and completely, or refused with the reason."""

import json
import multiprocessing
import random
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dftserve.cli import main
from dftserve.gguf import ORIGIN, resolve
from dftserve.serve import launch

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: make setup")

WIDTH, HEADS, INNER = 64, 2, 96
WORDS = ["Ġa", "Ġt", "Ġth", "Ġthe"]
MERGES = ["Ġ a", "Ġ t", "Ġt h", "Ġth e"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
VOCABULARY = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DFTSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path) -> Path:
    return write_gguf(tmp_path / "models" / "tiny.gguf")


def write_gguf(
    path: Path, *, architecture: str = "llama", kind: str = "F32", lacking: str = "", parts: int = 1
) -> Path:
    """A model of one layer, written by the format's own package."""
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_file_type(
        getattr(gguf.LlamaFileType, f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}")
    )
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(VOCABULARY) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    rng = np.random.default_rng(0)
    for name, shape in shapes().items():
        if name != lacking:
            put(writer, name, rng.standard_normal(shape, dtype=np.float32), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes() -> dict[str, tuple[int, ...]]:
    square = {f"blk.0.attn_{each}.weight": (WIDTH, WIDTH) for each in ("q", "k", "v", "output")}
    return {
        "token_embd.weight": (len(VOCABULARY), WIDTH),
        **square,
        "blk.0.ffn_gate.weight": (INNER, WIDTH),
        "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "output_norm.weight": (WIDTH,),
    }


def put(writer, name: str, values: np.ndarray, kind: str) -> None:
    if kind == "F32" or values.ndim == 1:
        writer.add_tensor(name, values)
        return
    quantised = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(values, quantised), raw_dtype=quantised)


def recorded_lines() -> tuple[list[str], dict]:
    lines: list[str] = []
    return lines, {"say": lines.append}


def test_models_that_are_not_gguf_are_returned_unchanged(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "beside.gguf").touch()
    for model in (str(tmp_path), "org/name", str(tmp_path / "absent")):
        assert resolve(model) == model


def test_a_file_is_converted_to_a_folder_once(file, cache):
    lines, options = recorded_lines()
    folder = resolve(str(file), **options)
    assert Path(folder).parent == cache / "gguf"
    assert lines == [f"Converting {file} to {folder}, once."]
    # Idempotent and offline: the folder of the file is the same model, and nothing is printed.
    assert resolve(str(file.parent), **options) == folder
    assert len(lines) == 1
    assert json.loads((Path(folder) / ORIGIN).read_text())["architecture"] == "llama"
    assert [path.name for path in (cache / "gguf").glob("*.partial")] == []


def test_floats_are_kept_exactly(file):
    model = AutoModelForCausalLM.from_pretrained(resolve(str(file)), dtype="auto")
    assert model.dtype == torch.float32
    written_values = np.random.default_rng(0).standard_normal(
        (len(VOCABULARY), WIDTH), dtype=np.float32
    )
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), written_values)
    assert getattr(model.config, "quantization_config", None) is None


def test_quantised_weights_become_bfloat16(tmp_path):
    folder = resolve(str(write_gguf(tmp_path / "q.gguf", kind="Q8_0")))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    values = np.random.default_rng(0).standard_normal((len(VOCABULARY), WIDTH), dtype=np.float32)
    far = np.abs(model.get_input_embeddings().weight.detach().float().numpy() - values).max()
    assert 0 < far < 0.05


def test_tokenizer_template_and_stop_token_are_converted(file):
    folder = resolve(str(file))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.tokenize("  1984 the") == ["Ġ", "Ġ", "1", "9", "8", "4", "Ġthe"]
    assert tokenizer.decode(tokenizer("  1984 the")["input_ids"]) == "  1984 the"
    assert json.loads((Path(folder) / "generation_config.json").read_text())["eos_token_id"] == 2


def test_an_unknown_architecture_is_refused_by_name(tmp_path, cache):
    file = write_gguf(tmp_path / "new.gguf", architecture="strange9")
    with pytest.raises(ValueError, match=r"'strange9', which transformers .* cannot convert"):
        resolve(str(file))
    assert [path.name for path in (cache / "gguf").iterdir() if path.is_dir()] == []


def test_missing_weights_are_refused(tmp_path):
    file = write_gguf(tmp_path / "holes.gguf", lacking="blk.0.ffn_up.weight")
    with pytest.raises(ValueError, match=r"missing keys: model\.layers\.0\.mlp\.up_proj"):
        resolve(str(file))


def test_one_part_of_several_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of 3 parts"):
        resolve(str(write_gguf(tmp_path / "part.gguf", parts=3)))


@pytest.mark.parametrize("size", [3, 100, 4000])
def test_a_truncated_file_is_refused(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"tiny\.gguf: .*download"):
        resolve(str(file))


def test_a_missing_file_and_a_folder_with_several_are_refused(file):
    with pytest.raises(ValueError, match="there is no such file"):
        resolve(str(file.with_name("absent.gguf")))
    write_gguf(file.with_name("other.gguf"), kind="Q8_0")
    with pytest.raises(ValueError, match=r"2 GGUF files \(other\.gguf, tiny\.gguf\)"):
        resolve(str(file.parent))


def test_a_full_cache_is_reported_as_such(file, cache, monkeypatch):
    save = PreTrainedTokenizerFast.save_pretrained

    def on_full_disk(tokenizer, folder):
        (Path(folder) / "tokenizer.json").symlink_to("/dev/full")
        save(tokenizer, folder)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", on_full_disk)
    with pytest.raises(OSError, match=f"{cache}.* cannot be written: No space left on device"):
        resolve(str(file))
    monkeypatch.undo()
    assert not any(path.is_dir() for path in cache.rglob("*.partial"))


def test_concurrent_conversions_make_one_folder(file, cache):
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        folders = pool.map(resolve, [str(file)] * 3)
        # The end of `with` would send SIGTERM, and a fork inherits the handlers of this process.
        pool.close()
        pool.join()
    assert len(set(folders)) == 1
    assert (Path(folders[0]) / "model.safetensors").exists()


def test_a_gguf_is_served_from_its_folder_under_its_own_name(file):
    argv = launch(str(file)).argv
    assert argv[1:3] == ("serve", resolve(str(file)))
    assert argv[argv.index("--served-model-name") + 1] == str(file)
    chosen = launch(str(file), ["--served-model-name", "mine"]).argv
    assert chosen.count("--served-model-name") == 1


@pytest.mark.parametrize("command", ["run", "benchmark", "likelihood"])
def test_evaluate_accepts_a_gguf(file, tmp_path, monkeypatch, command):
    """Each command is stopped where its work begins: only the model that it got matters."""
    from dftserve.evaluate import perplexity, run
    from dftserve.evaluate.benchmark import run as benchmark

    models = []

    def stopped(job, *_):
        models.append(getattr(job, "model", job))
        raise ValueError("stopped")

    monkeypatch.setattr(run, "evaluate", stopped)
    monkeypatch.setattr(benchmark, "run", stopped)
    monkeypatch.setattr(perplexity, "likelihood_report", stopped)
    folder = str(tmp_path)
    options = {
        "run": ("--prompts", folder, "--anchors", folder, "--out", folder),
        "benchmark": ("--out", folder),
        "likelihood": ("--anchors", folder),
    }
    result = CliRunner().invoke(main, ["evaluate", command, str(file), *options[command]])
    assert "stopped" in result.output
    assert models == [resolve(str(file))]


RECIPE = """
name: tiny
about: a test
text: any
corpus: {min_words: 3, duplicate_threshold: null}
store: {k: 2, draws: 2}
source: {teacher: {model: "${teacher}"}}
"""


def test_target_and_train_accept_a_gguf(file, tmp_path):
    corpus, recipe, out = (tmp_path / name for name in ("texts.jsonl", "recipe.yaml", "targets"))
    drawn = random.Random(0)  # Single letters, so that no text is a near copy of another.
    texts = [" ".join(drawn.choices(string.ascii_lowercase, k=12)) for _ in range(8)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe.write_text(RECIPE)
    both = ("--model", file, "--set", f"teacher={file}")
    assert "shards" in _run("target", "build", corpus, "--recipe", recipe, "--out", out, *both)
    assert _run("target", "inspect", out, "--model", file)
    named = (f"model={file}", f"targets={out}", f"output={tmp_path / 'run'}", "steps=1")
    sets = [word for each in named for word in ("--set", each)]
    assert _run("train", "--plan", *sets)
    assert str(tmp_path / "run" / "final") in _run("train", *sets)


def _run(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
