"""A real Prometheus scrapes a real server, and every panel of the dashboard has data."""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest
import yaml

from dftserve.serve import held_port
from tests.client import chat_body, gather
from tests.conftest import KEY, PATIENCE, ROOT, Engine

OPS = ROOT / "plugins" / "vllm" / "ops"
PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(
    PROMETHEUS is None, reason="no prometheus on this machine (Debian: apt-get install prometheus)"
)
REQUESTED = [
    {"diversity": 0.5},
    {"diversity": {"law": "words", "level": 1}},
    {"style": "habits"},
    {"diversity": 7},
]
UNMOVED = ("clamped", "faults", "nan_rows", "unavailable", "audit_lost")
"""Parts of names of metrics that these requests do not change."""


@contextlib.contextmanager
def prometheus(engine: Engine, folder) -> Iterator[httpx.Client]:
    """A client of a Prometheus that scrapes the engine each second and has the alert rules."""
    target = engine.url.removeprefix("http://")
    job = {"job_name": "vllm", "static_configs": [{"targets": [target]}]}
    job |= {"authorization": {"credentials": KEY}}
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(OPS / "alerts.yaml")],
        "scrape_configs": [job],
    }
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(configuration))
    command = [str(PROMETHEUS), f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with held_port() as port:
        address = f"127.0.0.1:{port}"
        command += [f"--web.listen-address={address}", "--log.level=error"]
        process = subprocess.Popen(command)
        try:
            with httpx.Client(
                base_url=f"http://{address}", timeout=PATIENCE, trust_env=False
            ) as client:
                while not is_ready(client):
                    assert process.poll() is None, "Prometheus has ended"
                    time.sleep(0.5)
                wait_for(client, "timestamp(up)")
                yield client
        finally:
            process.terminate()
            process.wait()


def is_ready(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/-/ready").status_code == 200
    return False


def values_of(client: httpx.Client, expression: str) -> list[float]:
    """The value of each series of an expression."""
    answer = client.get("/api/v1/query", params={"query": expression})
    assert answer.status_code == 200, answer.text
    return [float(each["value"][1]) for each in answer.json()["data"]["result"]]


def wait_for(client: httpx.Client, expression: str) -> None:
    """Wait until an expression has a nonzero value; raises if Prometheus has ended."""
    while not any(values_of(client, expression)):
        time.sleep(0.5)


def test_every_panel_has_data(v1, tmp_path):
    dashboard = json.loads((OPS / "grafana.json").read_text())
    expressions = [
        target["expr"].replace("$model", ".*")
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    with prometheus(v1, tmp_path) as client:
        for _ in range(2):  # A rate needs two values that differ.
            bodies = [chat_body(max_tokens=8, **fields) for fields in REQUESTED]
            answers = gather(v1, [("/v1/chat/completions", body) for body in bodies])
            assert [answer.status_code for answer in answers] == [200, 200, 200, 400]
            wait_for(client, f"timestamp(up) > {time.time():f}")
        for expression in expressions:
            values = values_of(client, expression)
            assert values, expression
            assert all(value == value for value in values), expression  # NaN is an empty panel.
            assert any(values) or any(name in expression for name in UNMOVED), expression
        rules = client.get("/api/v1/rules").json()["data"]["groups"]
        assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}
