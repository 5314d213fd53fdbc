"""Recipes: the shipped ones, what users' recipes may contain, and the sources built from them."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

from dftserve.targets import recipe, run
from dftserve.targets.document import Document
from dftserve.targets.recipe import load, shipped, source_of

MINIMAL = {"name": "mine", "about": "A test.", "source": {"ngram": {"order": 3}}}


def documents_of(*texts: list[int], prompt: int = 1, asked: bool = True) -> list[Document]:
    documents = []
    for tokens in texts:
        trained_N = np.arange(len(tokens)) >= prompt
        documents.append(Document(np.array(tokens, dtype=np.int32), trained_N, has_prompt=asked))
    return documents


DOCUMENTS = {
    "train": documents_of([0, 1, 2, 3, 4], [0, 1, 2, 5, 4], [0, 3, 1, 2, 3]),
    "heldout": documents_of([7, 2, 3, 4, 5]),
}


@pytest.fixture
def write_recipe(tmp_path):
    def write(**changes) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
        return str(path)

    return write


def build(name: str, values=None, documents=DOCUMENTS):
    return source_of(load(name, values), tokenizer=None, documents=documents, vocabulary=10)


# Shipped recipes


WITHOUT_A_TEACHER = ["conversation", "creative", "technical"]


def test_four_recipes_are_shipped_and_one_needs_a_teacher():
    assert shipped() == ["calibrated", *WITHOUT_A_TEACHER]
    with pytest.raises(ValueError, match="give one: --set teacher=VALUE"):
        load("calibrated")


@pytest.mark.parametrize("name", WITHOUT_A_TEACHER)
def test_a_shipped_recipe_needs_no_teacher(name):
    loaded = load(name)
    assert loaded.name == name
    assert len(loaded.about) > 100
    assert loaded.text
    assert (loaded.store.k, loaded.store.draws) == (6, 6)
    source = build(name)
    targets = source.targets(DOCUMENTS["train"], k=4, draws=2, seeds=[1, 2, 3])
    assert [len(each) for each in targets] == [4, 4, 4]
    source.targets(DOCUMENTS["heldout"], k=4, draws=2, seeds=[1])


@pytest.mark.parametrize("name", WITHOUT_A_TEACHER)
def test_a_shipped_recipe_takes_a_teacher(name):
    parts = load(name, {"teacher": "/models/base", "teacher_weight": "2"}).source["mix"]
    assert parts[-1] == {"weight": 2, "teacher": {"model": "/models/base"}}


def test_conversation_uses_references_if_there_are_any():
    assert build("conversation").describe()["kind"] == "mix"
    single = {"train": documents_of([0, 1, 2, 3], [1, 2, 3, 0]), "heldout": []}
    assert build("conversation", documents=single).describe()["kind"] == "ngram"
    plain = {"train": documents_of([0, 1, 2], [0, 2, 1], asked=False), "heldout": []}
    assert build("conversation", documents=plain).describe()["kind"] == "ngram"


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        ({"ngram": {}}, False),
        ({"references": {}}, True),
        ({"mix": [{"weight": 1, "ngram": {}}, {"weight": 1, "references": None}]}, True),
        ({"temper": {"power": 2, "of": {"references": {}}}}, True),
        ({"principles": {"teacher": {"model": "m"}, "principles": {"references": "x"}}}, False),
    ],
)
def test_a_recipe_with_references_anywhere_counts_answers(write_recipe, source, counts):
    assert recipe.counts_answers(load(write_recipe(source=source))) == counts


# Placeholders


@pytest.mark.parametrize("kind", ["mix", "others"])
def test_a_part_with_a_condition_is_used_if_its_name_has_a_value(write_recipe, kind):
    """A default of null is no value."""
    weight = {"weight": 1} if kind == "mix" else {}
    parts = [{**weight, **NGRAM}, {**weight, "when": "big", "teacher": {"model": "${big}"}}]
    if kind == "mix":
        source = {"mix": parts}
    else:
        source = {"calibrated": {"teacher": {"model": "m"}, "others": parts}}
    path = write_recipe(source=source, defaults={"big": None})

    def found(*given):
        source = load(path, *given).source
        return source["mix"] if kind == "mix" else source["calibrated"]["others"]

    assert found() == parts[:1]
    assert found({"big": "/m"}) == [parts[0], {**weight, "teacher": {"model": "/m"}}]


def test_placeholders(write_recipe):
    source = {"teacher": {"model": "${base}/v${version}", "temperature": "${t}"}}
    path = write_recipe(source=source, defaults={"version": 2, "t": 1.0})
    assert load(path, {"base": "/m"}).source == {"teacher": {"model": "/m/v2", "temperature": 1.0}}
    assert load(path, {"base": "/m", "t": "0.5"}).source["teacher"]["temperature"] == 0.5
    with pytest.raises(ValueError, match=r"\$\{base\} has no value; give one: --set base=VALUE"):
        load(path)
    with pytest.raises(ValueError, match=r"got the key 'bas'.*did you mean 'base'"):
        load(path, {"bas": "/m"})


@pytest.mark.parametrize(
    "value", ["~", "no such: thing", "[1]", "!!python/object:os.system x", "{"]
)
def test_a_text_value_is_not_parsed_as_yaml(write_recipe, value):
    path = write_recipe(source={"teacher": {"model": "${base}"}})
    assert load(path, {"base": value}).source["teacher"]["model"] == value


def test_placeholders_within_a_value_are_not_replaced(write_recipe):
    path = write_recipe(source={"teacher": {"model": "${base}"}})
    assert load(path, {"base": "${base}"}).source["teacher"]["model"] == "${base}"


# Refusals


@pytest.mark.parametrize("name", ["creativ", "no-such", "../creative", "", "no-such.yaml"])
def test_an_unknown_recipe_lists_the_shipped_ones(name):
    with pytest.raises(ValueError, match="calibrated, conversation, creative, technical"):
        load(name)
    with pytest.raises(ValueError, match="did you mean 'creative'"):
        load("creativ")


NGRAM = {"ngram": {}}
SERVED = {"served": {"url": "http://x", "model": "m"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "got the key 'sources'.*did you mean 'source'"),
        ({"corpus": {"min_word": 3}}, "corpus: got the key 'min_word'.*did you mean 'min_words'"),
        ({"corpus": {"min_words": "3"}}, "corpus.min_words: got '3'; accepted: a whole number"),
        ({"store": {"k": 0}}, "store: k 0 and draws 6; accepted"),
        ({"name": 3}, "name: got 3; accepted: a text"),
        ({"source": {}}, r"source: got \[\]; accepted: one of ngram, references, teacher"),
        ({"source": {"ngram": {}, "teacher": {}}}, r"source: got \['ngram', 'teacher'\]"),
        ({"source": "ngram"}, "source: got 'ngram'; accepted: keys and values"),
        ({"source": {"ngrams": {}}}, "got the key 'ngrams'.*did you mean 'ngram'"),
        ({"source": {"ngram": {"oder": 3}}}, "source.ngram: got the key 'oder'.*mean 'order'"),
        ({"source": {"teacher": {}}}, "source.teacher.model: got nothing; accepted: a text"),
        ({"source": {"mix": {}}}, "source.mix: got {}; accepted: a list of weights and sources"),
        ({"source": {"mix": []}}, "source.mix: got"),
        ({"source": {"mix": [NGRAM]}}, r"source.mix\[0\].weight: got None"),
        ({"source": {"mix": [{"weight": 0, **NGRAM}]}}, r"mix\[0\].weight: got 0; accepted"),
        ({"source": {"mix": [{"weight": True, **NGRAM}]}}, r"mix\[0\].weight: got True"),
        ({"source": {"mix": [{"weight": float("nan"), **NGRAM}]}}, r"mix\[0\].weight: got nan"),
        ({"source": {"mix": [{"weight": 1}]}}, r"source.mix\[0\]: got \[\]"),
        *(
            ({"source": {"calibrated": {"teacher": {"model": "m"}, **wrong}}}, message)
            for wrong, message in [
                ({"order": [1]}, "calibrated: got the key 'order'.*did you mean 'orders'"),
                ({"orders": []}, "orders: got none; accepted: one at least"),
                ({"orders": 3}, "calibrated.orders: got 3; accepted: a list"),
                ({"orders": [2, 2]}, r"orders: got \[2, 2\]; accepted: each once"),
                ({"orders": [0]}, "orders: got 0; accepted: from 1 to 64"),
                ({"decays": [1.0]}, "decays: got 1.0; accepted: from 0.001"),
                ({"in_context": -1}, "in_context: got -1; accepted: from 0"),
                ({"tokens": 10}, "tokens: got 10; accepted: from 1000"),
                ({"folds": 1}, "folds: got 1; accepted: from 2"),
                ({"shrinkage": -1}, "shrinkage: got -1"),
                ({"bins": {"matches": [1]}}, "bins: got the key 'matches'.*did you mean 'match'"),
                ({"bins": {"match": [3, 1]}}, r"bins\.match: got \[3.*\]; accepted: numbers that"),
                ({"bins": {"match": list(range(513))}}, "bins: got edges of .* at most 512"),
                ({"others": [{"techer": {}}]}, r"others\[0\]: got the key 'techer'.*'teacher'"),
                ({"others": [{"references": {}}]}, r"others\[0\]: got references, which hold"),
                (
                    {"others": [{"calibrated": {"teacher": {"model": "m"}}}]},
                    r"others\[0\]: got calibrated, whose targets .* contain the text's own tokens",
                ),
                ({"others": [SERVED]}, r"others\[0\]: got served, .* calibrated reads every"),
                (
                    {"others": [{"temper": {"power": 0.5, "of": {"references": {}}}}]},
                    r"others\[0\].temper.of: got references",
                ),
                ({"teacher": {"modle": "m"}}, "teacher: got the key 'modle'.*did you mean 'model'"),
            ]
        ),
        ({"source": {"teacher": {"model": "m", "dtype": "fp99"}}}, "dtype: got 'fp99'; accepted"),
        ({"source": {"teacher": {"model": "m", "device": "gpu"}}}, "device: got 'gpu'; accepted"),
        *(
            ({"source": {"principles": {"teacher": {"model": "m"}, **wrong}}}, message)
            for wrong, message in [
                ({"principles": {}}, "principles.principles: got {}; accepted: a text for each"),
                ({"principles": {"a": " "}}, "principles.a: got ' '; accepted: a text, not empty"),
                (
                    {"principles": {"dry": "x"}, "weights": {"dyr": 1.0}},
                    "weights: got the key 'dyr'.*did you mean 'dry'",
                ),
                (
                    {"principles": {"dry": "x", "warm": "y"}, "weights": {"dry": 1.0}},
                    "weights.warm: got nothing; accepted: a number above 0",
                ),
            ]
        ),
        (
            {"source": {"tilt": {"of": NGRAM, "phrases": [], "samples": "s"}}},
            r"phrases: got \[\]; accepted: one text at least",
        ),
        (
            {"source": {"mix": [{"weight": 1, **SERVED}, {"weight": 1, **NGRAM}]}},
            r"mix\[0\]: got served, which gives a server's top tokens only, and mix reads",
        ),
        (
            {"source": {"temper": {"power": 0.5, "of": SERVED}}},
            "temper.of: got served, .* temper reads every token's",
        ),
        (
            {"source": {"temper": {"power": 0.5, "of": {"mix": [{"weight": 1, **SERVED}]}}}},
            r"temper.of.mix\[0\]: got served, .* temper reads every token's",
        ),
        (
            {"source": {"geomix": [{"weight": 2, **SERVED}]}},
            r"geomix\[0\]: got served, .* geomix reads every token's",
        ),
        (
            {"source": {"mix": [{"weight": 1, "when": ["a", "b"], **NGRAM}]}},
            r"source.mix\[0\].when: got \['a', 'b'\]; accepted: a name",
        ),
        ({"source": {"calibrated": {}}}, "calibrated.teacher: got nothing; accepted: keys and"),
        (
            {"source": {"temper": {"power": 0.5, "of": {"mix": [{"weight": 1, "ngam": {}}]}}}},
            r"source.temper.of.mix\[0\]: got the key 'ngam'",
        ),
    ],
)
def test_invalid_recipes_are_refused(write_recipe, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(write_recipe(**changes))
    assert str(caught.value).startswith("mine.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        SERVED,
        {"mix": [{"weight": 3, **SERVED}]},
        {"geomix": [{"weight": 1, **SERVED}]},
        {"mix": [{"weight": 3, **SERVED}, {"weight": 1, "references": {"optional": True}}]},
    ],
)
def test_a_server_that_is_the_only_source_is_accepted(write_recipe, source):
    documents = {"train": documents_of([0, 1, 2, 3], [1, 2, 3, 0]), "heldout": []}
    built = build(write_recipe(source=source), documents=documents)
    assert built.describe()["kind"] == "served"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"served": {**SERVED["served"], "key_variable": "NO_SUCH_KEY"}},
            "variable NO_SUCH_KEY holds no API key; accepted",
        ),
        (
            {
                "temper": {
                    "power": 2,
                    "of": {"tilt": {"of": NGRAM, "phrases": ["a"], "samples": "nowhere"}},
                }
            },
            "nowhere: nothing is there; accepted",
        ),
        (
            {"mix": [{"weight": 1, "calibrated": {"teacher": {"model": "m"}, "students": "no"}}]},
            "students: got 'no', which has no students.json; accepted",
        ),
    ],
)
def test_missing_inputs_of_a_recipe_are_found_before_the_corpus_is_read(
    tmp_path, write_recipe, monkeypatch, source, message
):
    """`target students` does not need them: the students may be those that it makes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setattr(run, "read_documents", lambda *_, **given: pytest.fail("texts are read"))
    path = write_recipe(source=source)
    assert load(path)
    job = run.Job(corpus=tmp_path, model="m", recipe=path, out=tmp_path / "out")
    for command in (run.build, run.estimate):
        with pytest.raises(ValueError, match=message):
            command(job)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system [ls]", "not YAML"),
        ("- 1", "x.yaml: got a list; accepted: keys and values"),
        ("", "x.yaml: got nothing; accepted: keys and values"),
        ("defaults: [a]\nsource: {ngram: {}}", "defaults: got a list; accepted: keys and values"),
        ("sorce: {ngram: {}}", "got the key 'sorce'; accepted: .*source, defaults .*'source'"),
        ("a: &x [1]\nb: *x", "it has an alias"),
        ("[" * 1500, "more than 64 levels"),
        (b"name: \xff", "not UTF-8"),
        ("#" * 65_537, "65,537 bytes; accepted: at most 65,536"),
    ],
)
def test_files_that_are_not_recipes_are_refused(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load(str(path))


def test_a_recipe_needs_only_a_source_and_has_its_files_name_by_default(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("source: {ngram: {order: 3}}\n")
    assert (load(str(path)).name, load(str(path)).about) == ("mine", "")


def test_all_unknown_keys_are_reported_at_once(write_recipe):
    with pytest.raises(
        ValueError, match=r"keys 'sorce' \(did you mean 'source'\?\), 'x'; accepted"
    ):
        load(write_recipe(sorce=1, x=2))


def test_an_invalid_command_line_value_is_refused_with_the_option_and_the_form():
    with pytest.raises(
        ValueError, match=r"^--set corpus\.strip: got 'front_matter'.*list"
    ) as error:
        load("technical", {"corpus.strip": "front_matter"})
    assert "such as [front_matter]" in str(error.value)
    assert "html, comments, front_matter, code" in str(error.value)
    assert load("technical", {"corpus.strip": "[front_matter]"}).corpus.strip == ("front_matter",)


def test_the_nesting_of_sources_is_limited(write_recipe):
    source: dict = NGRAM
    for _ in range(20):
        source = {"temper": {"power": 1, "of": source}}
    with pytest.raises(ValueError, match="more than 16 sources within sources"):
        load(write_recipe(source=source))


# Sources


def test_nested_sources_are_built(write_recipe):
    parts = [{"weight": 3, "ngram": {"order": 2}}, {"weight": 1, "ngram": {"order": 1}}]
    path = write_recipe(source={"temper": {"power": 0.5, "of": {"mix": parts}}})
    description = build(path).describe()
    assert (description["kind"], description["power"], description["source"]["kind"]) == (
        "temper",
        0.5,
        "mix",
    )
    assert build(write_recipe(source={"geomix": parts})).describe()["kind"] == "geomix"


def test_a_single_part_of_a_mix_is_its_source_and_of_a_geomix_is_tempered(write_recipe):
    def of(kind, weight):
        left_out = {"weight": 1, "when": "more", "ngram": {"order": 1}}
        parts = [{"weight": weight, "ngram": {"order": 2}}, left_out]
        return build(write_recipe(source={kind: parts})).describe()

    assert of("mix", 0.5)["kind"] == of("geomix", 1)["kind"] == "ngram"
    powered = of("geomix", 0.5)
    assert (powered["kind"], powered["power"]) == ("temper", 0.5)


def test_ngrams_are_counted_in_the_training_split_only(write_recipe):
    path = write_recipe()
    other = {"train": DOCUMENTS["train"], "heldout": []}
    assert build(path).describe() == build(path, documents=other).describe()


def test_all_settings_reach_their_source(write_recipe, monkeypatch):
    """The arguments of sources that need a model or a server, with both replaced."""
    calls = []

    class Recorded:
        def __init__(self, *given, **named):
            calls.append((given, named))

        load = classmethod(lambda cls, *given, **named: cls(*given, **named))

    for module, name in (("teacher", "Teacher"), ("served", "ServedTeacher")):
        fake = types.ModuleType(module)
        setattr(fake, name, Recorded)
        monkeypatch.setitem(sys.modules, f"dftserve.targets.{module}", fake)
    build(write_recipe(source={"teacher": {"model": "/m", "dtype": "float32", "device": "cpu"}}))
    build(write_recipe(source={"served": {"url": "http://x", "model": "m", "key_variable": "KEY"}}))
    assert calls == [
        (("/m",), {"vocabulary": 10, "dtype": "float32", "device": "cpu", "temperature": 1.0}),
        (("http://x", "m"), {"vocabulary": 10, "key_variable": "KEY", "at_once": 4}),
    ]


def test_the_shipped_recipes_are_in_the_package():
    assert Path(recipe.__file__).parent / "recipes" == recipe.FOLDER
