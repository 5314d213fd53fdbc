"""Builds shards with several processes of this machine, each of which loads the source and writes
its own shards."""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dftserve.targets import signals, store
from dftserve.targets.source import Documents, MakeSource
from dftserve.targets.store import Plan

CHECK_SECONDS = 0.5
"""Interval at which the processes of a build are checked for crashes."""


def build(
    folder: Path, plan: Plan, documents: Documents, make_source: MakeSource, processes: int
) -> Iterator[int]:
    """Write the missing shards; yields the number of tokens of each batch.

    Args:
        make_source: makes the source of `plan` in each process; it is pickled.

    Raises:
        RuntimeError: a process has crashed.
        ValueError, OSError: of a process, as `store.build` raises them.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(
            target=_worker, args=(folder, plan, documents, make_source, (rank, processes), results)
        )
        for rank in range(processes)
    ]
    try:
        _start(workers)
        yield from _finished_tokens(results, workers)
    except BaseException:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        raise
    finally:
        # Workers that have built all are left to end by themselves.
        for worker in workers:
            if worker.pid is not None:
                worker.join()


def _start(workers: Sequence[Any]) -> None:
    """Start workers that SIGINT does not reach: a terminal sends it to all processes, and the
    parent ends the workers."""
    with signals.deferred():
        # The workers inherit the mask. In the parent, another thread may receive the signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for worker in workers:
                worker.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _finished_tokens(results: Any, workers: Sequence[Any]) -> Iterator[int]:
    """The number of tokens of each batch of all workers, until each has sent None."""
    ended = 0
    while ended < len(workers):
        try:
            result = results.get(timeout=CHECK_SECONDS)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            if dead:
                raise RuntimeError(
                    f"a process of the build ended with exit code {dead[0]}; run it again, with "
                    "fewer processes if memory ran out."
                ) from None
            continue
        if isinstance(result, Exception):
            raise result
        if result is None:
            ended += 1
        else:
            yield result


def _worker(
    folder: Path,
    plan: Plan,
    documents: Documents,
    make_source: MakeSource,
    rank_and_world: tuple[int, int],
    results: Any,
) -> None:
    rank, world = rank_and_world
    signal.signal(signal.SIGTERM, signals.exit_once)
    threading.Thread(target=_end_with_parent, args=(results,), daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _take_device(rank)
    try:
        source = make_source(documents)
        built = store.build(folder, plan, source, documents, rank=rank, world=world)
        for tokens in built:
            results.put(tokens)
        results.put(None)
    except (ValueError, OSError, RuntimeError) as error:
        # Send a new exception, since some cannot be pickled.
        kind = next(k for k in (ValueError, OSError, RuntimeError) if isinstance(error, k))
        sent = kind(str(error))
        sent.add_note(traceback.format_exc())  # Notes are pickled; tracebacks are not.
        results.put(sent)


def _end_with_parent(results: Any) -> None:
    """End this process, as by SIGTERM, once its parent has died without ending it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        results.cancel_join_thread()  # Nobody reads them any more.
        os.kill(os.getpid(), signal.SIGTERM)


def _take_device(rank: int) -> None:
    """Distribute the available GPUs over the processes: "cuda" is a different one for each."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
