"""Untrusted files: each command refuses them in one sentence, with limited memory."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dftserve import bounded_files, checkpoint, model_folder, settings
from dftserve.bounded_files import FileError
from dftserve.evaluate import reference
from dftserve.evaluate.text.windows import Sample
from dftserve.spec import CheckpointInfo
from tests.bounded_commands import Commands
from tests.texts import human_like
from tests.training import save_model, save_store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc reports the memory in use")

HUGE = 10**18
SPARSE_BYTES = 1 << 43
DEEP = "[" * 100_000
BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)


# ── The files ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One of each file that commands read, as dftserve writes them."""
    root = tmp_path_factory.mktemp("whole")
    save_model(root / "model")
    save_store(root / "store", count=12, heldout=4)
    shutil.copytree(root / "model", root / "final")
    CheckpointInfo(recipe="a test", diversity=None).write(root / "final")
    checkpoint.seal(root / "final")
    shutil.copytree(root / "model", root / "with_info")
    info = {"recipe": "a test", "diversity": {"level": 0.5}}
    (root / "with_info" / "dft.json").write_text(json.dumps(info))
    texts = human_like(96)
    reference.save(reference.build([Sample(text) for text in texts]), root / "anchors")
    (root / "corpus").mkdir()
    for number, text in enumerate(texts[:6]):
        (root / "corpus" / f"{number}.txt").write_text(text)
    (root / "corpus" / "more.jsonl").write_text(json.dumps({"text": texts[7]}) + "\n")
    (root / "recipe.yaml").write_text(
        "{name: mine, about: a test, source: {ngram: {order: 2}}, corpus: {min_words: 5}}"
    )
    settings_ = {"model": f"{root}/model", "targets": f"{root}/store", "output": f"{root}/run"}
    (root / "run.yaml").write_text(json.dumps(settings_))
    (root / "prompts.txt").write_text("Write.\n")
    write_answers(root / "answers", texts)
    return root


def write_answers(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    asked = {"model": "m", "prompts": [{"text": "Write."}], "grid": [0.0]}
    (folder / "asked.json").write_text(json.dumps(asked))
    answer = {"level": 0, "place": 0, "sample": 0, "text": texts[0], "finish_reason": "stop"}
    (folder / "answers.jsonl").write_text(
        json.dumps(answer | {"tokens": 9, "figures": None}) + "\n"
    )
    (folder / "people.jsonl").write_text(json.dumps({"prompt": "Write.", "response": texts[1]}))


@pytest.fixture
def workspace(whole, tmp_path) -> Path:
    copy = shutil.copytree(whole, tmp_path / "place")
    run = json.loads((copy / "run.yaml").read_text())
    moved = {name: value.replace(str(whole), str(copy)) for name, value in run.items()}
    (copy / "run.yaml").write_text(json.dumps(moved))
    return copy


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as instance:
        yield instance


@dataclass(frozen=True)
class Reader:
    """A command and the file that it reads, both relative to `workspace`."""

    file: str
    words: str
    code: int = 0
    """The exit code of the command on the valid file."""
    is_the_users: bool = False
    """Named on the command line: its links are followed."""


TRAIN = "train {0}/run.yaml --plan"
BUILD = "target build {0}/corpus --model {0}/model --recipe {0}/recipe.yaml --out {0}/built"
EVALUATE = (
    "evaluate http://127.0.0.1:1 --prompts {0}/prompts.txt --anchors {0}/anchors --out {0}/built"
    " --samples 1"
)
BLIND = (
    "evaluate blind page {0}/answers --human {0}/answers/people.jsonl --html {0}/x.html --seed 1"
)
SERVE = "serve {0}/with_info --default-diversity checkpoint --dry-run"
SHARD = "store/train-00000.safetensors"

READERS = {
    "dft.json, served": Reader("with_info/dft.json", SERVE),
    "dft.json, verified": Reader("final/dft.json", "checkpoint verify {0}/final"),
    "checksums.json": Reader("final/checksums.json", "checkpoint verify {0}/final"),
    "checksums.json, served": Reader("final/checksums.json", "serve {0}/final --dry-run"),
    "weights": Reader("final/model.safetensors", "checkpoint verify {0}/final"),
    "config.json, served": Reader("with_info/config.json", SERVE),
    "config.json, trained": Reader("model/config.json", TRAIN),
    "tokenizer.json": Reader("model/tokenizer.json", TRAIN),
    "manifest, inspected": Reader("store/manifest.json", "target inspect {0}/store"),
    "manifest, verified": Reader("store/manifest.json", "target verify {0}/store"),
    "manifest, trained on": Reader("store/manifest.json", TRAIN),
    "shard, inspected": Reader(SHARD, "target inspect {0}/store"),
    "shard, verified": Reader(SHARD, "target verify {0}/store"),
    "shard, trained on": Reader(SHARD, TRAIN),
    "recipe": Reader("recipe.yaml", BUILD, is_the_users=True),
    "training settings": Reader("run.yaml", TRAIN, is_the_users=True),
    "text of a corpus": Reader("corpus/0.txt", BUILD),
    "records of a corpus": Reader("corpus/more.jsonl", BUILD),
    "anchors": Reader("anchors/anchors.json", "evaluate anchors inspect {0}/anchors"),
    "texts of anchors": Reader("anchors/texts.jsonl", "evaluate anchors inspect {0}/anchors"),
    "anchors of an evaluation": Reader("anchors/anchors.json", EVALUATE, code=2),
    "prompts": Reader("prompts.txt", EVALUATE, code=2, is_the_users=True),
    "what was asked": Reader("answers/asked.json", BLIND),
    "answers": Reader("answers/answers.jsonl", BLIND),
}


def test_valid_files_are_accepted(commands, whole):
    """Otherwise the refusals below would prove nothing. Two need more prompts than there are."""
    for name, reader in READERS.items():
        ended = commands.run(*reader.words.format(whole).split())
        assert ended.code == reader.code, (name, ended.output)
        assert "Traceback" not in ended.output
        if reader.code:
            assert "prompts" in ended.errors[0]
        shutil.rmtree(whole / "built", ignore_errors=True)
        (whole / "x.html").unlink(missing_ok=True)
        (whole / "x.html.key.json").unlink(missing_ok=True)


def refused(commands, reader: Reader, workspace: Path, *parts: str) -> None:
    """Assert that the command ends with code 1 or 2 and one sentence that names the file."""
    ended = commands.run(*reader.words.format(workspace).split())
    assert ended.code in (1, 2), ended
    assert "Traceback" not in ended.output
    assert len(ended.errors) == 1, ended.output
    line = ended.errors[0]
    assert Path(reader.file).name in line, line
    assert line.endswith("."), line
    assert ended.output.rstrip().endswith(line)
    for part in parts:
        assert part in line, line


# ── Something else in place of the file ──────────────────────────────────────────────────────────


def link_out(path: Path) -> str:
    """A link to the same content: only the link is wrong."""
    outside = path.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)
    return "got a link"


def link_to_a_device(path: Path) -> str:
    path.unlink()
    path.symlink_to("/dev/zero")
    return ""


def link_to_nothing(path: Path) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return ""


def link_to_itself(path: Path) -> str:
    path.unlink()
    path.symlink_to(path.name)
    return ""


def fifo(path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "FIFO"


def folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return ""


def sparse(path: Path) -> str:
    try:
        os.truncate(path, SPARSE_BYTES)
    except OSError as error:
        pytest.skip(f"no file of {SPARSE_BYTES} bytes can be made here: {error}")
    return "accepted: at most"


PLACED = (link_out, link_to_a_device, link_to_nothing, link_to_itself, fifo, folder, sparse)


@pytest.mark.parametrize("attack", PLACED, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("name", READERS)
def test_anything_but_a_plain_file_is_refused(
    commands, workspace, name, attack: Callable[[Path], str]
):
    reader = READERS[name]
    if attack is link_out and reader.is_the_users:
        pytest.skip("the user's own link is followed")
    if attack is folder and name in ("text of a corpus", "records of a corpus"):
        pytest.skip("a folder of a corpus may have any name")
    part = attack(workspace / reader.file)
    # A command that lists a folder refuses a folder in it with another message.
    refused(commands, reader, workspace, part)


def test_a_users_own_link_is_followed(commands, workspace):
    for name in ("recipe.yaml", "run.yaml"):
        link_out(workspace / name)
    assert commands.run(*TRAIN.format(workspace).split()).code == 0
    assert commands.run(*BUILD.format(workspace).split()).code == 0


# ── Wrong content ────────────────────────────────────────────────────────────────────────────────

JSON_FILES = [
    *("dft.json, served", "checksums.json", "config.json, served", "config.json, trained"),
    *("manifest, inspected", "manifest, verified", "manifest, trained on", "records of a corpus"),
    *("anchors", "anchors of an evaluation", "what was asked", "answers", "training settings"),
    "recipe",
]


@pytest.mark.parametrize("content", [DEEP, '{"a":' * 100_000, "{", "\udcff", "null", "[]"])
@pytest.mark.parametrize("name", JSON_FILES)
def test_invalid_documents_are_refused(commands, workspace, name, content):
    if name.startswith("config.json") and content in ("null", "[]"):
        pytest.skip("transformers reports it")
    path = workspace / READERS[name].file
    path.write_bytes(f"{content}\n".encode(errors="surrogateescape"))
    refused(commands, READERS[name], workspace)


@pytest.mark.parametrize("name", ["recipe", "training settings"])
def test_aliases_are_refused(commands, workspace, name):
    """25 of them expand to 67 million texts."""
    (workspace / READERS[name].file).write_text(BOMB)
    refused(commands, READERS[name], workspace, "alias")


def changed(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


NUMBERS = [0, -1, HUGE, 10**30, float("nan"), float("inf"), 1.5, "1", None, [1], True]


@pytest.mark.parametrize("value", [*NUMBERS, 10**6], ids=str)
@pytest.mark.parametrize("name", ["documents", "tokens", "trained"])
@pytest.mark.parametrize("command", ["inspected", "verified", "trained on"])
def test_counts_of_shards_are_compared_with_the_file(commands, workspace, command, name, value):
    reader = READERS[f"manifest, {command}"]
    changed(workspace / reader.file, lambda manifest: manifest["shards"][0].update({name: value}))
    ended = commands.run(*reader.words.format(workspace).split())
    assert ended.code in (1, 2), ended.output
    assert len(ended.errors) == 1, ended.output
    assert "store" in ended.errors[0]


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("name", ["k", "draws", "vocabulary", "seed", "format"])
def test_numbers_of_a_plan_have_bounds(commands, workspace, name, value):
    if (name, value) in (("seed", 0), ("seed", -1), ("seed", HUGE)):
        pytest.skip("a seed is any number of 64 bits")
    reader = READERS["manifest, inspected"]
    changed(workspace / reader.file, lambda manifest: manifest["plan"].update({name: value}))
    ended = commands.run(*reader.words.format(workspace).split())
    assert ended.code in (1, 2), ended.output
    assert len(ended.errors) == 1, ended.output


@pytest.mark.parametrize("value", ["../model/model.safetensors", "/etc/passwd", "", ".", "a/b"])
@pytest.mark.parametrize("command", ["inspected", "verified", "trained on"])
def test_a_manifest_may_name_only_files_of_its_folder(commands, workspace, command, value):
    reader = READERS[f"manifest, {command}"]
    changed(workspace / reader.file, lambda manifest: manifest["shards"][0].update(file=value))
    refused(commands, reader, workspace, f"got {value!r}", "accepted: a file next to the manifest")


def test_a_manifest_may_name_a_shard_only_once(commands, workspace):
    reader = READERS["manifest, inspected"]
    changed(
        workspace / reader.file, lambda manifest: manifest["shards"].append(manifest["shards"][0])
    )
    refused(commands, reader, workspace, "the same shard twice")


@pytest.mark.parametrize("name", ["../final/config.json", "/etc/passwd", "a/../b", "", "a\x1b[2J"])
def test_checksums_may_name_only_files_of_their_folder(commands, workspace, name):
    reader = READERS["checksums.json"]
    changed(workspace / reader.file, lambda checksums: checksums.update({name: "0" * 64}))
    refused(commands, reader, workspace, "accepted: paths of files below its folder")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), HUGE, 10**400, -1, "1"], ids=str)
@pytest.mark.parametrize("name", ["target_entropy", "model_entropy", "diversity"])
def test_numbers_of_a_dft_json_have_bounds(commands, workspace, name, value):
    reader = READERS["dft.json, served"]
    changed(workspace / reader.file, lambda info: info.update({name: value}))
    refused(commands, reader, workspace, name)


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "hidden_size"])
@pytest.mark.parametrize("command", ["served", "trained"])
def test_sizes_of_a_model_have_bounds(commands, workspace, command, name):
    reader = READERS[f"config.json, {command}"]
    changed(workspace / reader.file, lambda config: config.update({name: HUGE}))
    refused(commands, reader, workspace, name)


@pytest.mark.parametrize("value", [0, -1, HUGE, float("nan"), float("inf"), 10**400], ids=str)
@pytest.mark.parametrize(
    "source",
    [
        '{"ngram": {"order": N}}',
        '{"ngram": {"min_count": N}}',
        '{"teacher": {"model": "m", "temperature": N}}',
        '{"served": {"url": "http://127.0.0.1:1", "model": "m", "at_once": N}}',
        '{"temper": {"power": N, "of": {"ngram": {}}}}',
        '{"mix": [{"weight": N, "ngram": {}}]}',
        '{"principles": {"teacher": {"model": "m"}, "principles": {"a": "b"}, '
        '"posterior_power": N}}',
    ],
)
def test_numbers_of_a_recipe_have_bounds(commands, workspace, source, value):
    number = {"nan": ".nan", "inf": ".inf"}.get(str(value), str(value))
    text = '{"name": "mine", "about": "a test", "source": S}'
    (workspace / "recipe.yaml").write_text(text.replace("S", source.replace("N", number)))
    refused(commands, READERS["recipe"], workspace)


def test_sizes_of_anchors_have_bounds(commands, workspace):
    reader = READERS["anchors"]
    changed(workspace / reader.file, lambda anchors: anchors.update(words=HUGE))
    refused(commands, reader, workspace, "words")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("document_ends", lambda ends: ends * 10**15),
        ("document_ends", lambda ends: ends[::-1].copy()),
        ("document_ends", lambda ends: -ends),
        ("trained_ends", lambda ends: ends * 0 + 10**12),
        ("top_ids_high", lambda ids: ids + 255),
        ("tokens_high", lambda ids: ids + 255),
        ("entropy", lambda each: each * float("nan")),
        ("token_logprob", lambda each: each * float("nan")),
        ("trained", lambda marks: marks * 0 + 1),
    ],
)
@pytest.mark.parametrize("command", ["inspected", "trained on"])
def test_the_content_of_a_shard_is_compared_with_its_manifest(
    commands, workspace, command, name, change: Callable
):
    from safetensors.numpy import load_file, save_file

    reader = READERS[f"shard, {command}"]
    tensors = load_file(workspace / reader.file)
    tensors[name] = change(tensors[name]).astype(tensors[name].dtype)
    save_file(tensors, workspace / reader.file)
    refused(commands, reader, workspace, "build the store again")


def test_a_shard_of_other_shapes_is_refused(commands, workspace):
    """With the same number of bytes."""
    from safetensors.numpy import load_file, save_file

    reader = READERS["shard, inspected"]
    tensors = load_file(workspace / reader.file)
    tensors["entropy"] = tensors["entropy"].reshape(1, -1)
    save_file(tensors, workspace / reader.file)
    refused(commands, reader, workspace, "the tensors entropy")


# ── Unlisted files ───────────────────────────────────────────────────────────────────────────────


def extra_file(path: Path) -> None:
    path.write_text("print('hello')")


def extra_link_to_a_folder(path: Path) -> None:
    path.symlink_to("/etc")


def extra_checksums_below(path: Path) -> None:
    path.mkdir()
    (path / "checksums.json").write_text("{}")


@pytest.mark.parametrize(
    ("add", "part"),
    [
        (extra_file, "'extra.py' (a regular file)"),
        (os.mkfifo, "'extra.py' (a FIFO)"),
        (extra_link_to_a_folder, "'extra.py' (a link)"),
        (extra_checksums_below, "'extra.py/checksums.json' (a regular file)"),
    ],
)
@pytest.mark.parametrize("words", ["checkpoint verify {0}/final", "serve {0}/final --dry-run"])
def test_unlisted_files_are_reported(commands, workspace, words, add: Callable, part):
    add(workspace / "final" / "extra.py")
    refused(commands, Reader("extra.py", words), workspace, part)


def test_the_first_unlisted_files_are_named_and_the_rest_counted(commands, workspace):
    for number in range(9):
        (workspace / "final" / f"extra{number}").write_text("")
    reader = Reader("final", "checkpoint verify {0}/final")
    refused(commands, reader, workspace, "'extra0'", "'extra4'", "and 4 more")


# ── The Hugging Face cache ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def snapshot(workspace) -> Path:
    """The checkpoint as the hub's client lays it out."""
    entry = workspace / "models--me--mine"
    snapshot = entry / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    (workspace / "final" / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    for number, path in enumerate(sorted((workspace / "final").iterdir())):
        shutil.copy(path, entry / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_a_snapshot_of_the_hub_is_accepted_as_a_checkpoint(commands, snapshot):
    verified = commands.run("checkpoint", "verify", snapshot)
    assert verified.code == 0, verified.output
    assert "added by the hub: .gitattributes" in verified.output
    assert commands.run("serve", snapshot, "--dry-run").code == 0


@pytest.mark.parametrize(
    "kind", ["elsewhere", "another entry", "a blob that is a link", "snapshots"]
)
def test_a_snapshot_may_link_only_to_its_own_blobs(commands, snapshot, workspace, kind):
    link = snapshot / "dft.json"
    content = link.read_text()
    link.unlink()
    blobs = snapshot.parent.parent / "blobs"
    target = {
        "elsewhere": workspace / "secret",
        "another entry": workspace / "models--other--one" / "blobs" / "secret",
        "a blob that is a link": workspace / "secret",
        "snapshots": snapshot.parent / "other" / "secret",
    }[kind]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content)
    if kind == "a blob that is a link":
        (blobs / "linked").symlink_to(target)
        target = blobs / "linked"
    link.symlink_to(target)
    reader = Reader("dft.json", f"checkpoint verify {snapshot}")
    refused(commands, reader, workspace, "outside of")


def test_a_folder_that_only_looks_like_a_cache_may_not_link_to_blobs(tmp_path):
    """Any folder may be named `snapshots`."""
    for name in ("blobs", "snapshots/mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "blobs" / "secret").write_text("{}")
    link = tmp_path / "snapshots" / "mine" / "a.json"
    link.symlink_to("../../blobs/secret")
    with pytest.raises(FileError, match="outside of"):
        bounded_files.read_json(link, within=link.parent, largest=100)


def test_links_within_the_folder_are_followed(tmp_path):
    (tmp_path / "real.json").write_text("[1]")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.json").symlink_to("../real.json")
    (tmp_path / "folder").symlink_to(tmp_path)
    for path, within in (("below/a.json", "."), ("folder/real.json", "folder")):
        read = bounded_files.read_json(tmp_path / path, within=tmp_path / within, largest=100)
        assert read == [1]


# ── The readers themselves ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 99, 100])
def test_a_size_up_to_the_bound_is_read(tmp_path, size):
    (tmp_path / "x").write_bytes(b"x" * size)
    assert bounded_files.read_bytes(tmp_path / "x", largest=100) == b"x" * size
    (tmp_path / "x").write_bytes(b"x" * 101)
    with pytest.raises(FileError, match="got 101 bytes; accepted: at most 100 bytes"):
        bounded_files.read_bytes(tmp_path / "x", largest=100)


def test_a_file_that_grows_while_it_is_read_is_bounded():
    """A file in /proc reports a size of 0."""
    with pytest.raises(FileError, match="more than 10 bytes"):
        bounded_files.read_bytes("/proc/self/maps", largest=10)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "9223372036854775808", "1" * 5000])
def test_numbers_beyond_64_bits_are_refused(text):
    with pytest.raises(FileError, match=r"^w: .*got the number"):
        bounded_files.parse_json(f"[{text}]", "w")


@pytest.mark.parametrize("text", ["9223372036854775807", "-9223372036854775808", "1e308", "-0.0"])
def test_numbers_of_64_bits_are_read(text):
    assert bounded_files.parse_json(text, "w") == json.loads(text)


@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
def test_levels_up_to_the_bound_are_read(left, right):
    def nested(levels):
        return left * (levels - 1) + ("[]" if left == "[" else "{}") + right * (levels - 1)

    for levels in (1, 2, 63, 64):
        text = nested(levels)
        assert bounded_files.parse_json(text, "w") == json.loads(text)
    with pytest.raises(FileError, match="more than 64 levels"):
        bounded_files.parse_json(nested(65), "w")


def test_lines_are_bounded_individually_and_in_total(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"aa\nbb\ncc")
    assert list(bounded_files.lines(path, largest=8, longest=3)) == [b"aa\n", b"bb\n", b"cc"]
    with pytest.raises(FileError, match="line 1: got more than 2 bytes"):
        list(bounded_files.lines(path, largest=8, longest=2))
    with pytest.raises(FileError, match="accepted: at most 7"):
        list(bounded_files.lines(path, largest=7, longest=3))


def test_a_file_to_append_to_may_not_be_a_link(tmp_path):
    (tmp_path / "real").write_text("mine")
    (tmp_path / "log").symlink_to(tmp_path / "real")
    with pytest.raises(FileError, match="got a link"):
        bounded_files.open_growing(tmp_path / "log", largest=100)
    assert (tmp_path / "real").read_text() == "mine"


@pytest.mark.parametrize(
    "text", ["!!bool maybe", "!!timestamp x", "!!int x", "2001-99-99", "{[a]: b}"]
)
def test_invalid_yaml_is_reported_in_one_sentence(text):
    with pytest.raises(ValueError, match=r"^w: not YAML \(.*\); correct it there\.$"):
        settings.parse_yaml(text, "w")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\nb: 2\na: 3", "a", 3),
        ("a: {b: 1, c: {}, 'b': 2}", "b", 1),
        ("- x\n- a: 1\n  b:\n    1: x\n    1: y", "1", 5),
    ],
)
def test_a_key_that_a_mapping_has_twice_is_refused(text, key, line):
    with pytest.raises(ValueError, match=f"^w: got the key '{key}' again in line {line}; "):
        settings.parse_yaml(text, "w")


def test_mappings_may_share_keys():
    content = [{"a": 1, "b": {"a": 2}}, {"a": 3}]
    assert settings.parse_yaml("- {a: 1, b: {a: 2}}\n- {a: 3}", "w") == content


def test_weights_may_be_links_and_texts_may_not(tmp_path):
    """The content of a chat template gets into every prompt, and into what is saved."""
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    model.mkdir()
    elsewhere.write_text("{}")
    (model / "model.safetensors").symlink_to(elsewhere)
    model_folder.check_model_folder(model)
    (model / "chat_template.jinja").symlink_to(elsewhere)
    with pytest.raises(FileError, match=r"chat_template\.jinja: got a link to"):
        model_folder.check_model_folder(model)
