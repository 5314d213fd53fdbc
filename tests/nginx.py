"""nginx in front of a server, on loopback."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dftserve.serve import held_port
from tests.local_server import listening


def command() -> str:
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip("no nginx command (Debian: apt-get install nginx-light)")
    return found


def version() -> str:
    output = subprocess.run([command(), "-v"], capture_output=True, text=True, check=True).stderr
    return output.strip().rpartition("/")[2]


@contextlib.contextmanager
def before(upstream: str, buffering: str, place: Path) -> Iterator[str]:
    """Run it with `proxy_buffering` on or off and all its files in `place`; yields its address."""
    config = place / "nginx.conf"
    run = [command(), "-c", config, "-e", "stderr"]
    with held_port() as port:
        config.write_text(_configuration(upstream, buffering, port, place))
        with listening(run, port, place / "nginx.log") as url:
            yield url


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
