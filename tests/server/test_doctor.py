"""The doctor on real servers: one with the plug-in, and one where it is disabled."""

from dftserve import doctor
from dftserve.openai_client import Server
from tests.client import metric
from tests.conftest import KEY, PATIENCE


def test_a_server_with_the_plug_in_is_ok(v1):
    findings = {finding.name: finding for finding in doctor.ask(v1.url, KEY)}
    faults = findings.pop("server faults")  # Other tests inject faults into this engine.
    counted = metric(v1, "dft:faults_total") + metric(v1, "dft:nan_rows_total")
    assert (faults.state == "warning") == (counted > 0)
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert "runner V1" in findings["server"].text


def test_a_disabled_plug_in_is_an_error(v1_stock):
    (finding,) = doctor.ask(f"{v1_stock.url}/v1", KEY)
    assert finding.state == "error"
    assert "the plug-in is not active there: vLLM 0." in finding.text
    assert "DFTSERVE_DISABLE" in finding.text


def test_a_url_with_a_wrong_path_is_an_error_with_advice(v1):
    (finding,) = doctor.ask(f"{v1.url}/v1/chat/completions", KEY)
    assert finding.state == "error"
    assert finding.text.endswith(f"--url {v1.url}")


def test_a_wrong_or_missing_key_is_reported(v1):
    assert "--api-key-env NAME" in doctor.ask(v1.url)[0].text
    assert "not that server" in doctor.ask(v1.url, "wrong")[0].text


def test_verify_passes_on_a_real_server(v1, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", KEY)
    report = doctor.verify(Server(f"{v1.url}/v1", "SERVER_KEY", timeout_s=PATIENCE), None, KEY)
    states = {finding.name: finding.state for finding in report.findings}
    del states["server faults"]  # Other tests inject faults into this engine.
    assert set(states.values()) == {"ok"}, report.findings
    assert report.about["device"]
