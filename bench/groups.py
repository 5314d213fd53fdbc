"""The benefit of groups on known sources: distinct valid answers among n, and correct votes.

    OMP_NUM_THREADS=1 python bench/groups.py
    OMP_NUM_THREADS=1 python bench/groups.py --model FOLDER    # and first words of a real model

A source is a tree of tokens whose leaves are answers, each with a known probability, valid or not.
Texts are drawn from it step by step through the law and the stage that an engine runs, as a group
and independently. They are compared with what can be computed: independent texts have, on average,

    Σ_a 1 − (1 − p_a)^n

distinct answers, and no method that draws n texts, each exactly from the source's distribution, has
more than Σ_a min(1, n·p_a).

The questions have answers that depend on how the text begins; the vote of n texts is right or
wrong. A real model continues beginnings of sentences; counted are distinct first words.

Shapes: R texts, V tokens, D steps of a text, N nodes of a tree.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from dftserve.sampling import Controls, Step, control_row, get_backend, transform_step
from dftserve.sampling.group import GroupCodes, GroupRow, first_code
from dftserve.spec import parse

from provenance import machine, versions

RESULT = Path(__file__).parent / "results" / "groups.json"

SIZES = (4, 8, 16)
V = 64
SPELLINGS = 8
"""Number of ways to write an answer, for sources with several."""
INVALID = 0.05
"""The share of texts that are not an answer."""
WHOLE = {"law": "guard", "min_p": 1e-12}
"""A law that cuts nothing here, so that the source is sampled unchanged."""
TREES = 40
QUESTIONS, VOTES = 200, 8
OPENING = 3
"""Steps, with four possible tokens each, that determine the distribution of the answer."""
FILLING = 6
"""Further such steps before the answer, which do not affect it."""
RESAMPLES = 2000


# ── Sources ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Source:
    """A tree: node 0 is the root, and each text has `steps` tokens."""

    log_p_NV: Tensor
    """float32; log-probabilities of the tokens at each node."""
    next_NV: Tensor
    """int64; the node after each token, or the answer after the last one, -1 for no answer."""
    steps: int
    share_A: np.ndarray
    """The probability of each valid answer."""


def source(shares: Sequence[float], spellings: int, seed: int) -> Source:
    """Answers with these shares, each with `spellings` equally likely spellings: an opening token
    that all texts share, then three random tokens."""
    random = np.random.default_rng(seed)
    share_A = np.array(shares) / sum(shares) * (1 - INVALID)
    spelled = [(a, share / spellings) for a, share in enumerate(share_A) for _ in range(spellings)]
    spelled += [(-1, INVALID / SPELLINGS)] * SPELLINGS
    codes = random.choice(V**3, size=len(spelled), replace=False)
    tree: dict[tuple[int, ...], dict[int, float]] = {}
    ends: dict[tuple[int, ...], int] = {}
    for (answer, share), code in zip(spelled, codes.tolist(), strict=True):
        tokens = (0, code // V**2, code // V % V, code % V)
        ends[tokens] = answer
        for depth, token in enumerate(tokens):
            node = tree.setdefault(tokens[:depth], {})
            node[token] = node.get(token, 0.0) + share
    nodes = {prefix: number for number, prefix in enumerate(tree)}
    log_p_NV = torch.full((len(nodes), V), -torch.inf)
    next_NV = torch.zeros((len(nodes), V), dtype=torch.int64)
    for prefix, number in nodes.items():
        for token, share in tree[prefix].items():
            log_p_NV[number, token] = math.log(share / sum(tree[prefix].values()))
            after = (*prefix, token)
            next_NV[number, token] = nodes[after] if after in nodes else ends[after]
    return Source(log_p_NV, next_NV, 4, share_A)


SHARES = {
    "16 equal answers": [1.0] * 16,
    "50 answers by Zipf's law": [1.0 / rank for rank in range(1, 51)],
    ".6 .2 .1 .05 .03 .02": [0.6, 0.2, 0.1, 0.05, 0.03, 0.02],
    "one of .9, 20 rare ones": [0.9, *[0.005] * 20],
}


# ── Drawing ──────────────────────────────────────────────────────────────────────────────────────


class Drawing:
    """Draws texts step by step as an engine would, in groups of n or independently."""

    def __init__(self, groups: int, size: int, *, bits: float | None, seed: int) -> None:
        """`bits`: how many bits of each code to use; None for independent texts."""
        self.rows = groups * size
        self._random = torch.Generator().manual_seed(seed)
        self._backend = get_backend("cpu")
        self._slots = self._backend.create_slots(self.rows, 1)
        row = control_row(parse(WHOLE), temperature=1.0, logits_divisor=1.0, stop_ids=frozenset())
        self._controls = Controls.stack([row] * self.rows)
        self._codes = GroupCodes(self.rows, 1, "cpu") if bits is not None else None
        for row in range(self.rows if self._codes else 0):
            code = first_code(f"{seed} {row // size}", row % size, size)
            self._codes.open(row, GroupRow(code=code, bits=bits, scale=1.0))
        self._at = 0

    def step(self, logits_RV: Tensor) -> Tensor:
        """The tokens of a step, int64 [R]."""
        slot_R = torch.arange(self.rows)
        at_R = torch.full_like(slot_R, self._at)
        step = Step(self._controls, slot_R, at_R, torch.zeros_like(slot_R, dtype=torch.int32))
        transform_step(logits_RV, step, self._slots, self._backend)
        if self._codes is not None:
            self._codes.draw(logits_RV, step, self.rows)
        self._at += 1
        return torch.multinomial(logits_RV.softmax(1), 1, generator=self._random)[:, 0]


def answers(trees: Sequence[Source], drawing: Drawing) -> np.ndarray:
    """The answer of each text, -1 for no answer; [tree, text]."""
    width = max(len(tree.log_p_NV) for tree in trees)
    missing = [width - len(tree.log_p_NV) for tree in trees]
    pad = torch.nn.functional.pad
    log_p_TNV = torch.stack(
        [pad(t.log_p_NV, (0, 0, 0, m)) for t, m in zip(trees, missing, strict=True)]
    )
    next_TNV = torch.stack(
        [pad(t.next_NV, (0, 0, 0, m)) for t, m in zip(trees, missing, strict=True)]
    )
    tree_R = torch.arange(len(trees)).repeat_interleave(drawing.rows // len(trees))
    node_R = torch.zeros(drawing.rows, dtype=torch.int64)
    for _ in range(trees[0].steps):
        token_R = drawing.step(log_p_TNV[tree_R, node_R])
        node_R = next_TNV[tree_R, node_R, token_R]
    return node_R.view(len(trees), -1).numpy()


# ── Distinct answers ─────────────────────────────────────────────────────────────────────────────


def distinct(name: str, spellings: int, size: int, groups: int) -> dict[str, Any]:
    """Means over trees with the same answers and different tokens; intervals are over the trees."""
    row: dict[str, Any] = {"source": name, "spellings": spellings, "n": size}
    share_A = source(SHARES[name], spellings, seed=0).share_A
    row["independent, computed"] = round(float((1 - (1 - share_A) ** size).sum()), 4)
    row["at most"] = round(float(np.minimum(1, size * share_A).sum()), 4)
    trees = [source(SHARES[name], spellings, seed=seed) for seed in range(TREES)]
    for way, bits in (("independent", None), ("group", math.log2(size))):
        found_TR = answers(trees, Drawing(groups, size, bits=bits, seed=size))
        of_trees = found_TR.reshape(TREES, -1, size).tolist()
        means = [np.mean([len(set(each) - {-1}) for each in of_tree]) for of_tree in of_trees]
        error = np.std(means, ddof=1) / math.sqrt(TREES)
        row[way] = {
            "distinct": round(float(np.mean(means)), 4),
            "interval": [round(float(np.mean(means) + z * error), 4) for z in (-1.96, 1.96)],
            "valid": round(float((found_TR >= 0).mean()), 4),
        }
    return row


# ── Votes ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Question:
    """A question with four answers, of which 0 is right. Their probabilities depend on how the text
    begins."""

    log_p_SV: Tensor
    """Log-probabilities of the tokens of each step before the answer."""
    log_p_WV: Tensor
    """Log-probabilities of the answers after each of the 4³ openings."""


def question(random: np.random.Generator, *, even: bool) -> Question:
    """A random question. The right answer is the likeliest in most questions, with other
    probabilities for each opening. The tokens of a step are equally likely if `even`."""
    right = random.beta(3.0, 3.5)
    others = random.dirichlet([0.7] * 3) * (1 - right)
    ways = random.dirichlet(4 * np.array([right, *others]) + 0.02, size=4**OPENING)
    steps = np.full((OPENING + FILLING, 4), 0.25)
    if not even:
        steps = random.dirichlet([2.0] * 4, size=OPENING + FILLING)
    return Question(_rows(steps, begin=8), _rows(ways, begin=0))


def _rows(p_R4: np.ndarray, begin: int) -> Tensor:
    log_p_RV = torch.full((len(p_R4), V), -torch.inf)
    log_p_RV[:, begin : begin + 4] = torch.from_numpy(np.log(np.maximum(p_R4, 1e-9))).float()
    return log_p_RV


def credit(asked: Sequence[Question], drawing: Drawing) -> np.ndarray:
    """For each question, the share of its groups in which the right answer has most votes; a tie
    of k answers counts 1/k."""
    question_R = torch.arange(len(asked)).repeat_interleave(drawing.rows // len(asked))
    steps_QSV = torch.stack([each.log_p_SV for each in asked])
    answers_QWV = torch.stack([each.log_p_WV for each in asked])
    way_R = torch.zeros(drawing.rows, dtype=torch.int64)
    for step in range(OPENING + FILLING):
        token_R = drawing.step(steps_QSV[question_R, step])
        if step < OPENING:
            way_R = 4 * way_R + token_R - 8
    answer_G8 = drawing.step(answers_QWV[question_R, way_R]).view(-1, VOTES).numpy()
    counts = np.stack([(answer_G8 == a).sum(axis=1) for a in range(4)], axis=1)
    most = counts.max(axis=1, keepdims=True)
    right_G = (counts[:, 0] == most[:, 0]) / (counts == most).sum(axis=1)
    return right_G.reshape(len(asked), -1).mean(axis=1)


WAYS = {"independent": None, "group": math.log2(VOTES), "group, 40 bits": 40.0}
"""Bits of the code that are used; the last one uses more than the group's size needs."""


def votes(groups: int, *, even: bool) -> dict[str, Any]:
    """Accuracy over questions; differences are paired by question."""
    asked = [question(np.random.default_rng(number), even=even) for number in range(QUESTIONS)]
    right = {
        way: credit(asked, Drawing(QUESTIONS * groups, VOTES, bits=bits, seed=7))
        for way, bits in WAYS.items()
    }
    return {
        "n": VOTES,
        "even_steps": even,
        "questions": QUESTIONS,
        "groups_each": groups,
        "accuracy": {way: round(float(each.mean()), 4) for way, each in right.items()},
        "difference": {
            way: paired(right[way] - right["independent"]) for way in WAYS if way != "independent"
        },
    }


def paired(difference: np.ndarray) -> dict[str, Any]:
    """Its mean and 95 % interval by bootstrap."""
    draws = np.random.default_rng(0).choice(difference, size=(RESAMPLES, len(difference)))
    low, high = np.percentile(draws.mean(axis=1), [2.5, 97.5])
    interval = [round(float(low), 4), round(float(high), 4)]
    return {"value": round(float(difference.mean()), 4), "interval": interval}


# ── A real model ─────────────────────────────────────────────────────────────────────────────────

BEGINNINGS = (
    "Her favourite colour was",
    "The only animal that he kept was a",
    "She had come there from a country called",
    "On the table lay a single fruit, a",
    "After school he learnt to play the",
    "By profession she was a",
    "They spent the winter in the city of",
    "The boy's name was",
    "On Sundays they all played",
    "The village lay on the river",
    "For dinner there was",
    "The scientist whom she admired most was",
)
"""Plain text that many words may continue, mostly determined by one token."""
LONGEST = 4
"""Tokens of a continuation; only its first word is counted."""


def real(folder: str, repeats: int) -> dict[str, Any]:
    """Distinct first words among 8 continuations, at `diversity` .5."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

    from dftserve.hf import DiversityProcessor, sampling

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = sampling(max_new_tokens=LONGEST, num_return_sequences=8)
    found: dict[str, list[int]] = {"independent": [], "group": []}
    mode: list[float] = []
    for text in BEGINNINGS:
        prompt = tokenizer(text, return_tensors="pt")
        begin, all_words = prompt["input_ids"].shape[1], []
        for way, repeat in ((w, r) for r in range(repeats) for w in found):
            asked = {"level": 0.5, **({"group": True} if way == "group" else {})}
            processor = DiversityProcessor(asked, stop_ids=tokenizer.eos_token_id, seed=repeat)
            torch.manual_seed(repeat)
            texts = model.generate(
                **prompt,
                generation_config=config,
                logits_processor=LogitsProcessorList([processor]),
            )
            continuations = tokenizer.batch_decode(texts[:, begin:], skip_special_tokens=True)
            words = [first_word(each) for each in continuations]
            all_words += words
            found[way].append(len(set(words)))
        mode.append(Counter(all_words).most_common(1)[0][1] / len(all_words))
    pairs = np.array(found["group"]) - np.array(found["independent"])
    return {
        "model": Path(folder).name,
        "n": 8,
        "diversity": 0.5,
        "beginnings": len(BEGINNINGS),
        "repeats": repeats,
        "distinct": {way: round(float(np.mean(each)), 3) for way, each in found.items()},
        "difference": paired(pairs),
        "share_of_the_commonest": round(float(np.mean(mode)), 3),
    }


def first_word(text: str) -> str:
    return next(iter(re.findall(r"\w+", text.lower())), "")


# ── The result ───────────────────────────────────────────────────────────────────────────────────


def shown(rows: Sequence[dict[str, Any]]) -> str:
    names = ["independent, computed", "at most"]
    lines = []
    for row in rows:
        computed = "  ".join(f"{row[name]:6.2f}" for name in names)
        drawn = "  ".join(f"{row[way]['distinct']:6.2f}" for way in ("independent", "group"))
        head = f"{row['source']:<26} {row['spellings']:>2} {row['n']:>3}"
        lines.append(f"{head}  {computed}  {drawn}")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--groups", default=2000, show_default=True, help="Groups of each source and n.")
@click.option("--vote-groups", default=25, show_default=True, help="Groups of each question.")
@click.option("--model", help="A folder with a model, for the first words.")
@click.option("--repeats", default=4, show_default=True, help="Groups of each beginning.")
@click.option("--out", type=Path, default=RESULT, show_default=False)
def main(groups: int, vote_groups: int, model: str | None, repeats: int, out: Path) -> None:
    settings = [(name, s, n) for name in SHARES for s in (1, SPELLINGS) for n in SIZES]
    rows = [distinct(name, spellings, size, groups) for name, spellings, size in settings]
    click.echo(shown(rows))
    voted = [votes(vote_groups, even=even) for even in (False, True)]
    click.echo(json.dumps(voted))
    before = json.loads(out.read_text()) if out.exists() else {}
    document = {
        "what": "distinct answers and votes of groups beside independent texts",
        "machine": machine(),
        "versions": versions("transformers"),
        "groups": groups,
        "invalid": INVALID,
        "rows": rows,
        "votes": voted,
        "first_words": before.get("first_words"),
    }
    out.write_text(json.dumps(document, indent=1) + "\n")
    if model is not None:
        document["first_words"] = real(model, repeats)
        out.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps(document))


if __name__ == "__main__":
    main()
