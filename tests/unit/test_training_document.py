"""docs/training.md has every setting of a corpus and of a recipe, its example recipe can be loaded,
and its notations for several stores are equivalent; docs/evaluation.md has the signatures."""

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
def test_the_recipes_section_has_every_kind_of_source_and_its_settings(kind):
    text = section("Recipes")
    assert re.search(rf"`{kind}\b", text)
    for each in dataclasses.fields(recipe._KINDS[kind]) if kind in recipe._KINDS else ():
        assert re.search(rf"`{kind}:\s[^`]*\b{each.name}\b", text), each.name


def test_the_example_recipe_can_be_loaded(tmp_path):
    written = re.search(r"\n\n((?:    .*\n)+)", section("Recipes"))
    assert written is not None
    path = tmp_path / "mine.yaml"
    path.write_text(textwrap.dedent(written[1]))
    with_teacher = recipe.load(str(path), {"teacher": "base"})
    assert [set(part) for part in with_teacher.source["mix"]] == [
        {"weight", "ngram"},
        {"weight", "teacher"},
    ]
    alone = recipe.load(str(path))
    assert [part["ngram"]["order"] for part in alone.source["mix"]] == [5]
    assert alone.corpus.strip == ("html",)


def test_both_notations_for_several_stores_are_equivalent(tmp_path):
    text = section("Several stores, by weights")
    setting = re.search(r"--set 'targets=(.*)'", text)
    written = re.search(r"\n\n(    targets:\n(?:    .*\n)+)", text)
    assert setting is not None
    assert written is not None
    path = tmp_path / "run.yaml"
    path.write_text(textwrap.dedent(written[1]))
    paths = {"model": "m", "output": "o"}
    from_flag = configs.load(None, {**paths, "targets": setting[1]})
    assert from_flag == configs.load(path, paths)
    assert [store.weight for store in from_flag.stores] == [0.7, 0.3]


@pytest.mark.parametrize("name", extract.__all__)
def test_evaluation_md_has_the_signatures_of_extract(name):
    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert f"{name}{inspect.signature(getattr(extract, name))}".replace("'", '"') in text
