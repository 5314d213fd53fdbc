"""Writes the tables of the README and of docs/ from bench/results.

    python bench/report.py

A table is placed between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu_table
import headline_table
import laws_table
import soak_table
from cells import TOO_SHORT, change, interval, left_out, percent, table

import client_table
from ratios import shown

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


def main() -> None:
    for name in TABLES:
        if name in OPTIONAL and not (RESULTS / f"{RESULT_OF.get(name, name)}.json").exists():
            continue
        place = ROOT / PLACES.get(name, "README.md")
        place.write_text(written(place.read_text(), name))


def written(text: str, name: str) -> str:
    """The document `text` with the table made from the current results.

    Raises:
        ValueError: the document has no markers for that table.
    """
    document = json.loads((RESULTS / f"{RESULT_OF.get(name, name)}.json").read_text())
    mark = f"<!-- table: {name} -->"
    pattern = re.compile(rf"({mark}\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the document has no marker for the table {name!r}: {mark}")
    made = TABLES[name](document)
    return pattern.sub(lambda match: f"{match[1]}{made}\n{match[2]}", text)


def overhead(document: dict[str, Any]) -> str:
    ways = {
        "no field": "no field",
        "field on a tenth": "tenth",
        "on every request": "field",
        "min-p and temperature": "min_p",
        "law written plainly": "naive",
        "qr-sampler's law": "peer",
    }
    rows = [
        ((row["vocabulary"], row["batch"]), [row[way] for way in ways.values()])
        for row in document["rows"]
    ]
    threads, pairs = document["machine"]["threads"], document["pairs"]
    caption = (
        f"`bench/overhead.py`: {threads} {'thread' if threads == 1 else 'threads'}, {pairs} rounds "
        "of each variant, in turns; throughput over stock vLLM's; 95 % intervals."
    )
    return ratios(["vocabulary", "batch", *ways], rows, caption)


def served(document: dict[str, Any]) -> str:
    """Throughput over HTTP."""
    ways = {
        "no field": "no field",
        "field on a tenth": "tenth",
        "on every request": "field",
        "min-p and temperature": "min_p",
        "qr-sampler's law": "peer",
    }
    rows = [
        (
            (row["vocabulary"], row["concurrency"]),
            [row["throughput"][way] for way in ways.values()],
        )
        for row in document["rows"]
    ]
    return ratios(["vocabulary", "concurrent requests", *ways], rows)


def real_cost(document: dict[str, Any]) -> str:
    """Throughput and time to the first token of a real model, by number of concurrent requests."""
    ways = {
        "no field": "no field",
        "`gated` 1": "gated",
        "`words` 1": "words",
        "min-p .02, T 1.3": "min_p",
        "top-p .95": "top_p",
    }
    measured = {"throughput": "throughput", "first token after": "first_token"}
    rows = [
        [label, str(row["requests"]), *(shown(row[key][way]) for way in ways.values())]
        for label, key in measured.items()
        for row in document["rows"]
    ]
    caption = (
        f"`bench/real_cost.py`: SmolLM2-135M-Instruct in one engine; {document['pairs']} rounds of "
        f"each variant, in turns, with {document['tokens']} tokens per answer; medians of the "
        "ratios to stock vLLM. For throughput higher is better, for the time to the first token "
        "lower."
    )
    return table(f"| | requests | {' | '.join(ways)} |", rows, caption)


def sampler(document: dict[str, Any]) -> str:
    """The time of our transform over that of a copy, and of the other variants over ours."""
    ways = {"plain law": "naive", "vLLM's sampler step": "sampler", "qr-sampler's law": "peer"}
    rows = [
        (
            (row["vocabulary"], row["rows"]),
            [row["ours_to_copy"], *(row["to_ours"][way] for way in ways.values())],
        )
        for row in document["rows"]
        if row["rows"] in (1, 64)
    ]
    return ratios(["vocabulary", "rows", "ours / a copy", *ways], rows)


def ratios(
    head: list[str],
    rows: list[tuple[tuple[int, int], list[dict[str, Any]]]],
    caption: str | None = None,
) -> str:
    """A table of ratios, with a row for each (vocabulary, count)."""
    cells = ([f"{size:,}", str(count), *map(shown, found)] for (size, count), found in rows)
    return table(f"| {' | '.join(head)} |", cells, caption)


def real(document: dict[str, Any]) -> str:
    """People's stories and a real model's, with selected settings, the most errors first."""
    columns = {name: STORY_COLUMNS[name] for name in ("errors", "AI phrases", "self-BLEU", "SDS")}
    rows = {name: document["rows"][name] for name in IN_README}
    return stories(columns, rows, story_caption(document))


def every_setting(document: dict[str, Any]) -> str:
    return stories(STORY_COLUMNS, document["rows"], f"{story_caption(document)} {TOO_SHORT}")


IN_README = (
    "people",
    "stock, T 1",
    "min-p .02, T 1.3",
    "top-nσ 1, T 1.5",
    "`gated` 1",
    "`words` 1",
    "`gated` .5",
    "stock, T .7",
    "stock, T .2",
)


def stories(
    columns: dict[str, Callable[[dict[str, Any]], str]], rows: dict[str, Any], caption: str
) -> str:
    """A table with people's row first, then the most errors first."""
    lines = []
    for name in sorted(rows, key=lambda n: (n != "people", -rows[n]["errors"]["value"])):
        label = re.sub(r"`(\w+)` ([\d.]+)", r"`diversity` \2, law `\1`", name)
        lines.append([label, *(cell(rows[name]) for cell in columns.values())])
    return table(f"| | {' | '.join(columns)} |", lines, caption)


def story_caption(document: dict[str, Any]) -> str:
    count = document["prompts"] * document["answers_to_each"]
    return (
        f"`bench/real.py`: SmolLM2-135M-Instruct, {count} answers per row ({document['prompts']} "
        f"story prompts, {document['answers_to_each']} each, at most {document['max_tokens']} "
        "tokens, float32), and people's stories; 95 % intervals. Errors: marks of a grammar "
        "checker per 100 words, without names; AI phrases per 1,000 words; self-BLEU between "
        "answers to different prompts, lower is more varied; SDS (Style Diversity Score) within "
        "prompts, 100 is as varied in style as people."
    )


MEASURED = {
    "errors": ("errors", 2),
    "AI phrases": ("phrases", 1),
    "self-BLEU": ("self_bleu", 1),
    "style distance": ("style", 3),
    "SDS": ("sds", 0),
}
"""By column, the key of its result and how many digits it is shown with."""


def cell_of(key: str, digits: int) -> Callable[[dict[str, Any]], str]:
    return lambda row: interval(row[key], digits)


STORY_COLUMNS = {name: cell_of(*shown_as) for name, shown_as in MEASURED.items()} | {
    "too short": left_out
}


def words(document: dict[str, Any]) -> str:
    """Both laws and their rivals on prompts that neither was tuned on, the most errors first."""
    essays, followed = document["other_essays"]["rows"], document["ifeval"]["rows"]
    questions = document["mmlu"]["rows"]
    measured = {"errors": 2, "unknown": 2, "self_bleu": 1}
    shares = {"followed": followed, "right": questions, "unreadable": questions}
    lines = []
    named = {**essays, **followed, **questions}
    for name in sorted(named, key=lambda n: -essays.get(n, NOTHING)["errors"]["value"]):
        cells = [
            interval(essays[name][key], digits) if name in essays else ""
            for key, digits in measured.items()
        ]
        cells += [percent(rows[name][key]) if name in rows else "" for key, rows in shares.items()]
        lines.append([name, *cells])
    first, others, ifeval = document["essays"], document["other_essays"], document["ifeval"]
    caption = (
        f"`bench/words.py`: SmolLM2-135M-Instruct; {others['prompts']} essay prompts, "
        f"{others['answers_to_each']} answers each; IFEval: the share of {ifeval['prompts']} "
        "prompts all of whose instructions were followed; MMLU: shares of "
        f"{document['mmlu']['questions']} questions in a chat, with one answer each. Errors and "
        f"unknown words per 100 words; 95 % intervals. {first['prompts']} other essay prompts "
        f"({first['answers_to_each']} answers each) were measured before and did not settle which "
        "law should be the default; the prompts shown here were added after that, and the decision "
        f"is based on them alone. Differences in errors: {_differences(others['against'])}."
    )
    head = "| | errors | unknown words | self-BLEU | IFEval | MMLU right | MMLU unreadable |"
    return table(head, lines, caption)


NOTHING = {"errors": {"value": 0.0}}
PAIRS = (
    ("`words` 1", "min-p .02, T 1.3"),
    ("`gated` 1", "min-p .02, T 1.3"),
    ("`words` 1", "`gated` 1"),
)
"""Settings of essays whose errors are compared."""


def _differences(against: dict[str, Any]) -> str:
    """Errors of one setting minus those of another, on the same prompts."""
    found = [(one, other, against[one][other]["errors"]) for one, other in PAIRS]
    return "; ".join(
        f"{one} minus {other} {each['value']:+.2f} [{each['low']:+.2f}, {each['high']:+.2f}], "
        f"p {each['p']:.3f}"
        for one, other, each in found
    )


def variety(document: dict[str, Any]) -> str:
    """Eight answers to an open prompt, the fewest meanings first."""
    measured = {"distinct": 2, "alike": 3, "openings": 3, "self_bleu": 1, "errors": 2}
    rows = document["rows"]
    lines = [
        [name, *(interval(rows[name][key], digits) for key, digits in measured.items())]
        for name in sorted(rows, key=lambda n: rows[n]["distinct"]["value"])
    ]
    caption = (
        f"`bench/variety.py`: SmolLM2-135M-Instruct, {document['answers_to_each']} answers of at "
        f"most {document['max_tokens']} tokens to each of {document['prompts']} prompts of "
        "NoveltyBench. Two answers have the same meaning if their cosine by a sentence encoder "
        f"({document['encoder']}) is at least {document['same_meaning']}. Same opening: pairs that "
        "begin with the same three words. Errors per 100 words; 95 % intervals."
    )
    head = "| | meanings of 8 | mean cosine | same opening | self-BLEU | errors |"
    return table(head, lines, caption)


def prompted(document: dict[str, Any]) -> str:
    """How many answers have the form that each prompt for variety asks for, by setting."""
    followed = document["followed"]
    settings = list(dict.fromkeys(name.partition(", ")[2] for name in followed))
    ways = {"verbalised": "verbalised sampling", "seed": "string seed of thought"}
    rows = (
        [label, *(percent(followed[f"{way}, {setting}"]) for setting in settings)]
        for way, label in ways.items()
    )
    caption = (
        f"`bench/prompted.py`: SmolLM2-135M-Instruct, one answer of at most "
        f"{document['max_tokens']} tokens to each of {document['prompts']} prompts of "
        "NoveltyBench within each prompt; 95 % intervals."
    )
    return table(f"| answers in the form asked for | {' | '.join(settings)} |", rows, caption)


def long_texts(document: dict[str, Any]) -> str:
    """The first and the last fifth of long texts, and the change between them, by setting."""
    named = {"errors": "errors", "unknown": "unknown words", "repeated": "repeated"}
    digits = {"errors": 2, "unknown": 2, "repeated": 3}
    columns = [f"{name}: {part}" for name in named.values() for part in ("first", "last", "change")]

    def cells(row: dict[str, Any]) -> Iterator[str]:
        for key in named:
            yield interval(row["1"][key], digits[key])
            yield interval(row["5"][key], digits[key])
            yield change(row["change"][key], digits[key])

    rows = ([setting, *cells(row)] for setting, row in document["rows"].items())
    caption = (
        f"`bench/long_texts.py`: SmolLM2-135M-Instruct, one text of exactly {document['tokens']:,} "
        f"tokens to each of {document['prompts']} story prompts; first and last fifth of each "
        "text. Errors and unknown words per 100 words; repeated: the share of runs of four words "
        "that occur earlier in the same text; 95 % intervals."
    )
    return table(f"| | {' | '.join(columns)} |", rows, caption)


def forms(document: dict[str, Any]) -> str:
    """Shares of answers that keep a form or language, by setting."""
    named = list(document["tasks"])
    rows = (
        [name, *(percent(row[form]["kept"]) for form in named)]
        for name, row in document["rows"].items()
    )
    caption = (
        "`bench/forms.py`: SmolLM2-135M-Instruct; the share of answers (20 per cell, cut after 128 "
        "tokens) that by rule keep the form or language of the prompt; 95 % intervals."
    )
    return table(f"| | {' | '.join(named)} |", rows, caption)


def first_law(document: dict[str, Any]) -> str:
    """Stock, top-p and three levels of the field, on the well-trained stage."""
    constants = document["constants"]["in_force"]
    count = document["sequences_per_setting"]["confirm"]
    caption = (
        f"`bench/first_law.py`, a story grammar and a small model of it, on prompts that were not "
        f"used to choose the constants (c = {constants['strength']:g}); 95 % intervals. Variety is "
        "the entropy of the free choices in valid stories, as a share of uniform."
    )
    return _stories(document["confirm"]["well-trained"]["settings"], SHOWN, count, caption)


def _stories(
    rows: Sequence[dict[str, Any]],
    shown: Sequence[tuple[str, str, str]],
    count: int,
    caption: str,
) -> str:
    """
    Args:
        shown: (label, family, part of the name) of each setting to show.
        count: stories for each setting.
    """
    lines = []
    for name, family, part in shown:
        row = next(r for r in rows if r["family"] == family and part in r["setting"])
        lines.append([name, *(estimated(row[key], unit) for key, unit in COLUMNS)])
    head = f"| {count:,} stories each | valid | distinct and valid per 1,000 | variety of choices |"
    return table(head, lines, caption)


def estimated(interval: dict[str, float], unit: float) -> str:
    estimate, low, high = (round(unit * interval[key]) for key in ("estimate", "low", "high"))
    sign = " %" if unit == 100 else ""
    return f"{estimate}{sign} [{low}, {high}]"


def words_stories(document: dict[str, Any]) -> str:
    """The law `words` on the stories' grammar, compared with `gated`."""
    count = document["sequences_per_setting"]
    lead = document["lead_in_diversity_at_equal_validity"]["words over gated"]
    share = document["tokens_by_class"]
    caption = (
        f"`bench/words_stories.py`: variety at equal validity, `words` minus `gated`: "
        f"{percent_difference(lead)}. The tokenizer was trained on these stories, and only "
        f"{100 * share['inside']:.0f} % of their tokens are inside a word, so the bench shows "
        "whether `words` keeps texts valid, not what it gains where words have several tokens."
    )
    return _stories(document["settings"], WORDS_SHOWN, count, caption)


def percent_difference(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "no validity in common"
    value, low, high = (100 * interval[key] for key in ("estimate", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}] % of uniform"


COLUMNS = (("validity", 100), ("distinct_valid", 1), ("diversity", 100))
WORDS_SHOWN = (
    ("stock, temperature 1", "stock", "T=1"),
    *(
        (f"`{family}` {level:g}", family, f"level {level:g}")
        for level in (0.25, 0.5, 1)
        for family in ("gated", "words")
    ),
)
SHOWN = (
    ("stock vLLM, temperature 1", "stock", "T=1"),
    ("`top_p` .95", "top-p", "top_p=0.95"),
    ("`diversity` .25", "gated", "level 0.25"),
    ("`diversity` .5", "gated", "level 0.5"),
    ("`diversity` 1", "gated", "level 1"),
)


def known_source(document: dict[str, Any]) -> str:
    """True forward KL of the methods in WAYS, the lowest first."""
    methods = sorted(document["methods"].items(), key=lambda item: item[1]["mean"])
    rows = [
        (WAYS[name], interval(found | {"value": found["mean"]}, 3))
        for name, found in methods
        if name in WAYS
    ]
    return table("| way of training | true KL, nats a token |", rows)


WAYS = {
    "dense_teacher": "forward KL, the teacher's whole distribution",
    "hybrid": "forward KL, stored target (58 bytes a token)",
    "gem": "GEM, tuned sampling temperature",
    "feature_matching": "SFT with feature matching, tuned",
    "label_smoothing": "label smoothing, tuned",
    "entropy_bonus": "entropy bonus, tuned",
    "sft_early_stopping": "SFT, early stopping, tuned sampling temperature",
    "sft_temperature": "SFT, tuned sampling temperature",
    "sft": "SFT",
    "base": "before tuning",
}


def train_cost(document: dict[str, Any]) -> str:
    rows = [
        ("head alone", f"{row['vocabulary']:,}", shown(row["to_stock"]["forward_kl"]))
        for row in document["head"]
    ]
    for row in document["step"]:
        share = f"whole step, head {row['head_flops_share']:.0%} of the FLOPs"
        rows.append((share, f"{row['vocabulary']:,}", shown(row["forward_kl"])))
    return table("| | vocabulary | forward KL over SFT |", rows)


def sds_validation(document: dict[str, Any]) -> str:
    lines = []
    systems = document["systems"]
    for name in sorted(systems, key=lambda name: -systems[name]["sds"]["value"]):
        row = systems[name]
        cells = [
            interval(row["sds"], 0),
            f"{row['mmd']:.3f}",
            f"{row['c2st']['value']:.2f}",
            f"{row['distinct_3']:.3f}",
            f"{row['self_bleu']:.1f}",
        ]
        lines.append([name, *cells])
    head = "| stories by | SDS | style distance | style classifier | distinct-3 | self-BLEU |"
    return table(head, lines)


def phrases(document: dict[str, Any]) -> str:
    """For the chain exact rates; for the model the rate of target phrases, and side effects."""
    rows = [
        [
            row["way"],
            *(f"{row[key]:.2f}" for key in ("phrase", "orphan", "innocent")),
            f"{row['kl']:.4f}",
        ]
        for row in document["chain"]
    ]
    chain = '| chain | "a b c" (people: .60) | "a b" then else | "a" then else | KL |'
    found = document["model"]
    if found is None:
        return table(
            chain, rows, "`bench/phrases.py`: exact, per 1,000 tokens; KL in nats per token."
        )
    return f"{table(chain, rows)}\n\n{_phrases_of_model(found)}"


def _phrases_of_model(found: dict[str, Any]) -> str:
    built = found["rates_when_built"]
    rows = []
    for name, row in found["rows"].items():
        to_stock = found["to_stock"].get(name)
        cells = [
            interval(row["target"], 1),
            *(
                "" if to_stock is None else interval(to_stock[f"{key}_ratio"], 2)
                for key in ("orphans", "firsts")
            ),
            *(interval(row[key], digits) for key, digits in QUALITY.items()),
            "" if row["mean_kl"] is None else f"{row['mean_kl']:.4f}",
        ]
        rows.append([name, *cells])
    answers = found["prompts"] * found["answers_to_each"]
    caption = (
        '`bench/phrases.py`. Chain: a synthetic Markov chain of order 2 that writes "a b c" ten '
        "times as often as people; exact, per 1,000 tokens, KL in nats per token. Model: "
        f"SmolLM2-135M-Instruct at T {found['temperature']:g}, {answers} answers per row "
        f"({found['prompts']} story prompts that the profile was not built from, "
        f"{found['answers_to_each']} each, at most {found['max_tokens']} tokens). Phrases: the "
        f"profile's {found['target_phrases']} phrases, per 1,000 words ({built['model']:.1f} in "
        "the answers that it was built from). Orphans: beginnings of these phrases, of at least "
        "two words, with another continuation; first words likewise. Errors per 100 words; 95 % "
        "intervals, of which one in twenty misses."
    )
    head = (
        f"| model | phrases (people: {built['people']:.2f}) | orphans / stock "
        "| first words / stock | errors | SDS | style distance | KL |"
    )
    return table(head, rows, caption)


QUALITY = {"errors": 2, "sds": 0, "style": 3}


def style_cost(document: dict[str, Any]) -> str:
    rows = (
        (
            f"{row['vocabulary']:,}",
            str(row["rows"]),
            shown(row["style_to_field"]),
            f"{1000 * row['added_seconds']:.2f}",
            f"{row['throughput']:.3f}",
        )
        for row in document["rows"]
    )
    head = "| vocabulary | rows | stages with a style / without | ms added | throughput of a step |"
    return table(head, rows)


def ray_targets(document: dict[str, Any]) -> str:
    memory = document["memory"]
    mib, shards = memory["mib"], memory["shards"]
    rows = (
        ("tokens a second, two workers over one", "1.6", shown(document["two_over_one"])),
        (
            f"a worker's own memory after 1, {shards // 2} and {shards} shards",
            "",
            f"{mib[0]:,.0f}, {mib[shards // 2 - 1]:,.0f} and {mib[-1]:,.0f} MiB",
        ),
        (
            f"what it gains over the second {memory['tokens'] // 2:,} tokens",
            "0",
            f"{memory['growth_mib']:+.0f} MiB; "
            f"{memory['if_shards_were_kept_mib']:+.0f} would be the shards",
        ),
    )
    return table("| | asked | found |", rows)


def families(document: dict[str, Any]) -> str:
    """The families by outcome."""
    outcomes = {
        "packed": "trained, documents packed into rows",
        "unpacked": "trained, one document a row: it does not keep documents of a row apart",
    }
    named: dict[str, list[str]] = {}
    for row in document["rows"]:
        reason = outcomes.get(row["outcome"]) or f"{row['outcome']}: {short(row['reason'])}"
        named.setdefault(reason, []).append(f"`{row['family']}`")
    order = sorted(named, key=lambda reason: (reason not in outcomes.values(), reason))
    rows = ((reason, str(len(named[reason])), ", ".join(named[reason])) for reason in order)
    return table("| | | families |", rows)


def short(reason: str) -> str:
    """A reason without the model's class, which the family already implies, and without the errors
    of transformers."""
    reason = re.sub(r"the model \(\w+\) ", "", reason).partition("; accepted")[0]
    if "its text model is a family of its own" in reason:
        return "images or sound; its text model is a family of its own"
    if re.match(r"(no tiny model|transformers does not save)\b.*Error: ", reason):
        return "a tiny model of it could not be made or saved"
    return reason[:120].rstrip(".").replace("|", "/")


def groups(document: dict[str, Any]) -> str:
    """Distinct answers from known sources, votes, and first words of a real model."""
    lines = []
    for row in document["rows"]:
        alone, together = row["independent, computed"], row["group"]["distinct"]
        low, high = row["group"]["interval"]
        cells = [row["source"], str(row["spellings"]), str(row["n"]), f"{alone:.2f}"]
        cells += [f"{together:.2f} [{low:.2f}, {high:.2f}]", f"{together / alone - 1:+.0%}"]
        lines.append([*cells, f"{row['at most']:.2f}"])
    caption = (
        f"`bench/groups.py`: distinct valid answers among n texts, {document['groups']:,} groups "
        f"per row; {document['invalid']:.0%} of each source's texts are not an answer. "
        "*Independent* and *at most* are computed."
    )
    notes = f"{caption} {_votes(document)} {_first_words(document)}".rstrip()
    head = "| source | spellings | n | independent | group | gain | at most |"
    return table(head, lines, notes)


def _votes(document: dict[str, Any]) -> str:
    shown = [
        f"{'even' if votes['even_steps'] else 'uneven'} steps: {_of_kind(votes)}"
        for votes in document["votes"]
    ]
    first = document["votes"][0]
    return (
        f"Share of votes of {first['n']} texts that are right (%), on {first['questions']} "
        f"synthetic questions after steps of four possible tokens: {'; '.join(shown)}."
    )


def _of_kind(votes: dict[str, Any]) -> str:
    accuracy = {way: 100 * each for way, each in votes["accuracy"].items()}
    cells = [f"independent {accuracy['independent']:.1f}"]
    for way, found in votes["difference"].items():
        low, high = (100 * end for end in found["interval"])
        cells.append(
            f"{way} {accuracy[way]:.1f} ({100 * found['value']:+.1f} [{low:+.1f}, {high:+.1f}])"
        )
    return ", ".join(cells)


def _first_words(document: dict[str, Any]) -> str:
    words = document["first_words"]
    if words is None:
        return ""
    low, high = words["difference"]["interval"]
    return (
        f"SmolLM2-135M-Instruct at `diversity` {words['diversity']:g}, {words['repeats']} times "
        f"{words['n']} continuations of each of {words['beginnings']} beginnings of sentences: "
        f"{words['distinct']['independent']:.2f} of {words['n']} first words are distinct, in "
        f"groups {words['distinct']['group']:.2f} (difference {words['difference']['value']:+.2f} "
        f"[{low:+.2f}, {high:+.2f}]); the most common word has a share of "
        f"{100 * words['share_of_the_commonest']:.0f} %."
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "real": real,
    "every_setting": every_setting,
    "words": words,
    "first_law": first_law,
    "words_stories": words_stories,
    "overhead": overhead,
    "overhead_all_cores": overhead,
    "served": served,
    "real_cost": real_cost,
    "sampler": sampler,
    "phrases": phrases,
    "style_cost": style_cost,
    "known_source": known_source,
    "train_cost": train_cost,
    "sds_validation": sds_validation,
    "clients": client_table.table,
    "variety": variety,
    "prompted": prompted,
    "long_texts": long_texts,
    "headline": headline_table.models,
    "headline_seeds": headline_table.seeds,
    "headline_targets": headline_table.targets,
    "forms": forms,
    "families": families,
    "ray_targets": ray_targets,
    "groups": groups,
    "gpu": gpu_table.table,
    "soak": soak_table.table,
    "laws": laws_table.laws,
    "law_settings": laws_table.settings,
}
RESULT_OF = {
    "every_setting": "real",
    "law_settings": "laws",
    "headline_seeds": "headline",
    "headline_targets": "headline",
}
"""The results of tables that have another name."""
OPTIONAL = {
    "gpu",
    "soak",
    "headline",
    "headline_seeds",
    "headline_targets",
    "laws",
    "law_settings",
    "long_texts",
    "overhead_all_cores",
}
"""Tables of benches that need special hardware or take long; without a result the document is left
unchanged."""
PLACES = {name: "docs/results.md" for name in TABLES if name not in ("real", "known_source")} | {
    "clients": "docs/clients.md",
    "families": "docs/training.md",
    "ray_targets": "docs/scale.md",
}
"""The documents of the tables that are not in the README."""


if __name__ == "__main__":
    main()
