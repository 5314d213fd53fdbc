"""nginx before a server, on loopback."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dftserve.serve import _free_port


def command() -> str:
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip("no nginx command (Debian: apt-get install nginx-light)")
    return found


def version() -> str:
    said = subprocess.run([command(), "-v"], capture_output=True, text=True, check=True).stderr
    return said.strip().rpartition("/")[2]


@contextlib.contextmanager
def before(upstream: str, buffering: str, place: Path) -> Iterator[str]:
    """Its address, with `proxy_buffering` on or off; all its files are in `place`."""
    port, log = _free_port(), place / "error.log"
    config = place / "nginx.conf"
    config.write_text(_configuration(upstream, buffering, port, place))
    process = subprocess.Popen([command(), "-c", config, "-e", log])
    try:
        _await(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _configuration(upstream: str, buffering: str, port: int, place: Path) -> str:
    folders = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{name}_temp_path {place / name};" for name in folders)
    return f"""
daemon off; master_process off; pid {place / "nginx.pid"}; error_log {place / "error.log"};
events {{}}
http {{
  access_log off; {temporary}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass {upstream}; proxy_buffering {buffering}; }}
  }}
}}
"""


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise RuntimeError(f"nginx ended:\n{log.read_text()}")
