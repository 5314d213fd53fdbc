"""Training on a store: batches, gradients of a step, and the results of a run."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from transformers import TrainingArguments

from dftserve import checkpoint, digest, pretrained
from dftserve.settings import SYNONYMS
from dftserve.spec import CheckpointInfo
from dftserve.targets.store import TargetStore
from dftserve.train import config as configs
from dftserve.train import disk, run_folder
from dftserve.train.config import SCHEDULES, DivergenceConfig, LoraConfig, TrainConfig
from dftserve.train.data import Collator, Rows, cut_documents, pack
from dftserve.train.divergences import DIVERGENCES, SFT, ForwardKL, TargetRows
from dftserve.train.material import read, steps_of, steps_of_epoch, warmup_of
from dftserve.train.model import TARGET_NAMES, attach, enable_checkpointing
from dftserve.train.plan import plan_of
from dftserve.train.prepare import cast_frozen_weights, load_model, make_trainer, prepare
from dftserve.train.run import train
from dftserve.train.run_folder import RunFolder
from dftserve.train.target_weight import candidates_text, probe_steps
from dftserve.train.trainer import DFTTrainer
from tests.conftest import PATIENCE
from tests.future import no_future_warnings
from tests.permissions import shut
from tests.training import FAMILIES, save_config, save_model, save_store, small_model, small_run

pytestmark = no_future_warnings


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return save_store(tmp_path_factory.mktemp("targets") / "store")


@pytest.fixture
def run(base, store, tmp_path) -> TrainConfig:
    return small_run(base, store, tmp_path / "run")


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=60), st.integers(2, 40), st.integers(0, 9))
def test_packing_keeps_every_prediction_once_and_no_row_is_too_long(lengths, longest, seed):
    rows = pack(cut_documents(lengths, longest), longest, seed)
    predicted = [
        (piece.document, position)
        for row in rows
        for piece in row
        for position in range(piece.start + 1, piece.stop)
    ]
    assert sorted(predicted) == [
        (d, n) for d, length in enumerate(lengths) for n in range(1, length)
    ]
    assert all(sum(map(len, row)) <= longest for row in rows)
    # Best fit: two rows that are at most half full would have become one.
    assert sum(2 * sum(map(len, row)) <= longest for row in rows) <= 1


def batch_of(store: Path, longest: int, packing: bool) -> dict[str, torch.Tensor]:
    rows = Rows(TargetStore(store), "train", longest=longest, packing=packing, seed=0)
    return Collator()([rows[i] for i in range(len(rows))])


NOT_LONG = (("llama", False), ("gpt2", True))
ARCHITECTURES = [
    pytest.param(family, tied, marks=() if (family, tied) in NOT_LONG else pytest.mark.long)
    for family in FAMILIES
    for tied in (True, False)
]


@pytest.mark.parametrize(("family", "tied"), ARCHITECTURES)
def test_a_packed_batch_equals_its_documents_one_by_one(store, family, tied):
    """Loss, human NLL and gradients equal those from the model's full logits, with packing,
    soft-caps, scales and tied heads."""
    divergence = ForwardKL(weight=0.7)
    model = small_model(family, tied=tied)
    twin = small_model(family, tied=tied)
    attach(model, divergence)
    output = model(**batch_of(store, 64, packing=True))
    output.loss.backward()
    single_rows = Rows(TargetStore(store), "train", longest=64, packing=False, seed=0)
    loss, nll = torch.zeros(()), torch.zeros(())
    for i in range(len(single_rows)):
        batch = Collator()([single_rows[i]])
        logits_TV = twin(batch["input_ids"]).logits.flatten(0, 1)[batch["positions_T"]]
        target = TargetRows(**{name: batch[name] for name in TARGET_NAMES}).to(torch.float32)
        loss = loss + divergence.reference(logits_TV, target).sum()
        nll = nll + SFT().reference(logits_TV, target).sum()
    loss.backward()
    assert float(output.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(output.human_nll) == pytest.approx(float(nll), rel=1e-5)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert (found.grad - expected.grad).norm() <= 1e-4 * expected.grad.norm() + 1e-6


def test_a_compiled_model_has_the_same_gradients_and_is_compiled_once(store):
    """`torch_compile`: the same loss and gradients up to rounding, and no compilation after the
    first step."""
    batch = batch_of(store, 64, packing=True)
    model = small_model()
    attach(model, ForwardKL(weight=0.7))
    plain = model(**batch)
    plain.loss.backward()
    gradients = [value.grad.clone() for value in model.parameters()]
    torch._dynamo.reset()
    compilations = CompileCounter()
    compiled = torch.compile(model, backend=compilations)
    counts = []
    for _ in range(3):
        model.zero_grad()
        found = compiled(**batch)
        found.loss.backward()
        assert float(found.loss.detach()) == pytest.approx(float(plain.loss.detach()), rel=1e-6)
        for value, gradient in zip(model.parameters(), gradients, strict=True):
            assert (value.grad - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7
        counts.append(compilations.frame_count)
    assert counts == [counts[0]] * 3
    assert counts[0] > 0


def test_without_targets_an_attached_model_is_unchanged():
    model = small_model()
    tokens_1N = torch.arange(2, 9)[None]
    before = model(tokens_1N).logits
    attach(model, SFT())
    assert torch.equal(model(tokens_1N).logits, before)
    assert model.generate(tokens_1N, max_new_tokens=3, do_sample=False).shape == (1, 10)


# ── Steps ────────────────────────────────────────────────────────────────────────────────────────


def one_step_gradients(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step: the change by plain SGD at learning rate 1."""
    model = small_model()
    attach(model, config.divergence.build(None))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = make_trainer(replace(config, steps=1, schedule="constant"), model, read(config))
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer.args.save_strategy = "no"
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


def test_accumulated_batches_have_the_gradients_of_one_batch(run):
    whole = one_step_gradients(replace(run, batch_size=8, accumulation=1))
    parts = one_step_gradients(replace(run, batch_size=2, accumulation=4))
    for name, gradient in whole.items():
        assert (gradient - parts[name]).norm() <= 1e-5 * gradient.norm() + 1e-8


GRADIENTS = """
    import sys, torch
    from pathlib import Path
    from dataclasses import replace
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor
    from dftserve.train.config import load
    from dftserve.train.model import attach
    from dftserve.train.material import read
    from dftserve.train.prepare import make_trainer
    from tests.cpu_fsdp import shard_on_cpus
    from tests.training import small_model
    shard_on_cpus()
    config = load(Path(sys.argv[1]), {})
    model = small_model(tied=sys.argv[3] == "tied")
    attach(model, config.divergence.build(None))
    trainer = make_trainer(config, model, read(config))
    trainer.create_optimizer = lambda *a, **k: setattr(
        trainer, "optimizer", torch.optim.SGD(trainer.model.parameters(), lr=1.0))
    trainer.args.save_strategy = "no"
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    assert trainer.is_fsdp_enabled is config.fsdp
    # Asking for the state dict shards again what the last forward gathered.
    held = trainer.model_wrapped.state_dict().values()
    assert all(isinstance(each, DTensor) is config.fsdp for each in held)
    after = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        save_file({n: v.contiguous().clone() for n, v in after.items()}, sys.argv[2])
"""


def run_processes(processes: int, *command: Path | str, ends: bool = True) -> None:
    """Run a script in several processes over loopback; `ends`: whether it exits with code 0."""
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launch += ["--master-addr=127.0.0.1", "--master-port=0", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *command],
        check=False,
        timeout=PATIENCE,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode == 0) is ends, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("fsdp", "head"),
    [
        pytest.param(False, "tied", id="ddp"),
        pytest.param(True, "tied", id="fsdp-tied", marks=pytest.mark.long),
        pytest.param(True, "untied", id="fsdp-untied", marks=pytest.mark.long),
    ],
)
def test_two_processes_have_the_gradients_of_one(run, fsdp, head, tmp_path):
    """To 1e-5, although the two ranks have different numbers of tokens."""
    shared = {"steps": 1, "schedule": "constant", "evaluate_every": 10}
    one = replace(run, **shared, batch_size=8)
    two = replace(run, **shared, batch_size=4, fsdp=fsdp)
    weights = []
    for name, config, processes in (("one", one, 1), ("two", two, 2)):
        script, settings_file = tmp_path / f"{name}.py", tmp_path / f"{name}.yaml"
        script.write_text(textwrap.dedent(GRADIENTS))
        save_config(config, settings_file)
        result = tmp_path / f"{name}.safetensors"
        run_processes(processes, script, settings_file, result, head)
        weights.append(load_file(result))
    start = small_model(tied=head == "tied").state_dict()
    for name, first in weights[0].items():
        gradient = start[name] - first
        assert (first - weights[1][name]).norm() <= 1e-5 * gradient.norm() + 1e-8, name


EVALUATED = """
    import json, sys
    from pathlib import Path
    from dftserve.train.config import load
    from dftserve.train.prepare import make_trainer, prepare
    from tests.cpu_fsdp import shard_on_cpus
    shard_on_cpus()
    config = load(Path(sys.argv[1]), {})
    prepared = prepare(config)
    trainer = make_trainer(config, prepared.loaded.model, prepared.material)
    trainer.train()
    assert trainer.is_fsdp_enabled is config.fsdp
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        batches = [nats for nats, _ in trainer.batch_nll]
        Path(sys.argv[2]).write_text(json.dumps({"metrics": metrics, "batches": batches}))
"""


@pytest.mark.long
def test_fsdp_in_bf16_rounds_neither_targets_nor_evaluation_metrics(run, tmp_path):
    script = tmp_path / "evaluated.py"
    script.write_text(textwrap.dedent(EVALUATED))
    results = {}
    for name, fsdp in (("ddp", False), ("fsdp", True)):
        config = replace(run, precision="bf16", fsdp=fsdp, output=str(tmp_path / name))
        save_config(config, tmp_path / f"{name}.yaml")
        run_processes(2, script, tmp_path / f"{name}.yaml", tmp_path / f"{name}.json")
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    metrics, whole = results["fsdp"]["metrics"], results["ddp"]["metrics"]
    # It depends on the targets alone, not on the model.
    assert metrics["eval_target_entropy"] == pytest.approx(whole["eval_target_entropy"], rel=1e-6)
    assert metrics["eval_human_nll"] == pytest.approx(whole["eval_human_nll"], rel=1e-3)
    nats_B = torch.tensor(results["fsdp"]["batches"])
    assert (nats_B.bfloat16() != nats_B).any()


STOPPED = """
    import json, os, signal, sys
    from pathlib import Path
    from transformers import TrainerCallback
    from dftserve.train.config import load
    from dftserve.train.prepare import make_trainer, prepare
    from dftserve.train.trainer import StopOnSignal
    config = load(Path(sys.argv[1]), {})
    prepared = prepare(config)
    trainer = make_trainer(config, prepared.loaded.model, prepared.material)
    rank = trainer.accelerator.process_index
    class Signalled(TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            if rank == 1 and state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    with StopOnSignal().installed() as stop:
        trainer.add_callback(Signalled())
        trainer.add_callback(stop)
        before = trainer.evaluate()["eval_human_nll"]
        batches = trainer.batch_nll
        trainer.train()
    told = {"batches": batches}
    told |= {"nll": before, "agreed": stop.agreed, "step": trainer.state.global_step}
    Path(f"{sys.argv[2]}-{rank}").write_text(json.dumps(told))
"""


@pytest.mark.long
def test_several_processes_stop_together_and_score_each_held_out_row_once(run, tmp_path):
    """Only one process gets the signal; the held-out rows do not fill two batches of three."""
    config = replace(run, evaluate_every=1000, save_every=1000, packing=False, steps=50)
    config = replace(config, batch_size=3)
    script, settings_file = tmp_path / "stopped.py", tmp_path / "run.yaml"
    script.write_text(textwrap.dedent(STOPPED))
    save_config(config, settings_file)
    prepared = prepare(config)
    rows = len(prepared.material.heldout)
    assert rows % (2 * config.batch_size), "there is nothing to fill up"
    run_processes(2, script, settings_file, tmp_path / "told")
    ranks = [json.loads((tmp_path / f"told-{rank}").read_text()) for rank in (0, 1)]
    assert [each["agreed"] for each in ranks] == [signal.SIGTERM] * 2
    assert [each["step"] for each in ranks] == [2, 2]
    checkpoint.verify(Path(run.output) / "checkpoint-2")
    alone = make_trainer(config, prepared.loaded.model, prepared.material).evaluate()
    # `auto` decides by these: all rows, the same in every process.
    assert ranks[0]["batches"] == ranks[1]["batches"]
    nats, tokens = (sum(each) for each in zip(*ranks[0]["batches"], strict=True))
    assert nats / tokens == pytest.approx(ranks[0]["nll"], rel=1e-6)
    assert ranks[0]["nll"] == ranks[1]["nll"] == pytest.approx(alone["eval_human_nll"], rel=1e-6)


INTERRUPTED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM, TrainerCallback
    from dftserve.train import run
    from dftserve.train.config import load
    from tests.cpu_fsdp import shard_on_cpus
    shard_on_cpus()
    config = load(Path(sys.argv[1]), {})
    number, step = int(sys.argv[2]), int(sys.argv[3])
    class Signalled(TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            if os.environ["RANK"] == "1" and state.global_step == step:
                os.kill(os.getpid(), number)
    made, trainers = run.make_trainer, []
    def make_trainer(*given, **named):
        trainers.append(made(*given, **named))
        trainers[0].add_callback(Signalled())
        return trainers[0]
    run.make_trainer = make_trainer
    final = run.train(config)
    (trainer,) = trainers
    held = trainer.model_wrapped.state_dict().values()
    assert trainer.is_fsdp_enabled is config.fsdp
    assert all(isinstance(each, DTensor) is config.fsdp for each in held)
    trained = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        saved = AutoModelForCausalLM.from_pretrained(final).state_dict()
        assert saved.keys() == trained.keys()
        assert all(torch.equal(saved[name], trained[name]) for name in saved)
"""


@pytest.mark.long
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_an_interrupted_run_of_two_processes_equals_an_uninterrupted_one_and_one_process(
    run, fsdp, tmp_path
):
    """The second process gets SIGTERM in step 2, after which a checkpoint is saved, and SIGKILL in
    step 5. One process takes the same rows in batches of twice the size."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(INTERRUPTED))

    def write_config(name: str) -> tuple[Path, Path]:
        config = replace(run, batch_size=2, fsdp=fsdp, output=str(tmp_path / name))
        save_config(config, tmp_path / f"{name}.yaml")
        return tmp_path / f"{name}.yaml", Path(config.output)

    never, (settings_file, whole) = "100", write_config("whole")
    run_processes(2, script, settings_file, "0", never)
    settings_file, interrupted = write_config("halves")
    run_processes(2, script, settings_file, str(int(signal.SIGTERM)), "1", ends=False)
    assert [path.name for path in interrupted.glob("checkpoint-*")] == ["checkpoint-2"]
    run_processes(2, script, settings_file, str(int(signal.SIGKILL)), "5", ends=False)
    assert not (interrupted / "final").exists()
    run_processes(2, script, settings_file, "0", never)
    resumed, expected = (
        load_file(each / "final" / "model.safetensors") for each in (interrupted, whole)
    )
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    one = train(replace(run, batch_size=4, output=str(tmp_path / "one")))
    alone, together = (
        json.loads((each / checkpoint.RUN).read_text())["metrics"]["human_nll"]
        for each in (one, whole / "final")
    )
    assert together == pytest.approx(alone, rel=1e-4)


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_ends_in_a_verified_checkpoint_that_describes_itself(run, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr("transformers.trainer_callback.logger.warning", warnings.append)
    final = train(replace(run, patience=5))
    assert not warnings
    assert checkpoint.verify(final).files >= 6
    info = CheckpointInfo.read(final)
    assert info.diversity is not None
    assert info.target_entropy == pytest.approx(3.0, abs=0.5)  # Of softmax(2·N(0, 1)).
    assert info.model_entropy > 0
    assert len(info.model_deciles) == 9
    record = json.loads((final / checkpoint.RUN).read_text())
    assert record["settings"]["learning_rate"] == 1e-2
    assert record["metrics"]["human_nll"] > 0
    assert record["metrics"]["untouched_human_nll"] > 0
    assert record["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="this run is finished"):
        train(run)


def test_the_untrained_model_is_scored_first_and_a_worse_result_warns(run, capsys):
    prepared = prepare(run)
    trainer = make_trainer(run, prepared.loaded.model, prepared.material)
    untouched = trainer.evaluate()["eval_human_nll"]
    config = replace(run, divergence=DivergenceConfig(name="sft"), schedule="constant")
    final = train(replace(config, learning_rate=0.3))
    metrics = json.loads((final / checkpoint.RUN).read_text())["metrics"]
    assert metrics["untouched_human_nll"] == pytest.approx(untouched, rel=1e-6)
    assert metrics["human_nll"] > untouched, "a rate that ruins the model"
    messages = capsys.readouterr().err
    assert f"{untouched:.4f} before training" in messages
    assert "Warning: the trained model is worse" in messages
    # The slow steps after training are announced.
    assert "Measuring the diversity to suggest, on held-out text." in messages
    assert f"Writing {final}, and reading it back." in messages


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_checkpoint_is_final_if_the_last_is_worse(run, keep):
    """At a learning rate that ruins the model, `final` is the checkpoint of the lowest NLL."""
    config = replace(run, patience=9, keep=keep, evaluate_every=1, steps=8, learning_rate=0.3)
    config = replace(config, divergence=DivergenceConfig(name="sft"), schedule="constant")
    final = train(config)
    last = max(Path(run.output).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    made = json.loads((final / checkpoint.RUN).read_text())
    assert made["metrics"]["human_nll"] == pytest.approx(state["best_metric"], rel=1e-6)
    assert state["best_global_step"] < 8, "the last was the best: nothing is shown"
    assert made["steps"] == state["best_global_step"], "the steps that made these weights"
    assert Path(state["best_model_checkpoint"]).is_dir()
    assert last.name == "checkpoint-8", "a stopped run continues from the newest one"


@pytest.mark.parametrize("missing", [0, 1])
def test_a_run_warns_if_the_disk_has_less_than_it_may_need(run, monkeypatch, capsys, missing):
    needed = plan_of(run).disk_bytes
    usage = SimpleNamespace(free=needed - missing)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    final = train(run)
    assert ("Warning: this run may need" in capsys.readouterr().err) is bool(missing)
    written = sum(path.stat().st_size for path in final.parent.rglob("*") if path.is_file())
    assert written < needed


def test_a_resumed_run_ends_in_the_same_weights(run, tmp_path):
    whole = train(replace(run, output=str(tmp_path / "whole")))
    config = replace(run, output=str(tmp_path / "halves"))
    material = read(config)
    stopped = make_trainer(config, _model(config), material, callbacks=(_stop_after(3),))
    _begin(config)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = train(config)
    expected, found = (load_file(each / "model.safetensors") for each in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def _model(config):
    return prepare(config).loaded.model


def _begin(config):
    with RunFolder(config) as folder:
        folder.begin()


def _stop_after(step: int):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Stop()


def test_adapters_are_merged_and_kept(run, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    final = train(replace(run, lora=LoraConfig(rank=4)))
    merged = AutoModelForCausalLM.from_pretrained(final)
    unmerged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), final / "adapter"
    )
    tokens_1N = torch.arange(2, 30)[None]
    torch.testing.assert_close(
        merged(tokens_1N).logits, unmerged(tokens_1N).logits, atol=1e-5, rtol=1e-4
    )
    before, after = (load_file(each / "model.safetensors") for each in (base, final))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("embed" in name or "norm" in name for name in changed)


@pytest.mark.parametrize("name", ["reverse_kl", "skew_kl", "jsd", "sliced_w1", "gem", "sft"])
def test_every_divergence_decreases(run, name):
    trainer_losses = []
    config = replace(run, divergence=DivergenceConfig(name=name), steps=8, batch_size=8)
    trainer = make_trainer(config, _model(config), read(config))
    trainer.args.save_strategy = "no"
    trainer.train()
    trainer_losses = [line["divergence"] for line in trainer.state.log_history if "loss" in line]
    assert trainer_losses[-1] < trainer_losses[0]


def test_bf16_and_gradient_checkpointing_run(run):
    config = replace(run, precision="bf16", gradient_checkpointing=True)
    final = train(config)
    weights = load_file(final / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


BF16 = {"weights": "bf16", "precision": "bf16", "lora": LoraConfig(rank=4)}


def test_adapters_on_bf16_weights_are_trained_and_merged_in_float32(run, base):
    final = train(replace(run, **BF16, learning_rate=1e-3))
    before, after, adapter = (
        load_file(folder / name)
        for folder, name in (
            (base, "model.safetensors"),
            (final, "model.safetensors"),
            (final / "adapter", "adapter_model.safetensors"),
        )
    )
    scale = LoraConfig().alpha / BF16["lora"].rank
    trained = 0
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight.bfloat16().float()
        if f"{module}.lora_A.weight" in adapter:
            a, b = (adapter[f"{module}.lora_{each}.weight"] for each in "AB")
            assert a.dtype == b.dtype == torch.float32
            trained += int((b @ a).abs().sum() > 0)
            expected = expected + scale * (b @ a)
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-6)
    assert trained > 0


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_every_divergence_decreases_with_adapters_on_bf16_weights(run, name):
    changes = {"divergence": DivergenceConfig(name=name), "learning_rate": 1e-2}
    config = replace(run, **BF16, **changes, steps=8, batch_size=8)
    material = read(config)
    model = cast_frozen_weights(load_model(config, material), config).model
    trainer = make_trainer(config, model, material)
    trainer.args.save_strategy = "no"
    trainer.train()
    losses = [line["divergence"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    for weight_name, value in model.named_parameters():
        assert value.dtype == (torch.float32 if "lora_" in weight_name else torch.bfloat16)


def test_modules_kept_in_float32_are_found_by_their_names_without_adapters(run, monkeypatch):
    """ "base" matches no module, but each layer that peft wraps has a `base_layer`. The forward of
    this family cannot compute in two dtypes, which is found before the first step."""
    config = replace(run, **BF16)
    loaded = load_model(config, read(config))
    model = loaded.language_model.model
    monkeypatch.setattr(model, "_keep_in_fp32_modules_strict", {"base", r"q_proj\.weight"})
    with pytest.raises(ValueError, match="does not read plain text"):
        cast_frozen_weights(loaded, config)
    frozen = {n: p.dtype for n, p in model.named_parameters() if not p.requires_grad}
    wide = {name for name, dtype in frozen.items() if dtype is torch.float32}
    assert wide == {name for name in frozen if "q_proj" in name}
    assert 0 < len(wide) < len(frozen)


def test_a_process_uses_one_gpu(run, monkeypatch):
    """Of several GPUs without torchrun; DataParallel would divide rows and targets differently."""
    of_this_machine = TrainingArguments.__dict__["_setup_devices"].func

    def devices(arguments):
        device = of_this_machine(arguments)
        arguments._n_gpu = 2
        return device

    found = cached_property(devices)
    found.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", found)
    prepared = prepare(run)
    trainer = make_trainer(run, prepared.loaded.model, prepared.material)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == run.batch_size


@pytest.mark.parametrize("processes", [1, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_those_of_all_processes_together(run, monkeypatch, processes, accumulation):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = replace(run, steps=None, epochs=2, accumulation=accumulation)
    material = read(config)
    # As transformers counts: batches, which accelerate divides among processes, then accumulation.
    batches = math.ceil(len(material.train) / config.batch_size)
    expected = math.ceil(math.ceil(batches / processes) / accumulation)
    assert steps_of_epoch(config, material) == expected
    assert steps_of(config, material) == 2 * expected


def test_weights_in_bf16_take_half_the_memory(run):
    narrow, wide = (plan_of(replace(run, **BF16 | {"weights": each})) for each in ("bf16", "fp32"))
    adapters = 4 * narrow.trained_parameters
    assert narrow.weights_bytes - adapters == (wide.weights_bytes - adapters) / 2
    assert narrow.gradient_bytes == wide.gradient_bytes
    assert "weights bf16, computed in bf16" in narrow.as_text()
    assert "for the weights in float32" in narrow.as_text()
    assert "for the weights in float32" not in wide.as_text()


def test_optimizer_attention_compile_and_workers_reach_transformers(run):
    changes = {"optim": "sgd", "attention": "eager", "torch_compile": True, "workers": 2}
    config = replace(run, **changes)
    material = read(config)
    trainer = make_trainer(config, load_model(config, material).model, material)
    assert trainer.args.optim == "sgd"
    assert trainer.args.torch_compile is True
    assert trainer.args.dataloader_num_workers == 2
    assert trainer.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_other_optimizers_train(run, optim):
    final = train(replace(run, optim=optim))
    weights = load_file(final / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_flash_attention_is_refused_with_the_reason(run):
    message = "attention: got 'flash_attention_2'; accepted: eager, sdpa, .* only half precision"
    with pytest.raises(ValueError, match=message):
        replace(run, attention="flash_attention_2")


def test_gradient_checkpointing_is_enabled_in_every_layer():
    model = small_model()
    enable_checkpointing(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_auto_chooses_the_weight_by_held_out_text(run, capsys):
    """The targets are noise, so a target weight of 0 must win."""
    divergence = DivergenceConfig(target_weight="auto", candidates=(0.0, 0.9), probe_steps=30)
    config = replace(run, divergence=divergence, steps=90, evaluate_every=90, save_every=90)
    train(config)
    tried = json.loads((Path(run.output) / "weights.json").read_text())
    assert tried["0"]["human_nll"] < tried["0.9"]["human_nll"]
    assert "not significantly different" not in capsys.readouterr().err
    record = json.loads((Path(run.output) / "final" / checkpoint.RUN).read_text())
    assert record["settings"]["divergence"]["target_weight"] == 0.0


def test_weights_that_held_out_text_cannot_distinguish_are_reported(run, capsys):
    """Two of the candidates are almost equal."""
    divergence = DivergenceConfig(target_weight="auto", candidates=(0.0, 0.00001, 0.9))
    train(replace(run, divergence=divergence, steps=9, evaluate_every=90))
    assert "not significantly different from 1e-05" in capsys.readouterr().err


def test_a_candidate_whose_held_out_text_has_no_likelihood_is_refused(run, monkeypatch):
    """Not taken, which the least of NaN and a number may do, and not written."""
    nothing = {"eval_human_nll": math.nan}
    monkeypatch.setattr(DFTTrainer, "evaluate", lambda *_, **__: nothing)
    divergence = DivergenceConfig(target_weight="auto", candidates=(0.0, 0.9), probe_steps=1)
    with pytest.raises(ValueError, match="target_weight 0: the held-out NLL is nan after 1 step"):
        train(replace(run, divergence=divergence))
    assert not (Path(run.output) / "weights.json").exists()


def test_candidates_scored_on_different_batches_are_refused(run):
    divergence = DivergenceConfig(target_weight="auto", candidates=(0.0, 0.9), probe_steps=1)
    config = replace(run, divergence=divergence)
    _begin(config)
    scored = {"0": [[9.0, 3], [8.0, 3]], "0.9": [[9.0, 3]]}
    tried = {name: {"human_nll": 3.0, "batches": batches} for name, batches in scored.items()}
    (Path(run.output) / "weights.json").write_text(json.dumps(tried))
    with pytest.raises(ValueError, match=r"weights\.json: got candidates .* Remove it"):
        train(config)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_short_run_starts_at_the_full_learning_rate(run, steps):
    """`auto` tries its candidates in short runs: a first step at rate 0 would waste them."""
    config = replace(run, steps=steps)
    trainer = make_trainer(config, _model(config), read(config))
    trainer.args.save_strategy = "no"
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "grad_norm" in line]
    assert len(rates) == steps
    assert rates[0] == config.learning_rate


def test_a_long_run_warms_up(run):
    assert warmup_of(replace(run, steps=100), read(run)) == run.warmup > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up(schedule, run):
    config = replace(run, steps=50, schedule=schedule, warmup=0.1, learning_rate=0.5)
    trainer = make_trainer(config, small_model(), read(config))
    trainer.create_optimizer_and_scheduler(50)
    rates = []
    for _ in range(6):
        rates += trainer.lr_scheduler.get_last_lr()[:1]
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_auto_never_holds_two_models_in_memory(run, monkeypatch):
    """So the candidates of a run that fits in memory by `--plan` fit too."""
    load, models, alive = pretrained.load, [], []

    def counting_load(*args, **named):
        alive.append(sum(each() is not None for each in models))
        model = load(*args, **named)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(pretrained, "load", counting_load)
    divergence = DivergenceConfig(target_weight="auto", candidates=(0.0, 0.9), probe_steps=1)
    train(replace(run, divergence=divergence))
    # The check before, two candidates, the run, and its checkpoint read back while it is loaded.
    assert alive[:4] == [0, 0, 0, 0]
    assert len(alive) == 5


@pytest.mark.parametrize("packing", [True, False])
def test_the_first_rows_are_a_sample_of_the_corpus(store, packing):
    """Held-out metrics use the first rows, which must not all come from the corpus's first file."""
    rows = Rows(TargetStore(store), "train", longest=64, packing=packing, seed=0)
    count = TargetStore(store).count("train")
    first = [piece.document for row in rows.rows for piece in row][: count // 2]
    # The probability that all come from the first half: 1 in C(60, 30).
    assert any(document >= count // 2 for document in first)
    again = Rows(TargetStore(store), "train", longest=64, packing=packing, seed=0)
    assert again.rows == rows.rows


@pytest.mark.parametrize("packing", [True, False])
def test_cut_documents_are_reported(run, store, packing):
    """The plan states how many, and how many tokens are trained without the text before."""
    config = replace(run, max_length=16, packing=packing)
    target_store = TargetStore(store)
    lengths = [length for length in target_store.lengths("train") if length > 16]
    plan = plan_of(config)
    message = (
        f"{len(lengths):,} documents are longer than a row (max_length) and cut into windows: "
    )
    assert plan.cut is not None
    assert plan.cut.startswith(message)
    trained_tokens = int(plan.cut.removeprefix(message).split()[0].replace(",", ""))
    assert trained_tokens == sum(length - 16 for length in lengths)
    assert plan.cut in plan.as_text()
    assert plan.cut in read(config).as_text()
    assert plan_of(replace(run, packing=packing)).cut is None


@pytest.mark.parametrize(
    ("name", "first", "steps", "each"),
    [("forward_kl", 0.0, 600, 50), ("forward_kl", 0.0, 120, 10), ("reverse_kl", 0.3, 18, 2),
     ("jsd", 0.0, 3, 1)],
)  # fmt: skip
def test_auto_tries_the_least_weight_first_and_a_third_of_the_steps(run, name, first, steps, each):
    config = replace(run, steps=steps, divergence=DivergenceConfig(name=name, target_weight="auto"))
    assert config.divergence.to_try[0] == first
    assert probe_steps(config, read(config)) == each


def test_sigterm_saves_a_checkpoint_and_exits(run, tmp_path):
    config = replace(run, steps=4000, save_every=100_000, evaluate_every=100_000)
    settings_file = tmp_path / "run.yaml"
    save_config(config, settings_file)
    command = [sys.executable, "-m", "dftserve.cli", "train", settings_file]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert any("'loss':" in line for line in process.stdout), "it ended before the first step"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    saved = sorted(Path(run.output).glob("checkpoint-*"))
    assert len(saved) == 1
    checkpoint.verify(saved[0])


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence.name": "forward_lk"}, "did you mean 'forward_kl'"),
        ({"learning_rat": "1"}, "did you mean 'learning_rate'"),
        ({"divergence.skew": "0.5"}, "forward_kl does not take it"),
        ({"divergence.target_weight": "2"}, "accepted: a number from 0 to 1"),
        ({"divergence.name": "reverse_kl", "divergence.target_weight": "0"}, "above 0 to 1"),
        ({"divergence.name": "sliced_w1", "divergence.target_weight": "3"}, "target_weight: got 3"),
        ({"divergence.candidates": "[0, 3]"}, "candidates: got 3"),
        ({"divergence.probe_steps": "0"}, "probe_steps: got 0"),
        ({"lora.rank": "0"}, "rank: got 0"),
        ({"warmup": "5"}, "accepted: a share"),
        ({"clip": "-1"}, "clip: got -1"),
        ({"patience": "-2"}, "patience: got -2"),
        ({"batch_size": "0"}, "batch_size: got 0; accepted: from 1 to"),
        ({"batch_size": "1000000000000000000"}, "accepted: from 1 to 65536"),
        ({"max_length": "1000000000000000000"}, "accepted: from 2 to 1048576"),
        ({"epochs": ".inf"}, "accepted: a finite number"),
        ({"weight_decay": ".nan"}, "accepted: a finite number"),
        ({"steps": "1" * 30}, "a whole number of 64 bits"),
        ({"precision": "&a [*a]"}, "it has an alias"),
        ({"precision": "[" * 100}, "more than 64 levels"),
        ({"batch_size": "many"}, "accepted: a whole number"),
        ({"precision": "fp16"}, "accepted: fp32, bf16"),
        ({"weights": "bf16"}, "got bf16 without lora"),
        ({"weights": "bf16", "lora.rank": "4"}, "precision: got 'fp32' with weights bf16"),
        (
            {"weights": "bf16", "lora.rank": "4", "precision": "bf16", "fsdp": "true"},
            "fsdp: got true with weights bf16",
        ),
        ({"optim": "lion"}, "optim: got 'lion'; accepted: .*adafactor"),
        ({"attention": "fast"}, "attention: got 'fast'; accepted: .*sdpa"),
        ({"workers": "-1"}, "workers: got -1; accepted: from 0 to 256"),
        ({"torch_compile": "maybe"}, "torch_compile: got 'maybe'"),
        ({"report_to": "wandb"}, "accepted: none, tensorboard"),
        ({"steps": "[1"}, "not YAML"),
        ({"max_length": "1"}, "max_length: got 1; accepted: from 2 to"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name(change, message):
    given = {"model": "m", "targets": "t", "output": "o"} | change
    with pytest.raises(ValueError, match=message):
        configs.load(None, given)


@pytest.mark.parametrize(
    ("given", "meant"), [("lr", "learning_rate"), ("per_device_train_batch_size", "batch_size")]
)
def test_setting_names_of_other_trainers_suggest_ours(given, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        configs.load(None, {"model": "m", "targets": "t", "output": "o", given: "1"})


def test_every_synonym_suggests_a_setting():
    kinds = (TrainConfig, DivergenceConfig, LoraConfig)
    assert set(SYNONYMS.values()) <= {each.name for kind in kinds for each in fields(kind)}
    assert not set(SYNONYMS) & {each.name for each in fields(TrainConfig)}


@pytest.mark.parametrize(("fsdp", "most"), [(True, 256), (False, None)])
def test_checks_on_the_cpu_of_a_gpu_run_are_short_and_say_so(run, monkeypatch, capsys, fsdp, most):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("dftserve.train.prepare._device", lambda config: torch.device("cpu"))
    limits = []
    for name in ("packing_leak", "check_batch"):
        monkeypatch.setattr(
            f"dftserve.lm.LanguageModel.{name}", lambda *_, most: limits.append(most)
        )
    prepare(replace(run, fsdp=fsdp, max_length=1024))
    assert limits == [most, most]
    assert ("at most 256 tokens at once" in capsys.readouterr().err) is fsdp


def test_each_candidate_is_shown_in_a_line():
    shown = candidates_text({"0": 10.736137517668388, "0.6": 10.709326459946533}, "0.6")
    assert shown.splitlines()[1:] == ["  0    10.7361", "  0.6  10.7093  taken"]


def test_verify_of_a_run_folder_names_its_checkpoint(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="an unfinished run; run the same train again"):
        checkpoint.verify(tmp_path)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "checksums.json").write_text("{}")
    with pytest.raises(ValueError, match=r"it is a run; give its checkpoint, .*/final"):
        checkpoint.verify(tmp_path)


def test_a_yaml_learning_rate_without_a_decimal_point_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{model: m, targets: t, output: o, learning_rate: 2e-5}")
    assert configs.load(path, {"epochs": "3"}).learning_rate == 2e-5


def test_a_refused_run_creates_no_folder(run, base, store, tmp_path):
    other = save_model(tmp_path / "other", "gpt2")
    (other / "tokenizer.json").write_text(
        (base / "tokenizer.json").read_text().replace('"w7"', '"w7x"')
    )
    wrong = {
        "no config.json": replace(run, model=str(tmp_path)),
        "another tokenizer": replace(run, model=str(other)),
        "has no manifest.json": replace(run, targets=str(tmp_path)),
    }
    for message, config in wrong.items():
        with pytest.raises(ValueError, match=message):
            train(config)
        assert not Path(config.output).exists()


def test_a_differing_setting_is_named(run):
    train(replace(run, steps=1))
    shutil.rmtree(Path(run.output) / "final")
    with pytest.raises(ValueError, match=r"divergence.name is 'forward_kl', not 'sft'"):
        train(replace(run, steps=1, divergence=DivergenceConfig(name="sft")))


def test_a_run_too_short_to_stop_early_is_refused(run):
    with pytest.raises(ValueError, match="lower evaluate_every"):
        train(replace(run, patience=2, steps=3))


def test_a_folder_that_is_not_a_run_is_not_touched(run):
    Path(run.output).mkdir()
    (Path(run.output) / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="neither empty nor a run"):
        train(run)
    assert os.listdir(run.output) == ["notes.txt"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("file", "Not a directory"),
        ("file/run", "Not a directory"),
        ("link", "Not a directory"),
        ("shut", "Permission denied"),
        ("shut/new/run", "Permission denied"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run, tmp_path, monkeypatch, where, message
):
    place = tmp_path / "place"
    (place / "shut").mkdir(parents=True)
    (place / "file").write_text("mine")
    (place / "link").symlink_to(place / "nowhere")
    shut(monkeypatch, name="shut")
    monkeypatch.setattr(pretrained, "load", not_called)
    with pytest.raises(OSError, match=message):
        train(replace(run, output=str(place / where)))
    assert sorted(path.name for path in place.rglob("*")) == ["file", "link", "shut"]
    assert (place / "file").read_text() == "mine"


def not_called(*_: object, **__: object) -> None:
    pytest.fail("it was called")


# ── A folder belongs to one run ──────────────────────────────────────────────────────────────────


def interrupted_run(config: TrainConfig, step: int = 3) -> TrainConfig:
    """The configuration of a run that was interrupted after a checkpoint."""
    trainer = make_trainer(config, _model(config), read(config), callbacks=(_stop_after(step),))
    _begin(config)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return config


def test_a_run_does_not_resume_with_other_targets_at_the_same_path(run, tmp_path):
    config = interrupted_run(replace(run, targets=str(save_store(tmp_path / "store"))))
    shutil.rmtree(config.targets)
    save_store(Path(config.targets), seed=5)
    with pytest.raises(ValueError, match=r"began with another `targets` .* its manifest differ"):
        train(config)
    assert not (Path(config.output) / "final").exists()


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["whole", "adapter"])
def test_a_run_does_not_resume_with_another_model_at_the_same_path(run, tmp_path, lora):
    """Otherwise an adapter that was trained on one would be merged into the other."""
    config = interrupted_run(replace(run, model=str(save_model(tmp_path / "base")), lora=lora))
    save_model(Path(config.model), seed=5)
    with pytest.raises(ValueError, match=r"began with another `model` .* configuration or weights"):
        train(config)
    assert not (Path(config.output) / "final").exists()


def test_a_run_does_not_resume_with_another_number_of_processes(run, monkeypatch):
    config = interrupted_run(run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = r"of 1 processes, not 2: .*--nproc-per-node=1"
    with pytest.raises(ValueError, match=message), RunFolder(config):
        pass


def test_a_run_resumes_after_its_folders_moved(run, tmp_path, monkeypatch):
    """The best checkpoint is found too, and is the one that is kept: the last is worse."""
    config = replace(run, model=str(save_model(tmp_path / "base")), steps=8, patience=5)
    interrupted_run(replace(config, learning_rate=0.5, evaluate_every=1), step=4)
    shutil.move(run.output, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    moved = replace(config, model="base", output="moved", learning_rate=0.5, evaluate_every=1)
    train(moved)
    state = json.loads(max(Path("moved").glob("checkpoint-*/trainer_state.json")).read_text())
    assert Path(state["best_model_checkpoint"]).parent == Path("moved")
    assert Path(state["best_model_checkpoint"]).is_dir()


def rewrite_settings(config: TrainConfig, change) -> None:
    path = Path(config.output) / "settings.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "names", [("workers",), ("divergence", "projections"), ("lora", "dropout")]
)
def test_a_run_resumes_if_a_setting_it_lacks_has_its_default(run, names):
    config = replace(run, lora=LoraConfig())
    _begin(config)

    def without(content):
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    rewrite_settings(config, without)
    with RunFolder(config):
        pass
    other = {"workers": replace(config, workers=2),
             "divergence": replace(config, divergence=DivergenceConfig(projections=9)),
             "lora": replace(config, lora=LoraConfig(dropout=0.1))}[names[0]]  # fmt: skip
    with pytest.raises(ValueError, match=f"whose {'.'.join(names)} is"), RunFolder(other):
        pass


@pytest.mark.parametrize("loras", [(LoraConfig(), None), (None, LoraConfig())])
def test_a_run_does_not_resume_with_lora_added_or_removed(run, loras):
    before, after = (replace(run, lora=lora) for lora in loras)
    _begin(before)
    with pytest.raises(ValueError, match=r"whose lora.* is"), RunFolder(after):
        pass


def test_a_setting_unknown_to_this_version_is_refused_with_its_name(run):
    _begin(run)
    rewrite_settings(run, lambda content: content.update(momentum=0.9))
    with pytest.raises(ValueError, match=r"whose momentum is 0\.9, not None"), RunFolder(run):
        pass


def test_settings_without_the_origin_of_the_run_are_refused(run):
    _begin(run)
    rewrite_settings(run, lambda content: content.pop("origin"))
    with pytest.raises(ValueError, match="is not what a run writes"), RunFolder(run):
        pass


def test_a_folder_in_use_is_refused_before_weights_are_read(run, monkeypatch):
    with RunFolder(run) as folder:
        folder.begin()
        monkeypatch.setattr(run_folder, "model_digest", lambda found: pytest.fail("weights read"))
        with pytest.raises(ValueError, match="another training writes to it"), RunFolder(run):
            pass


def test_a_refused_start_releases_the_lock(run):
    _begin(run)
    with pytest.raises(ValueError, match="whose seed is 0, not 1"):
        RunFolder(replace(run, seed=1)).__enter__()
    with RunFolder(run):
        pass


def test_a_files_digest_is_computed_once_until_it_changes(tmp_path, monkeypatch):
    path, digests = tmp_path / "weights", []
    monkeypatch.setattr(digest, "blake3", lambda *given: digests.append(1) or blake3(*given))
    path.write_bytes(b"1" * 100)
    first = digest.sampled_digest(path)
    assert digest.sampled_digest(path) == first
    assert len(digests) == 1
    before = path.stat().st_mtime_ns
    path.write_bytes(b"2" * 100)
    os.utime(path, ns=(before, before + 1))
    assert digest.sampled_digest(path) != first
    assert len(digests) == 2


def test_two_trainings_do_not_share_a_folder(run):
    with RunFolder(run) as first:
        first.begin()
        before = sorted(os.listdir(run.output))
        with pytest.raises(ValueError, match="another training writes to it; wait for it"):
            train(run)
        assert sorted(os.listdir(run.output)) == before


def test_of_two_runs_that_begin_together_the_second_is_refused(run):
    with RunFolder(run) as first, RunFolder(replace(run, seed=1)) as second:
        first.begin()
        with pytest.raises(ValueError, match="another training writes to it"):
            second.begin()


def test_if_the_newest_checkpoint_is_damaged_an_older_intact_one_is_named(run):
    config = interrupted_run(run, step=5)
    newest, older = (Path(config.output) / f"checkpoint-{step}" for step in (4, 2))
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"or remove .*checkpoint-4 to go on from checkpoint-2"):
        train(config)
    (older / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"remove the checkpoint folders of .* to start at the f"):
        train(config)
    for damaged in (newest, older):
        shutil.rmtree(damaged)
    assert train(config).name == "final"


SIGNALLED_WITH_ITS_WORKERS = """
    import subprocess, sys
    from pathlib import Path
    from dftserve.train.config import load
    from dftserve.train.run import train
    from dftserve.train.trainer import StopOnSignal
    class Signalled(StopOnSignal):
        def on_step_begin(self, args, state, control, **given):
            if state.global_step == 1:
                subprocess.run("kill -TERM 0", shell=True)
    sys.modules["dftserve.train.run"].StopOnSignal = Signalled
    train(load(Path(sys.argv[1]), {}))
"""


def test_a_signal_to_the_workers_too_lets_the_run_save(run, tmp_path):
    config = replace(run, workers=2, steps=50, save_every=1000)
    script, settings_file = tmp_path / "signalled.py", tmp_path / "run.yaml"
    script.write_text(textwrap.dedent(SIGNALLED_WITH_ITS_WORKERS))
    save_config(config, settings_file)
    ended = subprocess.run(
        [sys.executable, script, settings_file],
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert [path.name for path in Path(config.output).glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_nan_loss_stops_the_run_and_leaves_no_checkpoint(run):
    prepared = prepare(run)
    trainer = make_trainer(run, prepared.loaded.model, prepared.material)
    prepared.loaded.model.model.norm.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="the divergence is nan"):
        trainer.train()
    assert not list(Path(run.output).glob("checkpoint-*"))


def test_tensorboard_receives_the_metrics(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(run, report_to="tensorboard"))
    events = next(Path(run.output).rglob("events.out.tfevents.*"))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert {"train/divergence", "train/model_entropy", "eval/human_nll"} <= set(
        accumulator.Tags()["scalars"]
    )
