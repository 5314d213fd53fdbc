"""Engines and models that tests share, because starting vLLM is slow.

The engines are real vLLM servers over HTTP, one of each kind for a whole run:
    v1, v1_stock    the V1 runner with the plug-in, and with DFTSERVE_DISABLE=1
    v2, v2_stock    the same with the V2 runner, on a CPU through tests/shim
    v1_smollm2, v2_smollm2  (v2: long) both runners with the plug-in and a real model
    v1_bare, v2_bare  (long) a separate environment with vLLM and without the plug-in
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

from dftserve.serve import running
from tests.environment import Environment, make_environment

# No deadline: on a busy machine a slow example is not a failure.
hypothesis.settings.register_profile("dftserve", deadline=None)
hypothesis.settings.load_profile("dftserve")

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "shim"
KEY = "test-key"

FLAGS = (
    "--served-model-name=demo",
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=512",
    "--max-num-seqs=16",
    "--kv-cache-memory-bytes=64000000",
    "--logprobs-mode=processed_logprobs",
    "--max-logprobs=-1",
    f"--api-key={KEY}",
)
QUICK_STEPS = 40
"""Enough for tests that need a model with entropies of a few nats, right or wrong."""
BRIEFLY = {"stories": 24, "epochs": 1.0, "learning_rate": 1e-4}
# So few blocks that sixteen short texts fit at once, but sixteen long ones do not.
FEW_BLOCKS = "--num-gpu-blocks-override=20"
REAL_MODEL_MEMORY = "--kv-cache-memory-bytes=400000000"
"""Enough that sixteen texts of a real model fit at once."""
PATIENCE = 3600.0
"""Timeout in seconds for a server's start or an answer. It is long because slowness on a busy
machine is not a failure; a server that exits is noticed immediately."""


@pytest.fixture(autouse=True)
def loggers_at_their_defaults() -> None:
    """Reset the loggers: importing vLLM's server permanently sets the root logger and its handlers
    to ERROR, and the plug-in gives the library's logger vLLM's handlers."""
    logging.root.setLevel(logging.WARNING)
    for handler in logging.root.handlers:
        handler.setLevel(logging.NOTSET)
    library = logging.getLogger("dftserve")
    library.handlers.clear()
    library.setLevel(logging.NOTSET)
    library.propagate = True


@dataclass(frozen=True)
class Engine:
    """A server under test."""

    name: str
    url: str
    model_folder: Path
    fault_file: Path
    log: Path
    pid: int

    @property
    def is_v2(self) -> bool:
        return self.name.startswith("v2")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real texts, which are not part of the repository."""
    folder = os.environ.get("DFTSERVE_DATA")
    if not folder:
        pytest.skip("DFTSERVE_DATA is not set to a folder of real texts")
    return Path(folder)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return tuned_model()


def tuned_model() -> Path:
    """A checkpoint tuned by this project, whose sampling defaults (top-k, top-p) cut tokens.

    It is the stories' model after a short training and a brief tuning toward itself.
    """
    from dftserve import checkpoint
    from dftserve.stories.tune import tune

    sources = [*(ROOT / "dftserve/stories").glob("*"), *(ROOT / "dftserve/train").glob("*.py")]
    content = b"".join(path.read_bytes() for path in sorted(sources) if path.is_file())
    place = ROOT / "build" / "test-model" / hashlib.sha256(content).hexdigest()[:16]
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):  # Several test processes may build it at the same time.
        folder = tune(place, print, steps=QUICK_STEPS, **BRIEFLY)[-1].folder
        defaults = folder / "generation_config.json"
        cutting = json.loads(defaults.read_text()) | {"top_k": 50, "top_p": 0.9}
        defaults.write_text(json.dumps(cutting))
        checkpoint.seal(folder)
    return folder


@contextlib.contextmanager
def engine_running(
    name: str, model_folder: Path, place: Path, *flags: str, env: dict[str, str] | None = None
) -> Iterator[Engine]:
    """A server with the runner that `name` begins with (v1 or v2)."""
    fault_file = place / f"{name}.fault"
    environment = {
        "OMP_NUM_THREADS": "1",
        "TEST_FAULT_FILE": str(fault_file),
        "PYTHONPATH": os.pathsep.join([str(SHIM), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        **(env or {}),
    }
    if name.startswith("v2"):
        environment["TEST_V2_ON_CPU"] = "1"
    log = place / f"{name}.log"
    with running(
        str(model_folder), *FLAGS, *flags, env=environment, log=log, timeout=PATIENCE
    ) as server:
        yield Engine(
            name, server.url.removesuffix("/v1"), model_folder, fault_file, log, server.pid
        )


def _shared(name: str, *flags: str, env: dict[str, str] | None = None):
    @pytest.fixture(scope="session", name=name)
    def engine_fixture(model_folder, styles_folder, tmp_path_factory):
        place = tmp_path_factory.mktemp(name)
        variables = {"DFTSERVE_STYLES": str(styles_folder), **(env or {})}
        with engine_running(name, model_folder, place, *flags, env=variables) as engine:
            yield engine

    return engine_fixture


@pytest.fixture(scope="session")
def styles_folder(model_folder, tmp_path_factory) -> Path:
    """The style profiles of the shared engines: `habits`."""
    from dftserve.styles import profile
    from tests.styles import of_stories

    folder = tmp_path_factory.mktemp("styles")
    profile.write(folder / "habits", of_stories(model_folder))
    return folder


v1 = _shared("v1", FEW_BLOCKS)
v1_stock = _shared("v1_stock", FEW_BLOCKS, env={"DFTSERVE_DISABLE": "1"})
v2 = _shared("v2")
v2_stock = _shared("v2_stock", env={"DFTSERVE_DISABLE": "1"})


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The demo's real model, with a vocabulary of 49,152."""
    from dftserve.demo.model import smollm2

    try:
        return smollm2(ROOT / "build" / "demo" / "smollm2")
    except RuntimeError as error:
        pytest.skip(str(error))


def _real(name: str):
    @pytest.fixture(scope="session", name=name)
    def engine_fixture(smollm2_folder, tmp_path_factory):
        place = tmp_path_factory.mktemp(name)
        with engine_running(name, smollm2_folder, place, REAL_MODEL_MEMORY) as engine:
            yield engine

    return engine_fixture


v1_smollm2 = _real("v1_smollm2")
v2_smollm2 = _real("v2_smollm2")


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory) -> Environment:
    return make_environment(tmp_path_factory.mktemp("bare"))


def _bare(name: str, *flags: str):
    @pytest.fixture(scope="session", name=name)
    def engine_fixture(model_folder, bare_environment, tmp_path_factory):
        place = tmp_path_factory.mktemp(name)
        with contextlib.ExitStack() as stack:
            with bare_environment.serves():  # For this start only: other engines use our vLLM.
                starting = engine_running(name, model_folder, place, *flags)
                engine = stack.enter_context(starting)
            yield engine

    return engine_fixture


v1_bare = _bare("v1_bare", FEW_BLOCKS)
v2_bare = _bare("v2_bare")


@pytest.fixture
def engine(request) -> Engine:
    """The engine named by the test's parameter."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def stock(request) -> Engine:
    """The engine without the plug-in, of the same kind as the test's other engine."""
    return request.getfixturevalue(request.param)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several processes, tests that share engines run in one of them; the others are
    distributed by file, because modules have slow fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class ByEngines(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            shares = file.startswith(("tests/parity/", "tests/server/")) or file in FAULTY
            return "engines" if shares else file

    return ByEngines(config, log)


FAULTY = ("tests/faults/test_faults.py",)
"""The tests of faults that need the shared engines."""


def long(*values):
    """A parameter set of `make test-long`."""
    return pytest.param(*values, marks=pytest.mark.long)


_recorded: dict[str, dict] = {}
_passed: set[str] = set()
RESULTS = ROOT / "bench" / "results" / "test-long.json"


@pytest.fixture
def record_values(request):
    """`record_values(name=value, …)`: measured values for bench/results/test-long.json."""

    def note(**values) -> None:
        _recorded[request.node.nodeid] = values

    return note


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" and report.passed:
        _passed.add(report.nodeid)


def pytest_sessionfinish(session) -> None:
    """Write the values of the long tests that passed; those of tests that did not run are kept."""
    new = {name.partition("tests/")[2]: _recorded[name] for name in _passed & _recorded.keys()}
    if session.config.getoption("markexpr") == "long" and new:
        before = json.loads(RESULTS.read_text())["values"] if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(_document(before | new), indent=1) + "\n")


def _document(values: dict[str, dict]) -> dict:
    from importlib.metadata import version

    names = ("torch", "vllm", "transformers", "dftserve")
    return {
        "what": "values of `make test-long`",
        "machine": {"cpu_cores": os.cpu_count(), "processor": platform.machine()},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
        "values": dict(sorted(values.items())),
    }
