"""docs/training.md has every setting of a corpus and of a recipe, and its recipe can be built;
its ways to name several stores are one; docs/evaluation.md has the signatures that are."""

import dataclasses
import inspect
import re
import textwrap

import pytest

from dftserve.corpus.filters import Filters
from dftserve.evaluate.accuracy import extract
from dftserve.targets import recipe
from dftserve.train import config as configs
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "training.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n### {title}\n")[1].split("\n## ")[0].split("\n### ")[0]


@pytest.mark.parametrize("field", [each.name for each in dataclasses.fields(Filters)])
def test_the_table_has_every_filter(field):
    rows = [line for line in section("The corpus").splitlines() if line.startswith("|")]
    assert any(f"`{field}`" in row.split("|")[1] for row in rows)


@pytest.mark.parametrize("kind", recipe._ALL)
def test_a_recipes_section_has_every_kind_of_source_and_its_settings(kind):
    told = section("Recipes")
    assert re.search(rf"`{kind}\b", told)
    for each in dataclasses.fields(recipe._KINDS[kind]) if kind in recipe._KINDS else ():
        assert re.search(rf"`{kind}:\s[^`]*\b{each.name}\b", told), each.name


def test_its_example_is_a_recipe(tmp_path):
    written = re.search(r"\n\n((?:    .*\n)+)", section("Recipes"))
    assert written is not None
    path = tmp_path / "mine.yaml"
    path.write_text(textwrap.dedent(written[1]))
    with_teacher = recipe.load(str(path), {"teacher": "base"})
    assert [set(part) for part in with_teacher.source["mix"]] == [
        {"weight", "ngram"},
        {"weight", "when", "teacher"},
    ]
    alone = recipe.load(str(path))
    assert [part["ngram"]["order"] for part in alone.source["mix"]] == [5]
    assert alone.corpus.strip == ("html",)


def test_the_two_ways_to_give_several_stores_are_the_same(tmp_path):
    told = section("Several stores, by weights")
    setting = re.search(r"--set 'targets=(.*)'", told)
    written = re.search(r"\n\n(    targets:\n(?:    .*\n)+)", told)
    assert setting is not None
    assert written is not None
    path = tmp_path / "run.yaml"
    path.write_text(textwrap.dedent(written[1]))
    places = {"model": "m", "output": "o"}
    given = configs.load(None, {**places, "targets": setting[1]})
    assert given == configs.load(path, places)
    assert [store.weight for store in given.stores] == [0.7, 0.3]


@pytest.mark.parametrize("name", extract.__all__)
def test_the_signatures_of_extract_are_told(name):
    told = (ROOT / "docs" / "evaluation.md").read_text()
    assert f"{name}{inspect.signature(getattr(extract, name))}".replace("'", '"') in told
