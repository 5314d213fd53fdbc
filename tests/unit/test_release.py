"""The release workflow runs the Makefile's commands, and publishes on a tag what they tried."""

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
    """The Makefile's targets and what stands behind them."""
    return dict(RULE.findall((ROOT / "Makefile").read_text()))


def commands(job: dict) -> list[list[str]]:
    return [shlex.split(step["run"]) for step in job["steps"] if "run" in step]


def actions(job: dict) -> list[str]:
    return [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]


def test_every_command_is_a_target_of_the_makefile(workflow, rules):
    found = [command for job in workflow["jobs"].values() for command in commands(job)]
    assert found == [["make", "wheels"], ["make", "tag"], ["make", "smoke"]]
    assert {target for _, target in found} <= rules.keys()


def test_the_makefile_has_each_target_once_and_says_that_none_is_a_file(rules):
    text = (ROOT / "Makefile").read_text()
    named = [target for target, _ in RULE.findall(text)]
    assert len(named) == len(set(named))
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == rules.keys()


def test_every_tool_that_a_target_runs_is_there(rules):
    for behind in rules.values():
        for tool in re.findall(r"tools/\w+\.py", behind):
            assert (ROOT / tool).is_file(), tool


def test_what_is_published_is_what_was_tried(workflow):
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    steps = build["steps"]
    upload = next(step for step in steps if "upload-artifact" in step.get("uses", ""))
    tried = next(number for number, step in enumerate(steps) if step.get("run") == "make smoke")
    assert tried < steps.index(upload)
    download = next(s for s in publish["steps"] if "download-artifact" in s.get("uses", ""))
    assert download["with"]["name"] == upload["with"]["name"]
    assert publish["needs"] == "build"
    assert actions(publish)[-1] == "pypa/gh-action-pypi-publish"
    assert commands(publish) == []  # Nothing is built with the right to publish.


def test_it_is_published_on_a_tag_only_without_a_stored_secret(workflow):
    publish = workflow["jobs"]["publish"]
    assert "startsWith(github.ref, 'refs/tags/v')" in publish["if"]
    assert "||" not in publish["if"]
    assert workflow["True"]["push"] == {"tags": ["v*"]}
    assert "secrets." not in FILE.read_text()


def test_only_the_publishing_job_may_prove_who_it_is(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    rights = {name: job.get("permissions") for name, job in workflow["jobs"].items()}
    assert rights == {"build": None, "publish": {"id-token": "write"}}


def test_every_action_is_a_commit_and_says_its_version():
    """Who can move an action's tag could publish in our name."""
    pinned = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    used = re.findall(r"uses: *(.*)", FILE.read_text())
    assert len(used) == 5
    assert [name for name in used if not pinned.fullmatch(name)] == []


def test_a_tag_is_compared_with_the_wheels_before_they_are_kept(workflow):
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    runs = [step.get("run") for step in build["steps"]]
    compared = build["steps"][runs.index("make tag")]
    assert runs.index("make wheels") < runs.index("make tag") < runs.index("make smoke")
    assert compared["if"] in publish["if"]  # So that it has run wherever something is published.
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
    named = {} if pushed is None else {"GITHUB_REF_NAME": pushed}
    command = [sys.executable, tmp_path / "tools" / "release.py", "tag"]
    ended = subprocess.run(command, env=named, capture_output=True, text=True, check=False)
    assert (ended.returncode == 0) == (accepted is None), ended.stderr
    assert "Traceback" not in ended.stderr
    if accepted is not None:
        assert f"accepted: {accepted}" in ended.stderr


def test_both_wheels_have_the_same_version_and_go_together():
    projects = [ROOT / "pyproject.toml", ROOT / "plugins" / "vllm" / "pyproject.toml"]
    ours, plugin = (tomllib.loads(path.read_text())["project"] for path in projects)
    assert ours["version"] == plugin["version"] == __version__
    assert f"dftserve=={__version__}" in plugin["dependencies"]
