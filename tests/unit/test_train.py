"""Training on a store: what a batch is, what a step computes, what a run leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from dftserve import checkpoint, digest, lm
from dftserve.settings import SYNONYMS
from dftserve.spec import Promise
from dftserve.targets.store import TargetStore
from dftserve.train import config as configs
from dftserve.train import run_folder
from dftserve.train.config import DivergenceConfig, LoraConfig, TrainConfig
from dftserve.train.data import Collator, Rows, packed, pieces
from dftserve.train.divergences import DIVERGENCES, SFT, ForwardKL, TargetRows
from dftserve.train.model import TARGET_NAMES, attach, enable_checkpointing
from dftserve.train.plan import plan_of
from dftserve.train.run import (
    load_model,
    make_trainer,
    narrowed,
    prepare,
    probe_steps,
    read,
    train,
    warmup_of,
    weights_shown,
)
from dftserve.train.run_folder import RunFolder
from tests.future import no_future_warnings
from tests.training import FAMILIES, save_config, save_model, save_store, small_model

pytestmark = no_future_warnings


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return save_store(tmp_path_factory.mktemp("targets") / "store")


@pytest.fixture
def run(base, store, tmp_path) -> TrainConfig:
    return TrainConfig(
        model=str(base),
        targets=str(store),
        output=str(tmp_path / "run"),
        max_length=64,
        batch_size=2,
        steps=6,
        learning_rate=1e-2,
        save_every=2,
        evaluate_every=3,
        log_every=1,
    )


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=60), st.integers(2, 40), st.integers(0, 9))
def test_packing_keeps_every_prediction_once_and_fills_no_row_beyond_its_length(
    lengths, longest, seed
):
    rows = packed(pieces(lengths, longest), longest, seed)
    predicted = [
        (piece.document, place)
        for row in rows
        for piece in row
        for place in range(piece.start + 1, piece.stop)
    ]
    assert sorted(predicted) == [
        (d, n) for d, length in enumerate(lengths) for n in range(1, length)
    ]
    assert all(sum(map(len, row)) <= longest for row in rows)
    # Best fit: no two rows of at most half could have been one.
    assert sum(2 * sum(map(len, row)) <= longest for row in rows) <= 1


def batch_of(store: Path, longest: int, packing: bool) -> dict[str, torch.Tensor]:
    rows = Rows(TargetStore(store), "train", longest=longest, packing=packing, seed=0)
    return Collator()([rows[i] for i in range(len(rows))])


BRIEF = (("llama", False), ("gpt2", True))
ARCHITECTURES = [
    pytest.param(family, tied, marks=() if (family, tied) in BRIEF else pytest.mark.long)
    for family in FAMILIES
    for tied in (True, False)
]


@pytest.mark.parametrize(("family", "tied"), ARCHITECTURES)
def test_a_packed_batch_is_each_document_alone_under_the_models_own_logits(store, family, tied):
    """Loss, entropy and every gradient, to 1e-5: packing, soft-caps, scales and tied heads."""
    divergence = ForwardKL(weight=0.7)
    model = small_model(family, tied=tied)
    twin = small_model(family, tied=tied)
    attach(model, divergence)
    found = model(**batch_of(store, 64, packing=True))
    found.loss.backward()
    alone = Rows(TargetStore(store), "train", longest=64, packing=False, seed=0)
    loss, nll = torch.zeros(()), torch.zeros(())
    for i in range(len(alone)):
        batch = Collator()([alone[i]])
        logits_TV = twin(batch["input_ids"]).logits.flatten(0, 1)[batch["positions_T"]]
        target = TargetRows(**{name: batch[name] for name in TARGET_NAMES}).to(torch.float32)
        loss = loss + divergence.reference(logits_TV, target).sum()
        nll = nll + SFT().reference(logits_TV, target).sum()
    loss.backward()
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(found.human_nll) == pytest.approx(float(nll), rel=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6


def test_a_compiled_model_is_the_same_and_is_compiled_once(store):
    """`torch_compile`: loss and gradients, to rounding; no step waits for another compilation."""
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


def test_without_targets_the_model_is_what_it_was():
    model = small_model()
    tokens_1N = torch.arange(2, 9)[None]
    before = model(tokens_1N).logits
    attach(model, SFT())
    assert torch.equal(model(tokens_1N).logits, before)
    assert model.generate(tokens_1N, max_new_tokens=3, do_sample=False).shape == (1, 10)


# ── Steps ────────────────────────────────────────────────────────────────────────────────────────


def one_step_gradients(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Of the first optimizer step: the change of plain SGD at learning rate 1."""
    model = small_model()
    attach(model, config.divergence.build(None))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = make_trainer(replace(config, steps=1, schedule="constant"), model, read(config))
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer.args.save_strategy = "no"
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


def test_accumulated_batches_are_one_batch(run):
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
    from dftserve.train.run import make_trainer, read
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
    # Which shards again what the last forward gathered.
    held = trainer.model_wrapped.state_dict().values()
    assert all(isinstance(each, DTensor) is config.fsdp for each in held)
    after = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        save_file({n: v.contiguous().clone() for n, v in after.items()}, sys.argv[2])
"""


def launched(processes: int, *command: Path | str, ends: bool = True) -> None:
    """A script in so many processes that talk over loopback; `ends`: as it should, not by force."""
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launch += ["--master-addr=127.0.0.1", "--master-port=0", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *command],
        check=False,
        timeout=300,
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
    """To 1e-5, although the two ranks hold different numbers of tokens."""
    shared = {"steps": 1, "schedule": "constant", "evaluate_every": 10}
    one = replace(run, **shared, batch_size=8)
    two = replace(run, **shared, batch_size=4, fsdp=fsdp)
    weights = []
    for name, config, processes in (("one", one, 1), ("two", two, 2)):
        script, settings_file = tmp_path / f"{name}.py", tmp_path / f"{name}.yaml"
        script.write_text(textwrap.dedent(GRADIENTS))
        save_config(config, settings_file)
        result = tmp_path / f"{name}.safetensors"
        launched(processes, script, settings_file, result, head)
        weights.append(load_file(result))
    start = small_model(tied=head == "tied").state_dict()
    for name, first in weights[0].items():
        gradient = start[name] - first
        assert (first - weights[1][name]).norm() <= 1e-5 * gradient.norm() + 1e-8, name


EVALUATED = """
    import json, sys
    from pathlib import Path
    from dftserve.train.config import load
    from dftserve.train.run import make_trainer, prepare
    from tests.cpu_fsdp import shard_on_cpus
    shard_on_cpus()
    config = load(Path(sys.argv[1]), {})
    prepared = prepare(config)
    trainer = make_trainer(config, prepared.loaded.model, prepared.material)
    trainer.train()
    assert trainer.is_fsdp_enabled is config.fsdp
    figures = trainer.evaluate()
    if trainer.is_world_process_zero():
        batches = [nats for nats, _ in trainer.batch_nll]
        Path(sys.argv[2]).write_text(json.dumps({"figures": figures, "batches": batches}))
"""


@pytest.mark.long
def test_in_bf16_shards_round_neither_targets_nor_what_the_model_is_judged_by(run, tmp_path):
    script = tmp_path / "evaluated.py"
    script.write_text(textwrap.dedent(EVALUATED))
    told = {}
    for name, fsdp in (("ddp", False), ("fsdp", True)):
        config = replace(run, precision="bf16", fsdp=fsdp, output=str(tmp_path / name))
        save_config(config, tmp_path / f"{name}.yaml")
        launched(2, script, tmp_path / f"{name}.yaml", tmp_path / f"{name}.json")
        told[name] = json.loads((tmp_path / f"{name}.json").read_text())
    figures, whole = told["fsdp"]["figures"], told["ddp"]["figures"]
    # Of the targets alone, not of the model.
    assert figures["eval_target_entropy"] == pytest.approx(whole["eval_target_entropy"], rel=1e-6)
    assert figures["eval_human_nll"] == pytest.approx(whole["eval_human_nll"], rel=1e-3)
    nats_B = torch.tensor(told["fsdp"]["batches"])
    assert (nats_B.bfloat16() != nats_B).any()


STOPPED = """
    import json, os, signal, sys
    from pathlib import Path
    from transformers import TrainerCallback
    from dftserve.train.config import load
    from dftserve.train.run import make_trainer, prepare
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
    """The signal reaches one of them; eight rows do not fill two batches of three."""
    config = replace(run, evaluate_every=1000, save_every=1000, packing=False, steps=50)
    config = replace(config, batch_size=3)
    script, settings_file = tmp_path / "stopped.py", tmp_path / "run.yaml"
    script.write_text(textwrap.dedent(STOPPED))
    save_config(config, settings_file)
    prepared = prepare(config)
    rows = len(prepared.material.heldout)
    assert rows % (2 * config.batch_size), "there is nothing to fill up"
    launched(2, script, settings_file, tmp_path / "told")
    told = [json.loads((tmp_path / f"told-{rank}").read_text()) for rank in (0, 1)]
    assert [each["agreed"] for each in told] == [signal.SIGTERM] * 2
    assert [each["step"] for each in told] == [2, 2]
    checkpoint.verify(Path(run.output) / "checkpoint-2")
    alone = make_trainer(config, prepared.loaded.model, prepared.material).evaluate()
    # What `auto` judges by is of all rows, and the same in every process.
    assert told[0]["batches"] == told[1]["batches"]
    nats, tokens = (sum(each) for each in zip(*told[0]["batches"], strict=True))
    assert nats / tokens == pytest.approx(told[0]["nll"], rel=1e-6)
    assert told[0]["nll"] == told[1]["nll"] == pytest.approx(alone["eval_human_nll"], rel=1e-6)


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
def test_two_processes_that_are_stopped_and_killed_end_as_two_that_are_not_and_as_one(
    run, fsdp, tmp_path
):
    """Signals reach the second of them: one that is saved for in step 2, one in step 5 that is not.
    One process takes the same rows in batches of twice the size."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(INTERRUPTED))

    def settled(name: str) -> tuple[Path, Path]:
        config = replace(run, batch_size=2, fsdp=fsdp, output=str(tmp_path / name))
        save_config(config, tmp_path / f"{name}.yaml")
        return tmp_path / f"{name}.yaml", Path(config.output)

    never, (settings_file, whole) = "100", settled("whole")
    launched(2, script, settings_file, "0", never)
    settings_file, halves = settled("halves")
    launched(2, script, settings_file, str(int(signal.SIGTERM)), "1", ends=False)
    assert [place.name for place in halves.glob("checkpoint-*")] == ["checkpoint-2"]
    launched(2, script, settings_file, str(int(signal.SIGKILL)), "5", ends=False)
    assert not (halves / "final").exists()
    launched(2, script, settings_file, "0", never)
    ours, theirs = (load_file(each / "final" / "model.safetensors") for each in (halves, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    one = train(replace(run, batch_size=4, output=str(tmp_path / "one")))
    alone, together = (
        json.loads((each / checkpoint.RUN).read_text())["figures"]["human_nll"]
        for each in (one, whole / "final")
    )
    assert together == pytest.approx(alone, rel=1e-4)


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_ends_in_a_checkpoint_that_says_what_it_is(run):
    final = train(replace(run, patience=5))
    assert checkpoint.verify(final).files >= 6
    promise = Promise.read(final)
    assert promise.diversity is not None
    assert promise.target_entropy == pytest.approx(3.0, abs=0.5)  # Of 2·N(0, 1) logits.
    assert promise.model_entropy > 0
    assert len(promise.model_deciles) == 9
    told = json.loads((final / checkpoint.RUN).read_text())
    assert told["settings"]["learning_rate"] == 1e-2
    assert told["figures"]["human_nll"] > 0
    assert told["figures"]["untouched_human_nll"] > 0
    assert told["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="this run is finished"):
        train(run)


def test_the_untouched_model_is_scored_first_and_a_worse_one_says_so(run, capsys):
    prepared = prepare(run)
    trainer = make_trainer(run, prepared.loaded.model, prepared.material)
    untouched = trainer.evaluate()["eval_human_nll"]
    config = replace(run, divergence=DivergenceConfig(name="sft"), schedule="constant")
    final = train(replace(config, learning_rate=0.3))
    figures = json.loads((final / checkpoint.RUN).read_text())["figures"]
    assert figures["untouched_human_nll"] == pytest.approx(untouched, rel=1e-6)
    assert figures["human_nll"] > untouched, "a rate that ruins the model"
    told = capsys.readouterr().err
    assert f"{untouched:.4f} before training" in told
    assert "Warning: the trained model is worse" in told
    # Nothing takes long in silence after the last step.
    assert "Measuring the diversity to suggest, on held-out text." in told
    assert f"Writing {final}, and reading it back." in told


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_model_is_kept_where_the_last_is_worse(run, keep):
    """At a rate that ruins the model in the end, `final` is the checkpoint of the lowest NLL."""
    config = replace(run, patience=9, keep=keep, evaluate_every=1, steps=8, learning_rate=0.3)
    config = replace(config, divergence=DivergenceConfig(name="sft"), schedule="constant")
    final = train(config)
    last = max(Path(run.output).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    figures = json.loads((final / checkpoint.RUN).read_text())["figures"]
    assert figures["human_nll"] == pytest.approx(state["best_metric"], rel=1e-6)
    # With one checkpoint to keep the best is what stays.
    assert (state["best_global_step"] < 8) or keep == 1, "the last was the best: nothing is shown"
    assert Path(state["best_model_checkpoint"]).is_dir()


def test_a_resumed_run_ends_in_the_same_bits(run, tmp_path):
    whole = train(replace(run, output=str(tmp_path / "whole")))
    halves = replace(run, output=str(tmp_path / "halves"))
    material = read(halves)
    stopped = make_trainer(halves, _model(halves), material, callbacks=(_stop_after(3),))
    _begin(halves)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = train(halves)
    ours, theirs = (load_file(each / "model.safetensors") for each in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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
    beside = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), final / "adapter"
    )
    tokens_1N = torch.arange(2, 30)[None]
    torch.testing.assert_close(
        merged(tokens_1N).logits, beside(tokens_1N).logits, atol=1e-5, rtol=1e-4
    )
    before, after = (load_file(each / "model.safetensors") for each in (base, final))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("embed" in name or "norm" in name for name in changed)


@pytest.mark.parametrize("name", ["reverse_kl", "skew_kl", "jsd", "sliced_w1", "gem", "sft"])
def test_every_divergence_falls(run, name):
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


def test_adapters_beside_weights_in_bf16_are_trained_and_merged_in_float32(run, base):
    final = train(replace(run, **BF16, learning_rate=1e-3))
    before, after, adapter = (
        load_file(place / name)
        for place, name in (
            (base, "model.safetensors"),
            (final, "model.safetensors"),
            (final / "adapter", "adapter_model.safetensors"),
        )
    )
    scale = LoraConfig().alpha / BF16["lora"].rank
    learnt = 0
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        kept = weight.bfloat16().float()
        if f"{module}.lora_A.weight" in adapter:
            a, b = (adapter[f"{module}.lora_{each}.weight"] for each in "AB")
            assert a.dtype == b.dtype == torch.float32
            learnt += int((b @ a).abs().sum() > 0)
            kept = kept + scale * (b @ a)
        torch.testing.assert_close(after[name], kept, atol=1e-6, rtol=1e-6)
    assert learnt > 0


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_every_divergence_falls_beside_weights_in_bf16(run, name):
    given = {"divergence": DivergenceConfig(name=name), "learning_rate": 1e-2}
    config = replace(run, **BF16, **given, steps=8, batch_size=8)
    material = read(config)
    model = narrowed(load_model(config, material), config).model
    trainer = make_trainer(config, model, material)
    trainer.args.save_strategy = "no"
    trainer.train()
    losses = [line["divergence"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    for weight_name, value in model.named_parameters():
        assert value.dtype == (torch.float32 if "lora_" in weight_name else torch.bfloat16)


def test_weights_in_bf16_take_half_the_memory(run):
    narrow, wide = (plan_of(replace(run, **BF16 | {"weights": each})) for each in ("bf16", "fp32"))
    adapters = 4 * narrow.trained_parameters
    assert narrow.weights_bytes - adapters == (wide.weights_bytes - adapters) / 2
    assert narrow.gradient_bytes == wide.gradient_bytes
    assert "weights bf16, computed in bf16" in narrow.shown()
    assert "for the weights in float32" in narrow.shown()
    assert "for the weights in float32" not in wide.shown()


def test_what_transformers_is_told_of_the_machine(run):
    told = {"optim": "sgd", "attention": "eager", "torch_compile": True, "workers": 2}
    config = replace(run, **told)
    material = read(config)
    trainer = make_trainer(config, load_model(config, material).model, material)
    assert trainer.args.optim == "sgd"
    assert trainer.args.torch_compile is True
    assert trainer.args.dataloader_num_workers == 2
    assert trainer.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_another_optimizer_trains(run, optim):
    final = train(replace(run, optim=optim))
    weights = load_file(final / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_flash_attention_is_refused_with_the_reason(run):
    told = "attention: got 'flash_attention_2'; accepted: eager, sdpa, .* half precision alone"
    with pytest.raises(ValueError, match=told):
        replace(run, attention="flash_attention_2")


def test_checkpointing_is_enabled_by_the_name_that_this_transformers_has():
    model = small_model()
    enable_checkpointing(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_the_weight_is_chosen_by_held_out_text(run, capsys):
    """The target is noise: the text alone must win."""
    divergence = DivergenceConfig(target_weight="auto", candidates=(0.0, 0.9), probe_steps=30)
    config = replace(run, divergence=divergence, steps=90, evaluate_every=90, save_every=90)
    train(config)
    tried = json.loads((Path(run.output) / "weights.json").read_text())
    assert tried["0"]["human_nll"] < tried["0.9"]["human_nll"]
    assert "not told apart" not in capsys.readouterr().err
    told = json.loads((Path(run.output) / "final" / checkpoint.RUN).read_text())
    assert told["settings"]["divergence"]["target_weight"] == 0.0


def test_weights_that_held_out_text_does_not_tell_apart_are_named(run, capsys):
    """The same weight twice, to the last digit but one."""
    divergence = DivergenceConfig(target_weight="auto", candidates=(0.0, 0.00001, 0.9))
    train(replace(run, divergence=divergence, steps=9, evaluate_every=90))
    assert "not told apart from 1e-05" in capsys.readouterr().err


def test_candidates_that_were_judged_by_other_batches_are_refused_with_what_to_do(run):
    divergence = DivergenceConfig(target_weight="auto", candidates=(0.0, 0.9), probe_steps=1)
    config = replace(run, divergence=divergence)
    _begin(config)
    judged = {"0": [[9.0, 3], [8.0, 3]], "0.9": [[9.0, 3]]}
    tried = {name: {"human_nll": 3.0, "batches": batches} for name, batches in judged.items()}
    (Path(run.output) / "weights.json").write_text(json.dumps(tried))
    with pytest.raises(ValueError, match=r"weights\.json: got candidates .* Remove it"):
        train(config)


@pytest.mark.parametrize("steps", [1, 3])
def test_no_step_of_a_short_run_is_taken_at_a_rate_of_0(run, steps):
    """`auto` tries its candidates in short runs: one step at 0 of one would try nothing."""
    config = replace(run, steps=steps)
    trainer = make_trainer(config, _model(config), read(config))
    trainer.args.save_strategy = "no"
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "grad_norm" in line]
    assert len(rates) == steps
    assert rates[0] == config.learning_rate


def test_a_long_run_warms_up(run):
    assert warmup_of(replace(run, steps=100), read(run)) == run.warmup > 0


def test_auto_never_has_two_models(run, monkeypatch):
    """Of one process: a run that fits in memory, by `--plan`, tries its candidates in it too."""
    load, models, living = lm.load, [], []

    def counted(*args, **named):
        living.append(sum(each() is not None for each in models))
        model = load(*args, **named)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(lm, "load", counted)
    divergence = DivergenceConfig(target_weight="auto", candidates=(0.0, 0.9), probe_steps=1)
    train(replace(run, divergence=divergence))
    # The check before, two candidates, the run itself, and its checkpoint read back beside it.
    assert living[:4] == [0, 0, 0, 0]
    assert len(living) == 5


@pytest.mark.parametrize("packing", [True, False])
def test_the_first_rows_are_a_sample_of_the_corpus(store, packing):
    """Held-out figures are of the first rows: a corpus in files must not give its first file."""
    rows = Rows(TargetStore(store), "train", longest=64, packing=packing, seed=0)
    count = TargetStore(store).count("train")
    first = [piece.document for row in rows.rows for piece in row][: count // 2]
    # All from the first half by chance: 1 in C(60, 30).
    assert any(document >= count // 2 for document in first)
    again = Rows(TargetStore(store), "train", longest=64, packing=packing, seed=0)
    assert again.rows == rows.rows


@pytest.mark.parametrize("packing", [True, False])
def test_documents_that_are_cut_are_told(run, store, packing):
    """How many, and what of them is learnt without what stands before."""
    config = replace(run, max_length=16, packing=packing)
    held = TargetStore(store)
    lengths = [length for length in held.lengths("train") if length > 16]
    plan = plan_of(config)
    told = f"{len(lengths):,} documents are longer than a row (max_length) and are cut: "
    assert plan.cut is not None
    assert plan.cut.startswith(told)
    learnt = int(plan.cut.removeprefix(told).split()[0].replace(",", ""))
    assert learnt == sum(length - 16 for length in lengths)
    assert plan.cut in plan.shown()
    assert plan.cut in read(config).shown()
    assert plan_of(replace(run, packing=packing)).cut is None


@pytest.mark.parametrize(
    ("name", "first", "steps", "each"),
    [("forward_kl", 0.0, 600, 50), ("forward_kl", 0.0, 120, 10), ("reverse_kl", 0.3, 18, 2),
     ("jsd", 0.0, 3, 1)],
)  # fmt: skip
def test_auto_tries_the_text_alone_and_takes_a_third_of_the_run(run, name, first, steps, each):
    config = replace(run, steps=steps, divergence=DivergenceConfig(name=name, target_weight="auto"))
    assert config.divergence.to_try[0] == first
    assert probe_steps(config, read(config)) == each


def test_sigterm_saves_and_exits_and_the_run_goes_on(run, tmp_path):
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
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    saved = sorted(Path(run.output).glob("checkpoint-*"))
    assert len(saved) == 1
    checkpoint.verify(saved[0])


# ── What is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "says"),
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
        ({"weights": "bf16", "lora.rank": "4"}, "precision: got 'fp32' beside weights bf16"),
        (
            {"weights": "bf16", "lora.rank": "4", "precision": "bf16", "fsdp": "true"},
            "fsdp: got true beside weights bf16",
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
def test_a_wrong_setting_is_refused_by_name(change, says):
    given = {"model": "m", "targets": "t", "output": "o"} | change
    with pytest.raises(ValueError, match=says):
        configs.load(None, given)


@pytest.mark.parametrize(
    ("given", "meant"), [("lr", "learning_rate"), ("per_device_train_batch_size", "batch_size")]
)
def test_what_other_trainers_call_a_setting_leads_to_ours(given, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        configs.load(None, {"model": "m", "targets": "t", "output": "o", given: "1"})


def test_every_synonym_leads_to_a_setting():
    kinds = (TrainConfig, DivergenceConfig, LoraConfig)
    assert set(SYNONYMS.values()) <= {each.name for kind in kinds for each in fields(kind)}
    assert not set(SYNONYMS) & {each.name for each in fields(TrainConfig)}


@pytest.mark.parametrize(("fsdp", "most"), [(True, 256), (False, None)])
def test_checks_on_the_cpu_of_a_run_on_gpus_are_short_and_say_so(
    run, monkeypatch, capsys, fsdp, most
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("dftserve.train.run._device", lambda config: torch.device("cpu"))
    given = []
    for name in ("packing_leak", "check_batch"):
        monkeypatch.setattr(
            f"dftserve.lm.LanguageModel.{name}", lambda *_, most: given.append(most)
        )
    prepare(replace(run, fsdp=fsdp, max_length=1024))
    assert given == [most, most]
    assert ("at most 256 tokens at once" in capsys.readouterr().err) is fsdp


def test_the_candidates_are_a_list_of_lines():
    told = weights_shown({"0": 10.736137517668388, "0.6": 10.709326459946533}, "0.6")
    assert told.splitlines()[1:] == ["  0    10.7361", "  0.6  10.7093  taken"]


def test_verify_says_of_a_run_what_its_checkpoint_is(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="a run that has not ended; run the same train again"):
        checkpoint.verify(tmp_path)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "checksums.json").write_text("{}")
    with pytest.raises(ValueError, match=r"it is a run; give its checkpoint, .*/final"):
        checkpoint.verify(tmp_path)


def test_a_learning_rate_in_yamls_own_dialect(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{model: m, targets: t, output: o, learning_rate: 2e-5}")
    assert configs.load(path, {"epochs": "3"}).learning_rate == 2e-5


def test_a_run_that_cannot_be_leaves_nothing(run, base, store, tmp_path):
    other = save_model(tmp_path / "other", "gpt2")
    (other / "tokenizer.json").write_text(
        (base / "tokenizer.json").read_text().replace('"w7"', '"w7x"')
    )
    wrong = {
        "no config.json": replace(run, model=str(tmp_path)),
        "another tokenizer": replace(run, model=str(other)),
        "has no manifest.json": replace(run, targets=str(tmp_path)),
    }
    for says, config in wrong.items():
        with pytest.raises(ValueError, match=says):
            train(config)
        assert not Path(config.output).exists()


def test_another_runs_settings_are_told_apart_by_name(run):
    train(replace(run, steps=1))
    shutil.rmtree(Path(run.output) / "final")
    with pytest.raises(ValueError, match=r"divergence.name is 'forward_kl', not 'sft'"):
        train(replace(run, steps=1, divergence=DivergenceConfig(name="sft")))


def test_a_run_too_short_to_stop_early_is_refused(run):
    with pytest.raises(ValueError, match="lower evaluate_every"):
        train(replace(run, patience=2, steps=3))


def test_another_runs_folder_is_not_touched(run):
    Path(run.output).mkdir()
    (Path(run.output) / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="neither empty nor a run"):
        train(run)
    assert os.listdir(run.output) == ["notes.txt"]


# ── A folder belongs to one run ──────────────────────────────────────────────────────────────────


def begun(config: TrainConfig, step: int = 3) -> TrainConfig:
    """The configuration of a run that was stopped behind a checkpoint."""
    trainer = make_trainer(config, _model(config), read(config), callbacks=(_stop_after(step),))
    _begin(config)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return config


def test_a_run_does_not_go_on_with_other_targets_at_the_same_place(run, tmp_path):
    config = begun(replace(run, targets=str(save_store(tmp_path / "store"))))
    shutil.rmtree(config.targets)
    save_store(Path(config.targets), seed=5)
    with pytest.raises(ValueError, match=r"began with another `targets` .* its manifest differ"):
        train(config)
    assert not (Path(config.output) / "final").exists()


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["whole", "adapter"])
def test_a_run_does_not_go_on_with_another_model_at_the_same_place(run, tmp_path, lora):
    """An adapter that was trained on one would else be merged into the other."""
    config = begun(replace(run, model=str(save_model(tmp_path / "base")), lora=lora))
    save_model(Path(config.model), seed=5)
    with pytest.raises(ValueError, match=r"began with another `model` .* configuration or weights"):
        train(config)
    assert not (Path(config.output) / "final").exists()


def test_a_run_does_not_go_on_with_another_number_of_processes(run, monkeypatch):
    config = begun(run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    says = r"of 1 processes, not 2: .*--nproc-per-node=1"
    with pytest.raises(ValueError, match=says), RunFolder(config):
        pass


def test_a_run_goes_on_wherever_its_folders_are_by_now(run, tmp_path, monkeypatch):
    """The best checkpoint too is found where it is: the last one is worse, and not kept."""
    config = replace(run, model=str(save_model(tmp_path / "base")), steps=8, patience=5)
    begun(replace(config, learning_rate=0.5, evaluate_every=1), step=4)
    shutil.move(run.output, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    moved = replace(config, model="base", output="moved", learning_rate=0.5, evaluate_every=1)
    train(moved)
    state = json.loads(max(Path("moved").glob("checkpoint-*/trainer_state.json")).read_text())
    assert Path(state["best_model_checkpoint"]).parent == Path("moved")
    assert Path(state["best_model_checkpoint"]).is_dir()


def rewritten(config: TrainConfig, change) -> None:
    path = Path(config.output) / "settings.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "names", [("workers",), ("divergence", "projections"), ("lora", "dropout")]
)
def test_a_run_goes_on_where_a_setting_came_later_and_has_its_default(run, names):
    config = replace(run, lora=LoraConfig())
    _begin(config)

    def without(content):
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    rewritten(config, without)
    with RunFolder(config):
        pass
    other = {"workers": replace(config, workers=2),
             "divergence": replace(config, divergence=DivergenceConfig(projections=9)),
             "lora": replace(config, lora=LoraConfig(dropout=0.1))}[names[0]]  # fmt: skip
    with pytest.raises(ValueError, match=f"whose {'.'.join(names)} is"), RunFolder(other):
        pass


@pytest.mark.parametrize("given", [(LoraConfig(), None), (None, LoraConfig())])
def test_adapters_do_not_come_or_go_in_a_run(run, given):
    before, after = (replace(run, lora=lora) for lora in given)
    _begin(before)
    with pytest.raises(ValueError, match=r"whose lora.* is"), RunFolder(after):
        pass


def test_a_setting_that_this_version_does_not_have_is_told(run):
    _begin(run)
    rewritten(run, lambda content: content.update(momentum=0.9))
    with pytest.raises(ValueError, match=r"whose momentum is 0\.9, not None"), RunFolder(run):
        pass


def test_a_run_without_its_origin_is_one_of_an_earlier_version_and_not_to_be_removed(run):
    _begin(run)
    rewritten(run, lambda content: content.pop("origin"))
    with pytest.raises(ValueError, match="begun by an earlier version") as told, RunFolder(run):
        pass
    assert "remove" not in str(told.value)


def test_a_folder_that_is_written_to_is_refused_before_weights_are_read(run, monkeypatch):
    with RunFolder(run) as folder:
        folder.begin()
        monkeypatch.setattr(run_folder, "model_digest", lambda found: pytest.fail("weights read"))
        with pytest.raises(ValueError, match="another training writes to it"), RunFolder(run):
            pass


def test_a_refused_start_gives_the_lock_back(run):
    _begin(run)
    with pytest.raises(ValueError, match="whose seed is 0, not 1"):
        RunFolder(replace(run, seed=1)).__enter__()
    with RunFolder(run):
        pass


def test_a_file_is_sampled_once_a_process_until_it_changes(tmp_path, monkeypatch):
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


def test_of_two_that_begin_at_once_the_second_is_refused(run):
    with RunFolder(run) as first, RunFolder(replace(run, seed=1)) as second:
        first.begin()
        with pytest.raises(ValueError, match="another training writes to it"):
            second.begin()


def test_where_the_newest_checkpoint_is_damaged_an_older_that_is_whole_is_named(run):
    config = begun(run, step=5)
    newest, older = (Path(config.output) / f"checkpoint-{step}" for step in (4, 2))
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"or remove .*checkpoint-4 to go on from checkpoint-2"):
        train(config)
    (older / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"copy the checkpoint anew\.$"):
        train(config)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_no_checkpoint(run):
    prepared = prepare(run)
    trainer = make_trainer(run, prepared.loaded.model, prepared.material)
    prepared.loaded.model.model.norm.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="the divergence is nan"):
        trainer.train()
    assert not list(Path(run.output).glob("checkpoint-*"))


def test_tensorboard_gets_the_figures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(run, report_to="tensorboard"))
    events = next(Path(run.output).rglob("events.out.tfevents.*"))
    told = EventAccumulator(str(events.parent))
    told.Reload()
    assert {"train/divergence", "train/model_entropy", "eval/human_nll"} <= set(
        told.Tags()["scalars"]
    )
