"""The blind test: the page as a browser reads it, and the verdict against direct sums."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from dftserve.evaluate.preference.human_test import (
    QUESTIONS,
    judgments_needed,
    p_equivalent,
    page,
    verdict,
)
from dftserve.evaluate.preference.pairs import Pair

PAIRS = [Pair(f"prompt {i}", f"system {i}", f"human {i}") for i in range(6)]


class Reader(HTMLParser):
    """What a browser parses: tags with their attributes, scripts, and the text outside of them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.words, self._open = [], [], [], None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)


def make_page(folder, pairs=PAIRS, seed=1, **options):
    """Make a page; return its HTML, its data and its key."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "blind.html"
    page(pairs, out, **{"seed": seed, "title": "Stories"} | options)
    html = out.read_text(encoding="utf-8")
    data = json.loads(Reader(html).scripts[0])
    return html, data, json.loads((folder / "blind.html.key.json").read_text())


# ── The page ─────────────────────────────────────────────────────────────────────────────────────


def test_page_and_key_match_and_contain_every_pair(tmp_path):
    _, data, key = make_page(tmp_path)
    assert data["id"] == key["page"]
    assert data["ask"] == QUESTIONS["person"]
    assert {trial["id"] for trial in data["trials"]} == set(key["human"])
    pairs = {
        (
            trial["prompt"],
            trial["texts"][1 - key["human"][trial["id"]]],
            trial["texts"][key["human"][trial["id"]]],
        )
        for trial in data["trials"]
    }
    assert pairs == {(pair.prompt, pair.system, pair.human) for pair in PAIRS}


def test_the_page_does_not_reveal_the_key(tmp_path):
    """Swapped roles give the same pages with opposite keys."""

    def pages(name, pair):
        positions_by_page = {}
        for seed in range(20):
            html, _, key = make_page(tmp_path / f"{name} {seed}", [pair], seed)
            (position,) = key["human"].values()
            positions_by_page.setdefault(html, set()).add(position)
        return positions_by_page

    one = pages("one", Pair("p", "x", "y"))
    other = pages("other", Pair("p", "y", "x"))
    assert len(one) == 2
    assert one.keys() == other.keys()
    for html, positions in one.items():
        assert len(positions) == 1
        assert other[html] == {1 - position for position in positions}


def test_sides_and_order_are_drawn_by_the_seed(tmp_path):
    """400 sides: outside 200 ± 60 with probability 2e-9."""
    many = [Pair(f"p{i}", f"s{i}", f"h{i}") for i in range(400)]
    html, data, key = make_page(tmp_path / "a", many)
    assert abs(sum(key["human"].values()) - 200) <= 60
    assert [trial["prompt"] for trial in data["trials"]] != [pair.prompt for pair in many]
    assert make_page(tmp_path / "b", many)[0] == html
    assert make_page(tmp_path / "c", many, seed=2)[0] != html


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "a & b &lt; c",
    "__DATA__ __TITLE__ \\1",
    "line\u2028separator \U0001f600 é",
    "two\n\nparagraphs \\u003c",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_and_title_are_not_read_as_markup(tmp_path, text):
    html, data, _ = make_page(tmp_path, [Pair(text, text + "1", text + "2")], title=text)
    plain = make_page(tmp_path / "plain", [Pair("a", "b", "c")])[0]
    assert data["trials"][0]["prompt"] == text
    assert sorted(data["trials"][0]["texts"]) == [text + "1", text + "2"]
    assert Reader(html).tags == Reader(plain).tags
    assert "".join(Reader(html).words).count(text) == 2  # <title> and <h1>
    assert Reader(html).scripts[1] == Reader(plain).scripts[1]


def test_the_page_loads_no_other_resource(tmp_path):
    html = make_page(tmp_path)[0]
    for tag, attrs in Reader(html).tags:
        assert tag not in ("link", "img", "iframe", "base")
        assert not {"src", "href", "srcset"} & attrs.keys()
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", html)
    assert "default-src 'none'" in html


def test_an_existing_page_is_not_overwritten(tmp_path):
    html = make_page(tmp_path)[0]
    with pytest.raises(FileExistsError, match=r"blind\.html exists"):
        make_page(tmp_path, seed=2)
    (tmp_path / "blind.html").unlink()
    with pytest.raises(FileExistsError, match=r"key\.json exists"):
        make_page(tmp_path, seed=2)
    assert make_page(tmp_path / "new")[0] == html


@pytest.mark.parametrize(
    ("pairs", "question", "message"),
    [
        ([], "person", "pairs: got none"),
        ([Pair("p", "s", " ")], "person", r"pairs\[0\]"),
        ([PAIRS[0], Pair("p", "same", "same ")], "person", r"pairs\[1\]"),
        (PAIRS, "persons", "did you mean 'person'"),
    ],
)
def test_invalid_pairs_and_questions_are_refused(tmp_path, pairs, question, message):
    with pytest.raises(ValueError, match=message):
        make_page(tmp_path, pairs, question=question)
    assert not list(tmp_path.iterdir())


# ── In a stand-in for a browser ──────────────────────────────────────────────────────────────────

BROWSER = """
const fs = require("fs"), vm = require("vm");
const [data, script, keys] = JSON.parse(fs.readFileSync(0, "utf8"));
const stored = {}, saved = [], seen = [];
function open() {
  const elements = {}, listeners = {};
  const element = (id) => (elements[id] ||= {
    textContent: id === "page" ? data : "", hidden: false, on: {},
    addEventListener(what, then) { this.on[what] = then; }, click() {},
  });
  const document = {
    getElementById: element, createElement: () => element("link"),
    addEventListener: (what, then) => { listeners[what] = then; },
  };
  const URL = { createObjectURL: (blob) => { saved.push(blob.content); return "blob:"; },
                revokeObjectURL() {} };
  class Blob { constructor(parts) { this.content = parts.join(""); } }
  const localStorage = { getItem: (k) => stored[k] ?? null, setItem: (k, v) => { stored[k] = v; } };
  const window = { scrollTo() {} };
  vm.runInNewContext(script, { document, URL, Blob, localStorage, window,
    crypto: require("crypto").webcrypto, Uint32Array });
  return { element, press: (key, more) => listeners.keydown({ key, ...more }) };
}
let tab = open();
for (const key of keys) {
  if (key === "reload") { tab = open(); continue; }
  seen.push(["prompt", "left", "right", "question"].map((id) => tab.element(id).textContent));
  if (key.startsWith("click ")) tab.element(key.slice(6)).on.click();
  else tab.press(key, { repeat: key === "2" && seen.length === 1 });
}
tab.element("download").on.click();
const shows = (id) => !tab.element(id).hidden;
console.log(JSON.stringify({ seen, done: shows("done"), trial: shows("trial"),
  progress: tab.element("progress").textContent, answers: JSON.parse(saved[0]) }));
"""


def run_page(html, keys):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine to run the page's script")
    stdin = json.dumps([*Reader(html).scripts, keys])
    done = subprocess.run(
        [node, "-e", BROWSER], input=stdin, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_the_verdict_counts_what_a_judge_saw_and_pressed(tmp_path):
    """Keys, buttons and a reload; a key that is held down has no effect."""
    html = make_page(tmp_path, question="preference")[0]
    keys = ["2", "x", "1", "ArrowRight", "reload", "click choose-left", "2", "ArrowLeft", "1", "2"]
    sides = ["left", "right", "left", "right", "left", "left"]
    session = run_page(html, keys)
    assert session["progress"] == "6 of 6"
    assert (session["done"], session["trial"]) == (True, False)
    # Neither the held key nor the unknown one is an answer: the first trial is seen three times.
    seen = session["seen"][2:8]
    assert session["seen"][0] == session["seen"][1] == seen[0]
    assert {prompt for prompt, *_ in seen} == {pair.prompt for pair in PAIRS}
    assert {question for *_, question in seen} == {"Which do you prefer?"}
    human = sum(
        (left if side == "left" else right).startswith("human")
        for side, (_, left, right, _) in zip(sides, seen, strict=True)
    )
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(session["answers"]))
    result = verdict([file], tmp_path / "blind.html.key.json")
    assert (result.judgments, result.trials, result.judges) == (6, 6, 1)
    assert result.human == human
    assert result.left == pytest.approx(4 / 6)
    assert result.question == "preference"


def test_every_judge_gets_a_different_order_and_sides(tmp_path):
    """Six judges get the same order of six trials with probability 720⁻⁵."""
    html = make_page(tmp_path)[0]
    sessions = [run_page(html, ["1"] * 6) for _ in range(6)]
    assert len({json.dumps(each["seen"]) for each in sessions}) > 1
    assert len({each["answers"]["judge"] for each in sessions}) == 6
    sides = [tuple(answer["shown"]) for each in sessions for answer in each["answers"]["answers"]]
    assert set(sides) == {(0, 1), (1, 0)}


# ── The verdict ──────────────────────────────────────────────────────────────────────────────────


def answers(folder, key, rows, judge="j1", name=None, **changed):
    """Write a file of answers; `rows` are (trial, whether the human text is chosen)."""
    entries = []
    for number, (trial, is_human) in enumerate(rows):
        chosen = key["human"][trial] if is_human else 1 - key["human"][trial]
        shown = [0, 1] if number % 2 else [1, 0]
        side = "left" if shown[0] == chosen else "right"
        entries.append({"trial": trial, "shown": shown, "answer": side, "seconds": number + 0.5})
    file = folder / (name or f"{judge}.json")
    file.write_text(json.dumps({"page": key["page"], "judge": judge, "answers": entries} | changed))
    return file


def outcome(tmp_path, chosen, **options):
    """The verdict on these judgments of many trials, by three judges in turn."""
    many = [Pair(f"p{i}", f"s{i}", f"h{i}") for i in range(len(chosen))]
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    _, data, key = make_page(folder, many)
    rows = [(trial["id"], is_human) for trial, is_human in zip(data["trials"], chosen, strict=True)]
    files = [answers(folder, key, rows[i::3], judge=f"j{i}") for i in range(3)]
    return verdict(files, folder / "blind.html.key.json", **options)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.booleans(), min_size=3, max_size=60))
def test_the_verdict_equals_direct_sums(tmp_path, chosen):
    result = outcome(tmp_path, chosen)
    n, k = len(chosen), sum(chosen)
    chance = [math.comb(n, i) / 2**n for i in range(n + 1)]
    assert (result.judgments, result.human, result.judges) == (n, k, 3)
    assert result.share.value == k / n
    z = stats.norm.ppf(0.975)
    centre = (k + z**2 / 2) / (n + z**2)
    reach = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    assert result.share.low == pytest.approx(centre - reach, abs=1e-9)
    assert result.share.high == pytest.approx(centre + reach, abs=1e-9)
    rare = sum(p for p in chance if p <= chance[k] * (1 + 1e-7))
    assert result.p_half == pytest.approx(min(1, rare))
    assert result.p_equivalent == pytest.approx(direct_p(k, n, 0.1))
    assert result.equivalent == (result.p_equivalent < 0.05)
    assert json.loads(result.as_json()) == json.loads(
        json.dumps(asdict(result) | {"equivalent": result.equivalent})
    )


def direct_p(k, n, margin):
    """The larger p of both one-sided tests, by summing the binomial's terms."""

    def term(i, p):
        return math.comb(n, i) * p**i * (1 - p) ** (n - i)

    above = sum(term(i, 0.5 - margin) for i in range(k, n + 1))
    below = sum(term(i, 0.5 + margin) for i in range(k + 1))
    return max(above, below)


@given(st.integers(1, 300), st.data(), st.floats(0.01, 0.45))
def test_equivalence_is_symmetric_and_best_at_half(n, data, margin):
    k = data.draw(st.integers(0, n))
    assert p_equivalent(k, n, margin) == pytest.approx(p_equivalent(n - k, n, margin), rel=1e-9)
    assert p_equivalent(n // 2, n, margin) <= p_equivalent(k, n, margin) * (1 + 1e-9)
    assert p_equivalent(k, n, margin) >= p_equivalent(k, n, min(margin + 0.02, 0.49)) * (1 - 1e-9)


@pytest.mark.parametrize(("margin", "level", "power"), [(0.1, 0.05, 0.8), (0.2, 0.01, 0.9)])
def test_the_power_is_reached_from_the_judgments_needed_and_not_before(margin, level, power):
    def exact(n):
        return sum(
            math.comb(n, k) / 2**n
            for k in range(n // 4, n - n // 4 + 1)
            if p_equivalent(k, n, margin) < level
        )

    needed = judgments_needed(margin, level, power)
    assert exact(needed - 1) < power
    assert all(exact(n) >= power for n in range(needed, needed + 40))


def test_the_judgments_needed_at_ten_points():
    """Exact; the normal approximation gives 215 and 271."""
    assert judgments_needed(0.10, 0.05, 0.8) == 227
    assert judgments_needed(0.10, 0.05, 0.9) == 281


def test_the_test_keeps_its_level_and_its_power():
    """At a share on the margin's edge parity is found in at most 5 %, at 1/2 in at least 80 %, by
    simulation: 20,000 draws, each bound missed by 5 standard errors with probability 3e-7."""
    n = judgments_needed(0.10, 0.05, 0.8)
    source, draws = np.random.default_rng(4), 20_000
    is_equivalent = np.array([p_equivalent(k, n, 0.10) < 0.05 for k in range(n + 1)])
    for share, low, high in ((0.4, 0, 0.05), (0.6, 0, 0.05), (0.5, 0.8, 1)):
        rate = is_equivalent[source.binomial(n, share, draws)].mean()
        assert low - 5 * math.sqrt(0.16 / draws) <= rate <= high + 5 * math.sqrt(0.0475 / draws)


def test_parity_is_reported_only_where_it_is_shown(tmp_path):
    few = outcome(tmp_path, [True, False] * 10)
    assert not few.equivalent
    assert "not shown to be within 10 points" in few.render()
    assert any("20 judgments; 227 are needed" in each for each in few.warnings)
    many = outcome(tmp_path, [True, False] * 140)
    assert many.equivalent
    assert many.warnings == ()
    assert "\nwithin 10 points" in many.render()
    different = outcome(tmp_path, [True] * 180 + [False] * 100)
    assert not different.equivalent
    assert different.p_half < 1e-5


def test_a_judge_who_gives_most_judgments_causes_a_warning(tmp_path):
    _, data, key = make_page(tmp_path)
    rows = [(trial["id"], True) for trial in data["trials"]]
    file = tmp_path / "blind.html.key.json"
    three = answers(tmp_path, key, rows[:3], judge="a")
    assert any("judge a gave 3 of 3" in each for each in verdict([three], file).warnings)
    half = answers(tmp_path, key, rows[3:6], judge="b")
    assert len(verdict([three, half], file).warnings) == 1  # Too few judgments.


def test_trials_that_several_people_judged_cause_a_warning(tmp_path):
    """Whether a text is chosen depends on the text, so judgments of one pair are alike: of 30
    trials, 8 judges and shares of the trials that vary by .2 around 1/2, p is below .05 in 16 %."""
    _, data, key = make_page(tmp_path)
    rows = [(trial["id"], True) for trial in data["trials"]]
    file = tmp_path / "blind.html.key.json"
    first, second = (answers(tmp_path, key, rows[:3], judge=judge) for judge in "ab")
    found = verdict([first, second], file).warnings
    assert any("6 judgments of 3 trials" in each for each in found)
    other = answers(tmp_path, key, rows[3:6], judge="b")
    assert not any("judgments of" in each for each in verdict([first, other], file).warnings)


def test_foreign_repeated_and_invalid_answers_are_refused(tmp_path):
    _, data, key = make_page(tmp_path)
    key_file = tmp_path / "blind.html.key.json"
    rows = [(trial["id"], True) for trial in data["trials"]]
    good = answers(tmp_path, key, rows[:2])
    again = answers(tmp_path, key, rows[1:3], name="again.json")
    foreign = answers(tmp_path, key, rows, name="foreign.json", page="0123")
    empty = answers(tmp_path, key, [], name="empty.json")

    def refused(files, message, key_file=key_file):
        with pytest.raises(ValueError, match=message):
            verdict(files, key_file)

    refused([good, again], f"again.json: got trial {rows[1][0]} by judge j1 again")
    refused([good, good], "again, after")
    refused([good, foreign], "answers to the page 0123")
    refused([empty], "answers: got none")
    refused([], "answers: got none")
    refused([good], "not JSON", tmp_path / "blind.html")
    refused([key_file], "got the keys 'question'")
    refused([good], "got the keys 'judge'", good)
    for name, value, message in (
        ("trial", "0123", "the trial '0123', which is not in the key"),
        ("shown", [0, 0], r"shown: got \[0, 0\]"),
        ("answer", "human", "answer: got 'human'"),
        ("seconds", -1, "seconds: got -1"),
        ("seconds", "long", r"answers\[0\].seconds"),
    ):
        content = json.loads(good.read_text())
        content["answers"][0][name] = value
        changed = tmp_path / "changed.json"
        changed.write_text(json.dumps(content))
        refused([changed], message)
    for wrong in ({"margin": 0.5}, {"margin": 0}, {"level": 0.5}, {"level": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
            verdict([good], key_file, **wrong)
