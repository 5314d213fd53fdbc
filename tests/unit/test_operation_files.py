"""The dashboard and the alert rules use existing metrics, in PromQL that parses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from dftserve_vllm import metrics

from dftserve import settings

OPS = Path(__file__).resolve().parents[2] / "plugins" / "vllm" / "ops"
VLLM_METRICS = {"vllm:generation_tokens_total"}
"""From vLLM's documentation, https://docs.vllm.ai/en/latest/usage/metrics/."""
NAME = re.compile(r"\b(?:dft|vllm):[a-z_]+")


def expressions() -> list[str]:
    alerts = [rule["expr"] for rule in alert_rules()]
    dashboard = json.loads((OPS / "grafana.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return alerts + targets


def alert_rules() -> list[dict[str, Any]]:
    groups = settings.parse_yaml((OPS / "alerts.yaml").read_text(), "alerts.yaml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def known_metrics() -> set[str]:
    names = set()
    for collector in vars(metrics.metrics()).values():
        (family,) = collector.collect()
        if family.type == "histogram":
            names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            names.add(f"{family.name}_total")
    return names | VLLM_METRICS


def test_every_metric_that_is_used_exists():
    used = {name for expression in expressions() for name in NAME.findall(expression)}
    assert used
    assert used <= known_metrics()


def test_each_of_our_metrics_is_on_the_dashboard_or_in_an_alert():
    used = " ".join(expressions())
    ours = {
        name for name in known_metrics() - VLLM_METRICS if not name.endswith(("_sum", "_count"))
    }
    assert {name for name in ours if name not in used} == set()


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_parses(expression):
    parser = pytest.importorskip("promql_parser")
    parser.parse(expression.replace("$model", "demo"))


def test_every_alert_has_a_unique_name_and_a_description():
    rules = alert_rules()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    assert all({"summary", "description"} <= rule["annotations"].keys() for rule in rules)


def test_the_refusal_alert_compares_with_all_accepted_requests():
    """Also those with a style only."""
    (expression,) = (rule["expr"] for rule in alert_rules() if rule["alert"] == "DftserveRefusals")
    accepted = {name for name in known_metrics() if name.endswith("requests_total")}
    assert {"dft:requests_total", "dft:styled_requests_total"} <= accepted
    assert set(NAME.findall(expression)) == accepted | {"dft:requests_refused_total"}


def test_rows_of_nan_are_never_called_unsound():
    root = OPS.parents[2]
    shown = [*OPS.iterdir(), *root.glob("docs/*.md"), *root.glob("dftserve/doctor/*.py")]
    assert [path.name for path in shown if "unsound" in path.read_text().lower()] == []
