"""docs/targets.md has every setting of a corpus and of a recipe with the default of the code, and
its examples can be loaded."""

import dataclasses
import re
import textwrap

import pytest

from dftserve import settings
from dftserve.corpus.filters import Filters
from dftserve.corpus.sources import Source, _Corpora
from dftserve.targets import recipe
from dftserve.targets.recipe import Kept
from tests.conftest import ROOT
from tests.document_tables import defaults_of, read, section

PATH = ROOT / "docs" / "targets.md"
TEXT, SETTINGS = PATH.read_text(), read(PATH)


def example(title: str) -> str:
    """The first indented block below a heading."""
    found = re.search(r"(?:^|\n\n)((?:    .*\n)+)", section(TEXT, title))
    assert found is not None
    return textwrap.dedent(found[1])


@pytest.mark.parametrize(("name", "default"), list(defaults_of(Filters)))
def test_every_filter_has_its_default(name, default):
    assert SETTINGS[name] == default


KINDS = [
    each for kind, cls in recipe._KINDS.items() for each in defaults_of(cls, prefix=f"{kind}.")
]


@pytest.mark.parametrize(("name", "default"), KINDS)
def test_every_setting_of_a_source_has_its_default(name, default):
    assert SETTINGS[name] == default


def test_no_setting_of_a_source_is_unknown():
    named = {name for name in SETTINGS if name.partition(".")[0] in recipe._KINDS}
    assert named == {name for name, _ in KINDS}


@pytest.mark.parametrize("kind", recipe._ALL)
def test_every_kind_of_source_is_described(kind):
    rows = [line for line in section(TEXT, "Recipes").splitlines() if line.startswith("|")]
    assert any(f"`{kind}`" in row.split("|")[1] for row in rows)


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_included_recipe_is_listed(name):
    assert re.search(rf"^ *\| `{name}` \|", section(TEXT, "Building a store"), re.MULTILINE)


def test_the_example_recipe_can_be_loaded(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(example("Recipes"))
    with_teacher = recipe.load(str(path), {"teacher": "base"})
    assert [set(part) for part in with_teacher.source["mix"]] == [
        {"weight", "ngram"},
        {"weight", "teacher"},
    ]
    alone = recipe.load(str(path))
    assert [part["ngram"]["order"] for part in alone.source["mix"]] == [5]
    assert alone.corpus.strip == ("html",)
    assert alone.store == Kept()


def test_the_example_of_principles_can_be_loaded(tmp_path):
    path = tmp_path / "voices.yaml"
    path.write_text(example("Principles"))
    (found,) = recipe.principles(recipe.load(str(path), {"teacher": "base"}))
    assert list(found[1]) == ["plain", "lyrical"]


def test_the_example_of_several_corpora_can_be_loaded_and_every_key_is_described():
    written = settings.parse_yaml(example("Several corpora, other names"), "example")
    found = settings.load(_Corpora, written, "example")
    assert [corpus.weight for corpus in found.corpora] == [1, 0.25, 1]
    table = section(TEXT, "Several corpora, other names")
    keys = [field.name for field in dataclasses.fields(Source)]
    assert [key for key in keys if f"| `{key}` |" not in table] == []
