"""Training by several processes that torchrun starts: restarts after kills, and two machines."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dftserve.serve import held_port
from dftserve.train import processes, run_folder
from dftserve.train.config import FeatureMatchingConfig, StoreConfig, TrainConfig
from dftserve.train.material import read, steps_of_epoch
from dftserve.train.run import train
from dftserve.train.run_folder import RunFolder
from tests.conftest import PATIENCE
from tests.training import save_config, save_model, save_sealed, save_store, small_run

OWN_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("processes")
    base, store = save_model(folder / "base"), save_store(folder / "store")
    return small_run(base, store, folder / "run", steps=12, evaluate_every=5)


def start_torchrun(*command: Path | str, **environment: str) -> subprocess.Popen:
    """A torchrun that communicates over loopback, on CPUs."""
    defaults = {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **defaults, **environment},
    )


ONE_MACHINE = ("--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
TRAIN = ("-m", "dftserve.cli", "train")


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "final" / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory) -> dict[str, torch.Tensor]:
    return train_uninterrupted(run, tmp_path_factory.mktemp("uninterrupted"))


def train_uninterrupted(run: TrainConfig, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an uninterrupted run of two processes."""
    config = replace(run, output=str(folder / "run"))
    torchrun = start_torchrun(*ONE_MACHINE, *TRAIN, save_config(config, folder / "run.yaml"))
    output, _ = torchrun.communicate()
    assert torchrun.returncode == 0, output[-3000:]
    assert output.count(f"{config.output}/final\n") == 1, "the result is not printed once"
    trained = weights(config)
    start = load_file(Path(run.model) / "model.safetensors")
    assert not all(torch.equal(trained[name], start[name]) for name in start), "nothing was learnt"
    return trained


# ── Kills and restarts ───────────────────────────────────────────────────────────────────────────

KILLED = """
    import json, os, signal, sys
    from pathlib import Path
    from transformers import TrainerCallback
    from dftserve import atomic
    from dftserve.cli import main
    from dftserve.train import run
    settings_file, kills_file, noted = sys.argv[1:]
    kills = json.loads(Path(kills_file).read_text())
    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    moment, victim, step = kills[start] if start < len(kills) else (None, None, None)
    def die():
        Path(noted, str(start)).write_text(moment)
        os.kill(os.getpid(), signal.SIGKILL)
    class Killed(TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            if moment == "step" and rank == victim and state.global_step == step:
                die()
        def on_evaluate(self, args, state, control, **given):
            if moment == "evaluation" and rank == victim and state.global_step >= step:
                die()
    made = run.make_trainer
    run.make_trainer = lambda *given, **named: (
        (trainer := made(*given, **named)).add_callback(Killed()) or trainer
    )
    move = atomic.move_folder
    def moved(folder, place):
        if moment == "save" and place.name == f"checkpoint-{step}":
            die()
        move(folder, place)
        if moment == "final" and place.name == "final":
            die()
    atomic.move_folder = moved
    sys.argv = ["dftserve", "train", settings_file]
    main()
"""


def assert_survives(
    kills: Sequence[tuple[str, int, int]],
    config: TrainConfig,
    expected: dict[str, torch.Tensor],
    folder: Path,
) -> str:
    """Assert that a run that is killed and restarted ends in the expected weights; its output.

    Args:
        kills: for each start: a moment, the rank that dies then, and the step.
    """
    script, deaths, plan = folder / "killed.py", folder / "noted", folder / "kills.json"
    script.write_text(textwrap.dedent(KILLED))
    plan.write_text(json.dumps(kills))
    deaths.mkdir()
    config = replace(config, output=str(folder / "run"))
    torchrun = start_torchrun(
        *ONE_MACHINE,
        f"--max-restarts={len(kills)}",
        *(script, save_config(config, folder / "run.yaml"), plan, deaths),
        **OWN_STORES,
    )
    output, _ = torchrun.communicate()
    assert torchrun.returncode == 0, output[-6000:]
    moments = {int(path.name): path.read_text() for path in deaths.iterdir()}
    assert moments == {start: moment for start, (moment, *_) in enumerate(kills)}
    assert_same(weights(config), expected)
    assert not list(Path(config.output).glob("*.partial")), "partial folders of a kill remain"
    return output


def test_a_run_whose_process_is_killed_resumes_and_ends_in_the_same_weights(
    run, uninterrupted, tmp_path
):
    output = assert_survives([("step", 1, 5)], run, uninterrupted, tmp_path)
    assert f"Going on from {tmp_path / 'run'}/checkpoint-4." in output


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2])
def test_a_run_resumed_in_a_later_epoch_keeps_that_epochs_order(run, tmp_path, number):
    """With one store, and with two that are mixed by weights."""
    first = StoreConfig(path=str(save_store(tmp_path / "first", count=45, seed=7)), weight=0.6)
    second = StoreConfig(path=run.stores[0].path, weight=0.4)
    run = replace(run, targets=(first, second)[:number])
    # A step takes the rows of two processes.
    steps = steps_of_epoch(replace(run, batch_size=2 * run.batch_size), read(run))
    assert steps < 8 < 2 * steps, "the run is not resumed in the second epoch"
    expected = train_uninterrupted(run, new_folder(tmp_path / "undisturbed"))
    output = assert_survives([("step", 1, 9)], run, expected, new_folder(tmp_path / "disturbed"))
    assert "checkpoint-8." in output


@pytest.mark.long
def test_a_restarted_run_draws_the_same_continuations(run, tmp_path):
    """The processes draw different ones; a repeated step draws the same as before."""
    run = replace(run, feature_matching=FeatureMatchingConfig(samples=3, length=3, every=8))
    expected = train_uninterrupted(run, new_folder(tmp_path / "undisturbed"))
    assert_survives([("step", 1, 5)], run, expected, new_folder(tmp_path / "disturbed"))


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.long
@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_ten_times_ends_in_the_same_weights(run, uninterrupted, tmp_path, seed):
    """Either process is killed at random steps and during evaluations, the first one also while it
    saves and after it has written `final`."""
    source = random.Random(seed)
    steps = sorted(source.choices(range(8), k=5))
    kills = [
        ("evaluation", 0, 0),  # The evaluation before training.
        *(("step", source.randrange(2), step) for step in steps),
        ("save", 0, steps[-1] // 2 * 2 + 2),
        ("evaluation", 1, 10),
        ("save", 0, run.steps),
        ("final", 0, run.steps),
    ]
    assert len(kills) == 10
    output = assert_survives(kills, run, uninterrupted, tmp_path)
    assert "/final exists: this run is finished." in output


def test_torchrun_with_restarts_and_a_shared_store_is_refused(run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun"):
        train(run)
    assert not Path(run.output).exists()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    processes.check_restarts()


# ── Two machines ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def meeting() -> Iterator[tuple[str, ...]]:
    """torchrun's flags for agents that meet at a port."""
    with held_port() as port:
        yield f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-backend=c10d", "--rdzv-id=run"


def train_on_two_machines(
    meeting: tuple[str, ...], first: Path, second: Path
) -> list[tuple[int, str]]:
    """(exit code, output) of two agents of one process each."""
    agents = [
        start_torchrun("--nnodes=2", "--nproc-per-node=1", *meeting, *TRAIN, settings)
        for settings in (first, second)
    ]
    outputs = ["", ""]

    def read(index: int) -> None:
        outputs[index], _ = agents[index].communicate()

    readers = [threading.Thread(target=read, args=(index,)) for index in (0, 1)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return [(agent.returncode, output) for agent, output in zip(agents, outputs, strict=True)]


@pytest.mark.long
def test_two_machines_end_in_the_weights_of_two_processes_on_one(
    run, uninterrupted, tmp_path, meeting
):
    """On CPUs also with `fsdp`, which has no effect there and says so."""
    config = replace(run, output=str(tmp_path / "run"), fsdp=True)
    settings = save_config(config, tmp_path / "run.yaml")
    results = train_on_two_machines(meeting, settings, settings)
    assert [code for code, _ in results] == [0, 0], results
    assert sum(output.count("does not shard on CPUs") for _, output in results) == 1
    assert_same(weights(config), uninterrupted)


MACHINE_DIES = """
    import os, signal, sys
    from transformers import TrainerCallback
    from dftserve.cli import main
    from dftserve.train import run
    class Dies(TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            if "DIES" in os.environ and state.global_step == 5:
                os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
    made = run.make_trainer
    run.make_trainer = lambda *given, **named: (
        (trainer := made(*given, **named)).add_callback(Dies()) or trainer
    )
    main()
"""


@pytest.mark.long
def test_a_run_whose_machine_dies_and_returns_ends_in_equal_weights(
    run, uninterrupted, tmp_path, meeting
):
    """The other machine, which hosts the rendezvous, waits for it."""
    script = tmp_path / "dies.py"
    script.write_text(textwrap.dedent(MACHINE_DIES))
    config = replace(run, output=str(tmp_path / "run"))
    command = ("train", save_config(config, tmp_path / "run.yaml"))
    nodes = ("--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", *meeting)
    surviving = start_torchrun(*nodes, "--rdzv-conf=is_host=1", script, *command, **OWN_STORES)
    returning = (*nodes, "--rdzv-conf=is_host=0", script, *command)
    dying = start_torchrun(*returning, **OWN_STORES, DIES="1")
    dying.communicate()
    assert dying.returncode == -signal.SIGKILL
    assert not (Path(config.output) / "final").exists()
    for agent in (start_torchrun(*returning, **OWN_STORES), surviving):
        output, _ = agent.communicate()
        assert agent.returncode == 0, output[-3000:]
    assert_same(weights(config), uninterrupted)


@pytest.mark.long
def test_a_machine_without_the_targets_is_refused_on_both(run, tmp_path, meeting):
    """Neither waits for the other until torch's timeout."""
    config = replace(run, output=str(tmp_path / "run"))
    complete = save_config(config, tmp_path / "run.yaml")
    lacking = save_config(replace(config, targets=str(tmp_path / "no")), tmp_path / "other.yaml")
    for code, output in train_on_two_machines(meeting, complete, lacking):
        assert code != 0
        assert f"{tmp_path / 'no'} does not exist" in output
    assert not Path(config.output).exists()


# ── Processes must agree ─────────────────────────────────────────────────────────────────────────


def begin_run(config: TrainConfig) -> None:
    with ExitStack() as opened:
        with processes.together():
            folder = opened.enter_context(RunFolder(config))
        folder.check_same_run()
        with processes.together():
            folder.begin()
        folder.check_seen()


def refusals_of_two_processes(
    monkeypatch, *configs: TrainConfig, do: Callable[[TrainConfig], object] = begin_run
) -> list[str]:
    """The refusal that each of two processes gets; threads stand in for the processes."""
    local, barrier, values = threading.local(), threading.Barrier(2, timeout=PATIENCE), [None, None]

    def gather(value):
        values[local.rank] = json.loads(json.dumps(value))
        barrier.wait()
        copied = list(values)
        barrier.wait()
        return copied

    monkeypatch.setattr(processes, "gather", gather)
    monkeypatch.setattr(processes, "rank", lambda: local.rank)
    monkeypatch.setattr(processes, "count", lambda: 2)
    refusals = ["", ""]

    def run_as(rank: int) -> None:
        local.rank = rank
        try:
            do(configs[rank])
        except ValueError as error:
            refusals[rank] = str(error)

    threads = [threading.Thread(target=run_as, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return refusals


@pytest.fixture
def here(run, tmp_path, monkeypatch) -> TrainConfig:
    monkeypatch.setattr(run_folder, "SEEN_WITHIN_S", 0.3)
    return replace(run, output=str(tmp_path / "run"))


def test_processes_may_mount_the_folders_of_a_run_at_different_paths(here, tmp_path, monkeypatch):
    (tmp_path / "mounted").symlink_to(Path(here.model).parent)
    (tmp_path / "shared").symlink_to(tmp_path)
    elsewhere = replace(
        here,
        model=str(tmp_path / "mounted" / "base"),
        targets=str(tmp_path / "mounted" / "store"),
        output=str(tmp_path / "shared" / "run"),
    )
    assert refusals_of_two_processes(monkeypatch, here, elsewhere) == ["", ""]


def other_settings(config: TrainConfig, folder: Path) -> tuple[TrainConfig, str]:
    return replace(config, learning_rate=0.5), "learning_rate: got 0.5 in process 1 on"


def other_targets(config: TrainConfig, folder: Path) -> tuple[TrainConfig, str]:
    other = replace(config, targets=str(save_store(folder / "other", seed=5)))
    return other, "targets: got another one in process 1 on"


def other_model(config: TrainConfig, folder: Path) -> tuple[TrainConfig, str]:
    other = replace(config, model=str(save_model(folder / "other", seed=5)))
    return other, "model: got another one in process 1 on"


@pytest.mark.parametrize("other", [other_settings, other_targets, other_model])
def test_a_process_with_another_run_is_refused_in_all_and_nothing_is_written(
    here, tmp_path, monkeypatch, other
):
    second, message = other(here, tmp_path)
    first, others = refusals_of_two_processes(monkeypatch, here, second)
    assert first == others
    assert message in first
    assert not Path(here.output).exists()


@pytest.mark.parametrize("is_copied", [False, True], ids=["missing", "a copy"])
def test_an_output_that_is_not_shared_is_refused_in_all_processes(
    here, tmp_path, monkeypatch, is_copied
):
    own = replace(here, output=str(tmp_path / "own"))
    if is_copied:
        monkeypatch.setattr(processes, "count", lambda: 2)
        with RunFolder(own) as folder:
            folder.begin()
    first, second = refusals_of_two_processes(monkeypatch, here, own)
    for refusal in (first, second):
        assert "process 1 on" in refusal
        assert "one folder, on a file system that all machines share" in refusal


def test_a_refusal_in_one_process_is_reported_in_the_other(here, tmp_path, monkeypatch):
    lacking = replace(here, targets=str(tmp_path / "no"))
    first, second = refusals_of_two_processes(monkeypatch, here, lacking)
    assert f"{tmp_path / 'no'} does not exist" in second
    assert first == f"process 1 on {socket.gethostname()}: {second}"


def test_all_processes_resume_from_the_checkpoint_that_the_first_finds(here, tmp_path, monkeypatch):
    """Another machine sees the newest checkpoint only after a delay."""
    monkeypatch.setattr(run_folder, "SEEN_WITHIN_S", 600.0)
    newest = save_sealed(Path(here.output) / "checkpoint-4", {"weights": "some"})
    late = replace(here, output=str(tmp_path / "late"))
    save_sealed(Path(late.output) / "checkpoint-2", {"weights": "some"})
    delayed = Path(late.output) / "checkpoint-4"
    states = {}

    def resume(config: TrainConfig) -> None:
        if config is late:
            threading.Timer(0.3, shutil.copytree, (newest, delayed)).start()
        states[config.output] = RunFolder(config).resume_state()

    assert refusals_of_two_processes(monkeypatch, here, late, do=resume) == ["", ""]
    assert states == {here.output: (newest, {}), late.output: (delayed, {})}


def test_a_checkpoint_that_one_process_does_not_see_is_refused_in_all(here, tmp_path, monkeypatch):
    save_sealed(Path(here.output) / "checkpoint-4", {"weights": "some"})
    blind = replace(here, output=str(tmp_path / "blind"))
    first, second = refusals_of_two_processes(
        monkeypatch, here, blind, do=lambda config: RunFolder(config).resume_state()
    )
    assert str(Path(blind.output) / "checkpoint-4") in second
    assert first == f"process 1 on {socket.gethostname()}: {second}"
