"""The dashboard and the alert rules speak of metrics that there are, in PromQL that parses."""

import json
import re
from pathlib import Path

import pytest
from dftserve_vllm import metrics

from dftserve import settings

OPS = Path(__file__).resolve().parents[2] / "plugins" / "vllm" / "ops"
VLLM_METRICS = {"vllm:generation_tokens_total"}
"""Of vLLM's documentation, https://docs.vllm.ai/en/latest/usage/metrics/."""
NAME = re.compile(r"\b(?:dft|vllm):[a-z_]+")


def expressions() -> list[str]:
    rules = settings.parse_yaml((OPS / "alerts.yaml").read_text(), "alerts.yaml")
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((OPS / "grafana.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return alerts + targets


def known() -> set[str]:
    found = set()
    for collector in vars(metrics.metrics()).values():
        (family,) = collector.collect()
        if family.type == "histogram":
            found |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            found.add(f"{family.name}_total")
    return found | VLLM_METRICS


def test_every_metric_exists():
    named = {name for expression in expressions() for name in NAME.findall(expression)}
    assert named
    assert named <= known()


def test_every_metric_of_ours_is_on_the_dashboard_or_in_an_alert():
    named = " ".join(expressions())
    ours = {name for name in known() - VLLM_METRICS if not name.endswith(("_sum", "_count"))}
    assert {name for name in ours if name not in named} == set()


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_parses(expression):
    parser = pytest.importorskip("promql_parser")
    parser.parse(expression.replace("$model", "demo"))


def test_every_alert_says_what_it_means():
    rules = settings.parse_yaml((OPS / "alerts.yaml").read_text(), "alerts.yaml")["groups"][0][
        "rules"
    ]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    assert all({"summary", "description"} <= rule["annotations"].keys() for rule in rules)


def test_refusals_are_weighed_against_all_that_is_accepted():
    """A server may have styles only."""
    rules = settings.parse_yaml((OPS / "alerts.yaml").read_text(), "alerts.yaml")["groups"][0][
        "rules"
    ]
    (expression,) = (rule["expr"] for rule in rules if rule["alert"] == "DftserveRefusals")
    accepted = {name for name in known() if name.endswith("requests_total")}
    assert {"dft:requests_total", "dft:styled_requests_total"} <= accepted
    assert set(NAME.findall(expression)) == accepted | {"dft:requests_refused_total"}


def test_rows_of_nan_have_one_name():
    root = OPS.parents[2]
    shown = [*OPS.iterdir(), *root.glob("docs/*.md"), *root.glob("dftserve/doctor/*.py")]
    assert [path.name for path in shown if "unsound" in path.read_text().lower()] == []
