"""The release workflow runs the Makefile's commands and publishes, on a tag, what they tested."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dftserve import __version__, settings

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / ".github" / "workflows" / "release.yml"
RULE = re.compile(r"^([a-z-]+) *:(?!=)(.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def workflow() -> dict:
    # YAML 1.1 takes the key `on` for a boolean.
    return {str(key): value for key, value in settings.read_yaml(FILE).items()}


@pytest.fixture(scope="module")
def rules() -> dict[str, str]:
    """The Makefile's targets and the rest of each rule's line."""
    return dict(RULE.findall((ROOT / "Makefile").read_text()))


def commands(job: dict) -> list[list[str]]:
    return [shlex.split(step["run"]) for step in job["steps"] if "run" in step]


def actions(job: dict) -> list[str]:
    return [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]


def test_every_command_is_a_target_of_the_makefile(workflow, rules):
    used = [command for job in workflow["jobs"].values() for command in commands(job)]
    assert used == [["make", "wheels"], ["make", "tag"], ["make", "smoke"]]
    assert {target for _, target in used} <= rules.keys()


def test_the_makefile_has_each_target_once_and_all_are_phony(rules):
    text = (ROOT / "Makefile").read_text()
    targets = [target for target, _ in RULE.findall(text)]
    assert len(targets) == len(set(targets))
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == rules.keys()


def test_every_tool_that_a_target_runs_exists(rules):
    for rule in rules.values():
        for tool in re.findall(r"tools/\w+\.py", rule):
            assert (ROOT / tool).is_file(), tool


def test_only_tested_wheels_are_published(workflow):
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    steps = build["steps"]
    upload = next(step for step in steps if "upload-artifact" in step.get("uses", ""))
    tested = next(number for number, step in enumerate(steps) if step.get("run") == "make smoke")
    assert tested < steps.index(upload)
    download = next(s for s in publish["steps"] if "download-artifact" in s.get("uses", ""))
    assert download["with"]["name"] == upload["with"]["name"]
    assert publish["needs"] == "build"
    assert actions(publish)[-1] == "pypa/gh-action-pypi-publish"
    assert commands(publish) == []  # The job that may publish builds nothing.


def test_publishing_needs_a_tag_and_no_stored_secret(workflow):
    publish = workflow["jobs"]["publish"]
    assert "startsWith(github.ref, 'refs/tags/v')" in publish["if"]
    assert "||" not in publish["if"]
    assert workflow["True"]["push"] == {"tags": ["v*"]}
    assert "secrets." not in FILE.read_text()


def test_only_the_publishing_job_may_request_an_identity_token(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    rights = {name: job.get("permissions") for name, job in workflow["jobs"].items()}
    assert rights == {"build": None, "publish": {"id-token": "write"}}


def test_every_action_is_pinned_to_a_commit_with_its_version():
    """Anyone who can move an action's tag could publish in our name."""
    pinned = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    used = re.findall(r"uses: *(.*)", FILE.read_text())
    assert len(used) == 5
    assert [name for name in used if not pinned.fullmatch(name)] == []


def test_a_tag_is_compared_with_the_wheels_before_they_are_kept(workflow):
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    runs = [step.get("run") for step in build["steps"]]
    compared = build["steps"][runs.index("make tag")]
    assert runs.index("make wheels") < runs.index("make tag") < runs.index("make smoke")
    assert compared["if"] in publish["if"]  # It has run whenever something is published.
    assert "continue-on-error" not in compared


@pytest.mark.parametrize(
    ("pushed", "versions", "accepted"),
    [
        ("v1.2.0", ("1.2.0", "1.2.0"), None),
        ("v1.2.1", ("1.2.0", "1.2.0"), "v1.2.0,"),
        ("v1.2.0", ("1.2.0", "1.2.1"), "v1.2.0 and v1.2.1"),
        ("1.2.0", ("1.2.0", "1.2.0"), "v1.2.0,"),
        (None, ("1.2.0", "1.2.0"), "v1.2.0,"),
    ],
)
def test_a_tag_of_another_version_is_refused(tmp_path, pushed, versions, accepted):
    for folder in ("tools", "dist"):
        (tmp_path / folder).mkdir()
    for name in ("release.py", "setup.py"):
        (tmp_path / "tools" / name).write_bytes((ROOT / "tools" / name).read_bytes())
    for name, version in zip(("dftserve", "dftserve_vllm"), versions, strict=True):
        (tmp_path / "dist" / f"{name}-{version}-py3-none-any.whl").touch()
    variables = {} if pushed is None else {"GITHUB_REF_NAME": pushed}
    command = [sys.executable, tmp_path / "tools" / "release.py", "tag"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (accepted is None), result.stderr
    assert "Traceback" not in result.stderr
    if accepted is not None:
        assert f"accepted: {accepted}" in result.stderr


def test_both_wheels_have_the_same_version_and_the_plugin_requires_it():
    projects = [ROOT / "pyproject.toml", ROOT / "plugins" / "vllm" / "pyproject.toml"]
    ours, plugin = (tomllib.loads(path.read_text())["project"] for path in projects)
    assert ours["version"] == plugin["version"] == __version__
    assert f"dftserve=={__version__}" in plugin["dependencies"]
