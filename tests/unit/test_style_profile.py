"""The folder of a style profile: it is read as it was written, and invalid ones are refused."""

import json
import os
from dataclasses import fields, replace

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from dftserve.bounded_files import DEEPEST
from dftserve.styles import profile as profiles
from dftserve.styles.profile import MANIFEST, TENSORS, Phrase, ProfileError, load, read, write
from tests.styles import PRINT, stored


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "small", stored())
    return tmp_path / "small"


def test_a_profile_is_read_as_it_was_written(folder):
    expected, found = stored(), load(folder)
    for each in fields(expected.profile):
        a, b = getattr(expected.profile, each.name), getattr(found.profile, each.name)
        np.testing.assert_array_equal(a, b, strict=True)
    for each in fields(expected.harms):
        np.testing.assert_array_equal(
            getattr(expected.harms, each.name), getattr(found.harms, each.name), strict=True
        )
    for name in ("counts", "settings", "versions"):
        assert getattr(found, name) == getattr(expected, name)


def test_an_existing_folder_is_not_overwritten(folder):
    before = (folder / TENSORS).read_bytes()
    with pytest.raises(FileExistsError, match="choose another place"):
        write(folder, stored())
    assert (folder / TENSORS).read_bytes() == before


def test_delta_is_that_of_the_bigram_if_there_is_one():
    small = stored().profile
    assert small.delta(0, 1) == 1.0
    assert small.delta(2, 1) == small.delta(None, 1) == 0.5
    assert small.delta(3, 3) == -0.25
    assert small.delta(3, small.vocabulary) == 0


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_a_flipped_bit_anywhere_is_refused(folder, name):
    content = (folder / name).read_bytes()
    for index in np.random.default_rng(0).integers(0, len(content), 200).tolist():
        flipped = bytearray(content)
        flipped[index] ^= 1 << index % 8
        (folder / name).write_bytes(flipped)
        with pytest.raises(ProfileError, match=rf"small/{name}"):
            read(folder)


def rewrite_manifest(folder, **changed):
    """Changes values of the manifest and updates its checksum."""
    content = {**json.loads((folder / MANIFEST).read_text()), **changed, "blake3": ""}
    content["blake3"] = blake3(profiles._json(content).encode()).hexdigest()
    (folder / MANIFEST).write_text(profiles._json(content))


def rewrite_tensors(folder, **changed):
    """Replaces or adds tensors and updates the checksums."""
    found = load_tensors((folder / TENSORS).read_bytes())
    content = save_tensors({**found, **changed})
    (folder / TENSORS).write_bytes(content)
    rewrite_manifest(folder, tensors_blake3=blake3(content).hexdigest())


def int32(*values):
    return np.array(values, np.int32)


def test_a_changed_folder_with_updated_checksums_is_read(folder):
    """So that the tests below do not fail because of checksums."""
    rewrite_tensors(folder, unigram_V=np.full(8, 0.125, np.float32))
    rewrite_manifest(folder, name="other")
    assert read(folder).name == "other"
    assert read(folder).unigram_V[0] == 0.125


WRONG_TENSORS = {
    "another type": ({"unigram_V": np.zeros(8)}, "unigram_V"),
    "another shape": ({"root_next_V": np.zeros(9, np.int32)}, "root_next_V"),
    "two axes": ({"unigram_V": np.zeros((8, 1), np.float32)}, "unigram_V"),
    "one more": ({"else": int32(1)}, "else"),
    "a state beyond": ({"root_next_V": np.full(8, 99, np.int32)}, "99 to 99; accepted: 0 to"),
    "a state below": ({"root_next_V": np.full(8, -1, np.int32)}, "-1 to -1; accepted: 0 to"),
    "a token beyond": ({"bigram_token_M": int32(1, 8)}, "1 to 8; accepted: 0 to 7"),
    "a context beyond": ({"bigram_context_C": int32(0, 8)}, "0 to 8; accepted: 0 to 7"),
    "contexts that fall": ({"bigram_context_C": int32(3, 0)}, "ids that ascend"),
    "starts that fall": ({"bigram_start_C": int32(0, 3, 2)}, "starts that ascend from 0 to 2"),
    "starts from elsewhere": ({"bigram_start_C": int32(1, 1, 2)}, "starts that ascend from 0 to 2"),
    "NaN": ({"unigram_V": np.full(8, np.nan, np.float32)}, "-10 to 10 nats"),
    "infinite": ({"bigram_delta_M": np.full(2, np.inf, np.float32)}, "-10 to 10 nats"),
    "a factor above 1": ({"root_log_factor_V": np.ones(8, np.float32)}, "log factors up to 0"),
    "a factor of 0": (
        {"root_log_factor_V": np.full(8, -np.inf, np.float32)},
        "log factors up to 0",
    ),
}


@pytest.mark.parametrize(("changed", "message"), WRONG_TENSORS.values(), ids=list(WRONG_TENSORS))
def test_invalid_tensors_are_refused(folder, changed, message):
    rewrite_tensors(folder, **changed)
    with pytest.raises(ProfileError, match=message) as refused:
        read(folder)
    assert str(folder / TENSORS) in str(refused.value)
    assert "build the profile again" in str(refused.value)


def test_rows_out_of_order_are_refused(folder):
    small = stored().profile
    for name in ("row_token_N", "row_next_N"):
        reversed_N = np.ascontiguousarray(getattr(small, name)[::-1])
        rewrite_tensors(folder, **{name: reversed_N})
    with pytest.raises(ProfileError, match=r"row_token_N.*ids that ascend in each row"):
        read(folder)


def test_invalid_completion_probabilities_are_refused(folder):
    harms = stored().harms
    for changed, message in (
        ({"harm_chance_H": harms.chance_H + 1}, "chances from 0 to 1"),
        ({"harm_phrase_H": harms.phrase_H + 2}, "accepted: 0 to 1"),
    ):
        rewrite_tensors(folder, **changed)
        with pytest.raises(ProfileError, match=message):
            read(folder)
        rewrite_tensors(folder, harm_chance_H=harms.chance_H, harm_phrase_H=harms.phrase_H)


def test_an_invalid_manifest_is_refused(folder):
    good = json.loads((folder / MANIFEST).read_text())
    phrase = good["phrases"][0]
    for changed, message in (
        ({"format": 2}, "got 2; accepted: 1"),
        ({"name": "../up"}, "name: got"),
        ({"vocabulary": 9}, "sizes.vocabulary: got 8; accepted: 9"),
        ({"sizes": {**good["sizes"], "states": 1 << 30}}, "states: got 1073741824"),
        ({"sizes": {**good["sizes"], "entries": -1}}, "entries: got -1"),
        ({"sizes": {**good["sizes"], "bigrams": 1 << 26, "harms": 1 << 27}}, None),
        ({"sizes": {**good["sizes"], "bigrams": 3}}, "bigram"),
        ({"phrases": [{**phrase, "log_ratio": 10.5}]}, "got 10.5; accepted: 0 to 10 nats"),
        ({"phrases": [{**phrase, "log_ratio": 50}]}, "got 50.0; accepted: 0 to 10 nats"),
        ({"phrases": [{**phrase, "log_ratio": -0.5}]}, "got -0.5; accepted: 0 to 10 nats"),
        ({"phrases": [{**phrase, "model_rate": 1001}]}, "1001.0; accepted: 0 to 1,000 per"),
        ({"phrases": [{**phrase, "text": " "}]}, "phrase: got ' '"),
        ({"phrases": [phrase]}, "harm_phrase_H"),
        ({"tokenizer_fingerprint": "x"}, "64 hexadecimal digits"),
        ({"strength": 1.5}, "strength: got 1.5"),
        ({"max_kl": -1}, "max_kl: got -1"),
        ({"extra": 1}, "got the key 'extra'"),
        ({"counts": None}, "counts"),
    ):
        rewrite_manifest(folder, **{**good, **changed})
        with pytest.raises(ProfileError, match=message) as refused:
            read(folder)
        assert str(folder) in str(refused.value)


def test_too_many_phrases_are_refused(folder, monkeypatch):
    assert profiles.MOST_PHRASES == 100_000
    monkeypatch.setattr(profiles, "MOST_PHRASES", 1)
    with pytest.raises(ProfileError, match=r"profile\.json, phrases: got 2; accepted: at most 1"):
        read(folder)


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_missing_files_links_and_other_kinds_are_refused(folder, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    os.rename(folder / name, elsewhere)
    with pytest.raises(ProfileError, match=rf"has no {name}|{name} is missing"):
        read(folder)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(ProfileError, match=rf"{name}: got a link to .*outside of"):
        read(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ProfileError, match=rf"{name}: got a FIFO"):
        read(folder)
    os.unlink(folder / name)
    (folder / name).mkdir()
    with pytest.raises(ProfileError, match=rf"{name}: got a folder"):
        read(folder)


def test_a_large_file_is_refused_before_it_is_read(folder):
    with open(folder / TENSORS, "ab") as file:
        file.truncate(1 << 33)
    with pytest.raises(ProfileError, match=r"8,589,934,592 bytes; accepted: at most"):
        read(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1)])
def test_a_manifest_of_another_kind_is_refused(folder, content):
    (folder / MANIFEST).write_text(content)
    with pytest.raises(ProfileError, match=MANIFEST):
        read(folder)


def test_a_profile_fits_only_its_tokenizer_template_and_vocabulary():
    small = replace(stored().profile, template_fingerprint="b" * 64)
    small.belongs_to(tokenizer=PRINT, template="b" * 64, vocabulary=12)
    for changed, message in (
        ({"tokenizer": "c" * 64}, "another tokenizer"),
        ({"template": None}, "another chat template"),
        ({"vocabulary": 7}, "the model has 7 columns"),
    ):
        model = {"tokenizer": PRINT, "template": "b" * 64, "vocabulary": 12, **changed}
        with pytest.raises(ProfileError, match=message):
            small.belongs_to(**model)


def test_a_phrase_with_a_log_ratio_beyond_its_bound_is_refused():
    with pytest.raises(ProfileError, match=r"log ratio of 'a': got 10\.5; accepted: 0 to 10 nats"):
        Phrase("a", 10.5, 1, 1)
    with pytest.raises(ProfileError, match="got nan"):
        Phrase("a", float("nan"), 1, 1)
