"""Generated and quoted parts of the documents match the files that they come from, and links lead
to files and headings that exist."""

import inspect
import json
import re
import subprocess
from pathlib import Path

import click
import pytest
import report

from dftserve.cli import main
from dftserve.evaluate.accuracy import extract
from dftserve.evaluate.cli import evaluate
from tests.conftest import ROOT

import client_table


@pytest.mark.parametrize("name", report.TABLES)
def test_each_table_matches_its_results(name):
    text = (ROOT / report.PLACES.get(name, "README.md")).read_text()
    result = report.RESULTS / f"{report.RESULT_OF.get(name, name)}.json"
    if name in report.OPTIONAL and not result.exists():
        pytest.skip(f"bench/results has no {result.name}: it was not measured yet")
    assert report.written(text, name) == text, "run: python bench/report.py"


def test_the_plug_ins_document_quotes_its_dockerfile():
    folder = ROOT / "plugins" / "vllm"
    lines = (folder / "Dockerfile").read_text().splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("ARG"))
    quoted = "\n".join(f"    {line}".rstrip() for line in lines[start:])
    assert quoted in (folder / "README.md").read_text()


def test_the_readme_lists_every_command_of_evaluate():
    """Except `run`, whose name may be left out."""
    listed = (ROOT / "README.md").read_text().split("\n## Commands\n")[1].split("\n## ")[0]
    evaluate_part = listed.split("dftserve evaluate ")[1].split("dftserve ")[0]
    names = set(evaluate.commands) - {"run"}
    assert "drift" in names
    assert {name for name in names if not re.search(rf"\b{name}\b", evaluate_part)} == set()


@pytest.mark.parametrize("name", extract.__all__)
def test_evaluation_md_has_the_signatures_of_extract(name):
    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert f"{name}{inspect.signature(getattr(extract, name))}".replace("'", '"') in text


# Links


def documents() -> list[Path]:
    return [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("plugins/*/README.md"),
        ROOT / "bench" / "README.md",
    ]


def anchors(text: str) -> set[str]:
    """The names under which GitHub links to headings: lower case, without punctuation, blanks as
    hyphens."""
    outside_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)", outside_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_link_leads_to_a_file_and_a_heading(path):
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def test_each_document_that_a_file_names_exists():
    """In code, errors, settings and documents; the log also names former ones."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    missing = {
        f"{name}: {document}"
        for name in listed
        if Path(name).suffix in (".py", ".md", ".toml", ".yaml", ".yml") and name != "docs/log.md"
        for document in re.findall(r"\bdocs/\w+\.md", (ROOT / name).read_text())
        if not (ROOT / document).exists()
    }
    assert missing == set()


# Commands

PASSES_ON = ("serve",)
"""Commands that pass unknown options on to another program."""


def shown_commands(path: Path) -> list[str]:
    """The commands of dftserve in a document's code, without comments."""
    text = path.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^ +(?:\.venv/bin/)?dftserve ([^#\n]*)", text, re.MULTILINE)
    inline = re.findall(r"`dftserve ([^`]*)`", text)
    return [" ".join(command.split()) for command in blocks + inline]


def unknown_words(command: str) -> list[str]:
    """The subcommand or the options that do not exist."""
    words, group = command.split(), main
    while isinstance(group, click.Group):
        name = words[0].partition("|")[0] if words else ""
        found = group.commands.get(name) or group.commands.get("run")
        if found is None:
            return [name] if re.fullmatch("[a-z]+", name) else []
        words = words[1:] if name in group.commands else words
        group = found
    options = {option for parameter in group.params for option in parameter.opts}
    given = {word.strip("[],;").partition("=")[0] for word in words if word.startswith("--")}
    return [] if group.name in PASSES_ON else sorted(given - options)


HISTORY = "log.md"
"""The document that may name former commands."""


@pytest.mark.parametrize(
    "path",
    [path for path in documents() if path.name != HISTORY],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_commands_and_options_in_documents_exist(path):
    unknown = {command: unknown_words(command) for command in shown_commands(path)}
    assert {command: words for command, words in unknown.items() if words} == {}


def test_commands_are_found_in_the_documents():
    assert len(shown_commands(ROOT / "README.md")) > 10
    assert unknown_words("target build novels --modle BASE") == ["--modle"]
    assert unknown_words("traget build novels") == ["traget"]
    assert unknown_words("evaluate MODEL --prompts p.txt --grod 0") == ["--grod"]


# The table of docs/clients.md


def row(**given) -> dict:
    read = {"object": True, "header": "x-dftserve-diversity"}
    wrong = {"readable": True, "as": 400, "param": "diversity.level"}
    about = {"client": "c", "route": "r", "written": "w", "field": "arrives"}
    return {**about, "plain": read, "stream": read, "wrong": wrong, **given}


LOST = {"field": "lost silently", "wrong": {"readable": False, "as": None, "param": None}}


def lines_of(*rows: dict) -> list[str]:
    return client_table.table({"rows": list(rows)}).splitlines()[2:]


def test_rows_share_a_line_only_with_equal_outcomes():
    assert len(lines_of(row(), row(written="v"), row(route="s"), row(route="s", written="v"))) == 1
    assert len(lines_of(row(), row(written="v", **LOST))) == 2
    assert len(lines_of(row(), row(client="d"))) == 2


def test_any_is_shown_only_if_all_rows_of_a_route_have_equal_outcomes():
    rows = [row(written=written) for written in "abc"]
    assert "| any |" in lines_of(*rows)[0]
    assert "| a, b, c |" in lines_of(*rows, row(written="d", **LOST))[0]


def test_a_silent_loss_is_bold_and_shows_neither_object_nor_header():
    (line,) = lines_of(row(**LOST))
    assert "**lost silently**" in line
    assert "object" not in line
    assert "header" not in line


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        (None, "| object |"),
        ("x-dftserve-diversity", "| object, header |"),
        ("llm_provider-x-dftserve-diversity", "| object, `llm_provider-` header |"),
    ],
)
def test_the_header_is_shown_under_its_name(header, shown):
    assert shown in lines_of(row(plain={"object": True, "header": header}))[0]


def test_each_client_with_a_silent_loss_has_it_in_its_section():
    """Someone who reads only the section of their client must learn of it."""
    results = json.loads((ROOT / "bench" / "results" / "clients.json").read_text())
    text = (ROOT / "docs" / "clients.md").read_text()
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", text, flags=re.MULTILINE))
    losing = {row["client"] for row in results["rows"] if row["field"] == "lost silently"}
    assert losing
    for client in losing:
        assert "lost without a word" in " ".join(sections[client].split()), client
