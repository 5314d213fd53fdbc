"""Each alert fires on its condition and not otherwise, checked with Prometheus' `promtool`."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

ALERTS = Path(__file__).resolve().parents[2] / "plugins" / "vllm" / "ops" / "alerts.yaml"
PROMTOOL = shutil.which("promtool")
pytestmark = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool on this machine (Debian: apt-get install prometheus)"
)
FLAT, RISES, SLOWLY = "7x60", "0+3x60", "0+0.2x60"
"""One value a minute for an hour, in promtool's notation."""
REFUSED, ASKED, STYLED = (
    f"dft:{name}_total" for name in ("requests_refused", "requests", "styled_requests")
)
CASES = [
    ("DftserveFaults", {"dft:faults_total": RISES}, True),
    ("DftserveFaults", {"dft:faults_total": FLAT}, False),
    ("DftserveNanRows", {"dft:nan_rows_total": RISES}, True),
    ("DftserveNanRows", {"dft:nan_rows_total": FLAT}, False),
    ("DftserveStatisticsLost", {"dft:statistics_unavailable_total": RISES}, True),
    ("DftserveStatisticsLost", {"dft:statistics_unavailable_total": SLOWLY}, False),
    ("DftserveAuditLost", {"dft:audit_lost_total": RISES}, True),
    ("DftserveAuditLost", {"dft:audit_lost_total": FLAT}, False),
    ("DftserveRefusals", {REFUSED: RISES}, True),
    ("DftserveRefusals", {REFUSED: FLAT}, False),
    ("DftserveRefusals", {REFUSED: "0+3x60", ASKED: "0+2x60"}, True),
    ("DftserveRefusals", {REFUSED: "0+3x60", ASKED: "0+4x60"}, False),
    ("DftserveRefusals", {REFUSED: "0+3x60", STYLED: "0+2x60"}, True),
    ("DftserveRefusals", {REFUSED: "0+3x60", STYLED: "0+4x60"}, False),
    ("DftserveRefusals", {REFUSED: "0+3x60", ASKED: "0+2x60", STYLED: "0+2x60"}, False),
]


@pytest.mark.parametrize(("alert", "series", "fires"), CASES)
def test_an_alert_fires_only_on_its_condition(tmp_path, alert, series, fires):
    result = promtool(tmp_path, alert, series, fires)
    assert result.returncode == 0, result.stdout + result.stderr
    wrong = promtool(tmp_path, alert, series, not fires)
    assert wrong.returncode == 1  # The check itself can fail.


def promtool(
    folder: Path, alert: str, series: Mapping[str, str], fires: bool
) -> subprocess.CompletedProcess[str]:
    labels = '{model_name="demo"}'
    expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if fires else []
    test = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name + labels, "values": values} for name, values in series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": f'count by (alertname) (ALERTS{{alertname="{alert}", '
                        'alertstate="firing"})',
                        "eval_time": "50m",
                        "exp_samples": expected,
                    }
                ],
            }
        ],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump(test))
    command = [str(PROMTOOL), "test", "rules", str(file)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_alert_has_a_firing_and_a_silent_case():
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    covered = {(alert, fires) for alert, _, fires in CASES}
    assert covered == {(rule["alert"], fires) for rule in rules for fires in (True, False)}


def test_the_rules_pass_the_check_of_promtool():
    subprocess.run([str(PROMTOOL), "check", "rules", str(ALERTS)], check=True, capture_output=True)
