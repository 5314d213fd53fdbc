"""Anchors: saving, loading, splitting by prompt or source, and refused input."""

import json
import random
import shutil
from dataclasses import replace

import pytest

from dftserve.evaluate import reference
from dftserve.evaluate.reference import FEW_WORKS, warnings
from dftserve.evaluate.text.windows import Sample
from tests.texts import human_like

TEXTS = human_like(160)
ALONE = [Sample(text) for text in TEXTS]
PROMPTS = [Sample(text, f"prompt {i % 16}") for i, text in enumerate(TEXTS)]
SOURCES = [Sample(text, "", f"book {i % 40}") for i, text in enumerate(TEXTS)]
GERMAN = """Der alte Mann ging langsam durch den Wald und dachte über seine Kinder nach.
Niemand hatte ihn gefragt, ob er bleiben wollte. Die Sonne stand schon tief, als er endlich das
Dorf erreichte. Vor dem Haus wartete eine Frau mit einem Korb voller Äpfel. Sie sagte nichts,
sondern öffnete nur die Tür. Im Zimmer brannte ein kleines Feuer, und auf dem Tisch lag ein Brief.
Er erkannte die Schrift seines Bruders sofort. Warum hatte er so lange geschwiegen? Draußen begann
es zu regnen, und der Wind schlug gegen die Fenster."""
FINNISH = """Vanha mies käveli hitaasti metsän läpi ja ajatteli lapsiaan. Kukaan ei ollut kysynyt,
halusiko hän jäädä. Aurinko oli jo matalalla, kun hän vihdoin saapui kylään. Talon edessä odotti
nainen, jolla oli kori täynnä omenoita. Hän ei sanonut mitään, vaan avasi oven. Huoneessa paloi
pieni tuli, ja pöydällä oli kirje. Hän tunsi veljensä käsialan heti. Miksi tämä oli vaiennut niin
kauan? Ulkona alkoi sataa, ja tuuli löi ikkunoita vasten. Aamulla lumi peitti koko pihan."""


@pytest.fixture(scope="module", params=[ALONE, PROMPTS, SOURCES], ids=["alone", "prompt", "source"])
def samples(request):
    return request.param


@pytest.fixture(scope="module")
def built(samples):
    return reference.build(samples)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchors") / "anchors"
    reference.save(reference.build(PROMPTS), folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def same(a, b):
    return (
        (a.seed, a.dropped, a.words, a.human) == (b.seed, b.dropped, b.words, b.human)
        and list(a.splits) == list(b.splits)
        and all(a.splits[name].texts == b.splits[name].texts for name in a.splits)
        and all(a.splits[name].prompts == b.splits[name].prompts for name in a.splits)
    )


def test_saved_anchors_are_loaded_unchanged(built, tmp_path):
    reference.save(built, tmp_path / "anchors")
    loaded = reference.load(tmp_path / "anchors")
    assert same(loaded, built)
    assert loaded.test == loaded.splits["test"]
    assert len(reference.digest(tmp_path / "anchors")) == 64
    reference.save(loaded, tmp_path / "again")
    assert reference.digest(tmp_path / "again") == reference.digest(tmp_path / "anchors")
    assert reference.render(loaded) == reference.render(built)


def test_an_existing_folder_is_not_overwritten(built, tmp_path):
    with pytest.raises(FileExistsError):
        reference.save(built, tmp_path)


def test_human_texts_score_high(built):
    assert built.human.sds.value > 60


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_input_does_not_matter(samples, built, seed):
    assert same(reference.build(random.Random(seed).sample(samples, len(samples))), built)


def test_the_order_does_not_matter_for_copies_under_two_sources():
    twice = [*SOURCES, *(Sample(s.text, "", f"other {i % 9}") for i, s in enumerate(SOURCES[:40]))]
    forward, backward = reference.build(twice), reference.build(twice[::-1])
    assert forward.dropped["copies"] == 40
    assert same(forward, backward)
    assert [w.sources for w in forward.splits.values()] == [
        w.sources for w in backward.splits.values()
    ]


def test_another_seed_gives_another_split(samples, built):
    assert reference.build(samples, seed=1).test.texts != built.test.texts


def test_splits_are_disjoint_and_complete(samples, built):
    splits = built.splits
    texts = [text for split in splits.values() for text in split.texts]
    assert len(texts) == len(set(texts)) == len(samples)
    assert built.dropped == {"short": 0, "copies": 0, "alone": 0}
    assert {name: len(split) for name, split in splits.items()} == {
        "reference": 80,
        "calibration": 40,
        "test": 40,
    }
    for name in ("prompts", "sources"):
        seen = [set(getattr(split, name)) - {""} for split in splits.values()]
        assert sum(map(len, seen)) == len(set.union(*seen))
    assert built.sds_reference.by_prompt == (samples is PROMPTS)


def test_dropped_texts_are_counted():
    copies = [Sample(s.text + " The end.", s.prompt) for s in PROMPTS[:5]]
    lonely = [Sample(text, f"lonely {i}") for i, text in enumerate(human_like(3, seed=9))]
    built = reference.build([*PROMPTS, *copies, *lonely, Sample("Too short.", "prompt 1")])
    assert built.dropped == {"short": 1, "copies": 5, "alone": 3}
    assert same(
        reference.Anchors(0, {}, built.splits, built.sds_reference, built.human),
        reference.Anchors(0, {}, reference.build(PROMPTS).splits, built.sds_reference, built.human),
    )


@pytest.mark.parametrize("given", [ALONE, PROMPTS, SOURCES], ids=["alone", "prompt", "source"])
def test_only_the_allowed_number_of_texts_is_drawn(given, monkeypatch):
    """Whatever their order; every prompt is represented, and every source."""
    monkeypatch.setattr(reference, "MOST", 130)
    anchors = reference.build(given)
    texts = [text for split in anchors.splits.values() for text in split.texts]
    assert len(texts) <= 130
    assert len(texts) + sum(anchors.dropped.values()) == len(given)
    assert 25 <= anchors.dropped["unsampled"] <= 40
    assert "unsampled (130 are compared at most" in reference.render(anchors)
    prompts = {prompt for split in anchors.splits.values() for prompt in split.prompts}
    assert prompts == {sample.prompt for sample in given}
    sources = {source for split in anchors.splits.values() for source in split.sources}
    assert sources == {sample.source for sample in given}
    assert same(anchors, reference.build(list(reversed(given))))
    other = reference.build(given, seed=1)
    assert {text for split in other.splits.values() for text in split.texts} != set(texts)
    monkeypatch.setattr(reference, "MOST", len(given))
    assert "unsampled" not in reference.build(given).dropped


def test_a_source_of_many_texts_does_not_fill_the_sample(monkeypatch):
    monkeypatch.setattr(reference, "MOST", 120)
    given = [Sample(text, "", "long" if i < 60 else f"book {i}") for i, text in enumerate(TEXTS)]
    sources = [s for split in reference.build(given).splits.values() for s in split.sources]
    assert sources.count("long") <= 20
    assert len(set(sources)) == 101


def test_texts_of_which_few_have_prompts_are_split_by_source():
    """So that all texts are compared."""
    mixed = [Sample(s.text, "asked" if i < 60 else "") for i, s in enumerate(ALONE)]
    built = reference.build(mixed)
    assert built.dropped["alone"] == 0
    assert not built.sds_reference.by_prompt


def test_a_prompt_may_contain_any_character(tmp_path):
    strange = 'Write\u2028a \x85story\x0b, "please"\r\nof \U0001f600'
    built = reference.build([*ALONE[1:], Sample(TEXTS[0], strange)])
    reference.save(built, tmp_path / "anchors")
    assert same(reference.load(tmp_path / "anchors"), built)


def test_a_larger_window_is_saved_and_loaded(tmp_path):
    built = reference.build(ALONE, words=151)
    reference.save(built, tmp_path / "anchors")
    assert same(reference.load(tmp_path / "anchors"), built)
    assert reference.load(tmp_path / "anchors").words == 151


# ── Refused ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [0, 1, 63])
def test_too_few_texts_are_refused(count):
    with pytest.raises(ValueError, match=f"got {count} texts.*accepted: 64 or more"):
        reference.build(ALONE[:count])


def test_the_fewest_texts_are_split():
    splits = reference.build(ALONE[:64]).splits
    assert [len(split) for split in splits.values()] == [32, 16, 16]


def test_too_short_texts_are_refused():
    with pytest.raises(ValueError, match="100 of them shorter than 120 words; accepted"):
        reference.build([Sample(" ".join(text.split()[:100])) for text in TEXTS[:100]])


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_too_few_prompts_for_three_splits_are_refused(prompts):
    few = [Sample(text, f"p{i % prompts}") for i, text in enumerate(TEXTS)]
    with pytest.raises(ValueError, match=r"human texts: got .*accepted: at least .*prompts"):
        reference.build(few)


def test_too_few_sources_for_three_splits_are_refused():
    with pytest.raises(ValueError, match=r"human texts: got .*accepted: at least .*sources"):
        reference.build([Sample(text, "", f"{i % 2}") for i, text in enumerate(TEXTS)])


@pytest.mark.parametrize("passage", [GERMAN, FINNISH], ids=["German", "Finnish"])
def test_another_language_is_refused(passage):
    vocabulary = passage.split()
    foreign = [Sample(" ".join(random.Random(i).choices(vocabulary, k=130))) for i in range(80)]
    with pytest.raises(ValueError, match="English function words; accepted: English prose"):
        reference.build(foreign)


def test_texts_that_are_all_copies_are_refused():
    with pytest.raises(ValueError, match=r"'copies': 99.*accepted"):
        reference.build([Sample(f"{TEXTS[0]} {i}") for i in range(100)])


@pytest.mark.parametrize("seed", range(5))
def test_words_in_random_order_are_refused(seed):
    """The words of human texts in random order."""
    vocabulary = " ".join(TEXTS).split()
    draw = random.Random(seed)
    shuffled = [Sample(" ".join(draw.choices(vocabulary, k=140))) for _ in range(100)]
    with pytest.raises(ValueError, match=r"human texts: .*accepted: prose"):
        reference.build(shuffled)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_the_texts_is_detected(folder, at):
    content = bytearray((folder / "texts.jsonl").read_bytes())
    content[int(at * len(content))] ^= 1
    (folder / "texts.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"texts\.jsonl: changed"):
        reference.load(folder)


def edit(folder, change):
    about = json.loads((folder / "anchors.json").read_text())
    change(about)
    (folder / "anchors.json").write_text(json.dumps(about))


def test_another_format_is_refused(folder):
    edit(folder, lambda about: about.update(format="dftserve-anchors-0", texts_blake3=None))
    with pytest.raises(ValueError, match="got the format 'dftserve-anchors-0'; accepted"):
        reference.load(folder)


def float_paths(value, path=()):
    """The path of every float."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [inner for key, each in items for inner in float_paths(each, (*path, key))]
    return [path] if isinstance(value, float) else []


def test_an_edited_value_is_detected(folder):
    original = (folder / "anchors.json").read_text()
    paths = float_paths(json.loads(original)["human"])
    assert len(paths) >= 4

    for path in paths[:3] + paths[-1:]:
        (folder / "anchors.json").write_text(original)

        def change(about, path=path):
            inner = about["human"]
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] += 0.001

        edit(folder, change)
        with pytest.raises(ValueError, match="build it again"):
            reference.load(folder)


@pytest.mark.parametrize("edited", [{"words": 100}, {"by_prompt": False}, {"texts": {}}, {"x": 1}])
def test_metadata_that_differs_from_the_texts_is_refused(folder, edited):
    edit(folder, lambda about: about.update(edited))
    with pytest.raises(ValueError, match="build it again"):
        reference.load(folder)


def test_a_folder_without_anchors_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="that `dftserve evaluate anchors build` wrote"):
        reference.load(tmp_path / "none")
    for content in ("", "[]", "{}", '{"format"', "\x00"):
        (folder / "anchors.json").write_text(content)
        with pytest.raises(ValueError, match="that `dftserve evaluate anchors build` wrote"):
            reference.load(folder)


def test_a_folder_without_its_texts_is_refused(folder):
    (folder / "texts.jsonl").unlink()
    with pytest.raises(ValueError, match=r"texts\.jsonl"):
        reference.load(folder)


@pytest.mark.parametrize("name", ["words", "seed", "dropped", "texts_blake3", "human"])
def test_anchors_without_a_required_field_are_refused(folder, name):
    edit(folder, lambda about: about.pop(name))
    with pytest.raises(ValueError, match="build it again"):
        reference.load(folder)


def test_few_works_or_a_low_score_cause_a_warning(built):
    assert warnings(built, FEW_WORKS) == []
    assert "are from 4 works" in warnings(built, 4)[0]
    low = replace(built.human, sds=replace(built.human.sds, value=52.0))
    (warning,) = warnings(replace(built, human=low), FEW_WORKS)
    assert "scores 52" in warning
