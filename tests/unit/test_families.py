"""The table of model families: each has a row with its outcome."""

import json
import re

import click
import families
import pytest
import report


def row(family, outcome, reason=None):
    return {"family": family, "model": "M", "outcome": outcome, "reason": reason}


def test_every_family_is_in_the_table_once_with_its_outcome():
    rows = [
        row("a", "packed"),
        row("b", "unpacked", "a document's log-probabilities change"),
        row("c", "refused", "the model (CForCausalLM) is not causal: padding; accepted: others."),
        row("d", "refused", "the model (DForCausalLM) is not causal: padding; accepted: others."),
        row("e", "failed", "TypeError: a | b"),
        row("f", "not tried", "no tiny model: ValueError"),
    ]
    table = report.families({"rows": rows})
    assert sorted(re.findall(r"`(\w)`", table)) == list("abcdef")
    assert "| refused: is not causal: padding | 2 | `c`, `d` |" in table
    assert "| failed: TypeError: a / b | 1 | `e` |" in table
    assert all(line.count(" | ") == 2 for line in table.splitlines()[2:])


def test_the_results_have_one_row_per_family_and_a_reason_if_it_is_not_packed():
    document = json.loads(families.RESULT.read_text())
    named = [each["family"] for each in document["rows"]]
    assert len(named) == len(set(named)) >= 150
    assert not [each for each in document["rows"] if each["outcome"] == "failed"]
    assert all(each["reason"] for each in document["rows"] if each["outcome"] != "packed")
    trained = [each for each in document["rows"] if each["outcome"] in ("packed", "unpacked")]
    assert len(trained) >= 60
    for each in trained:
        assert max(each["head"], each["packing"] or 0.0, each["reload"]) <= families.SAME


def test_rows_that_are_run_again_replace_the_old_ones():
    before = {"versions": {"torch": "1"}, "steps": 5, "minutes": 16.0}
    rows = [{"family": "a", "outcome": "packed"}, {"family": "b", "outcome": "failed"}]
    again = [{"family": "c", "outcome": "packed"}, {"family": "b", "outcome": "refused"}]
    found = families.merged({**before, "rows": rows}, {**before, "rows": again})
    assert [row["family"] for row in found["rows"]] == ["a", "b", "c"]
    assert found["rows"][1]["outcome"] == "refused"
    other = {**before, "versions": {"torch": "2"}, "rows": again}
    with pytest.raises(click.ClickException, match="run all families"):
        families.merged({**before, "rows": rows}, other)


def test_a_refused_family_has_the_reason_that_a_user_sees(tmp_path):
    found = families.row_of("bert", tmp_path)
    assert found.outcome == "refused"
    assert "is not causal" in found.reason


def test_a_trained_family_has_its_metrics(tmp_path):
    """Run as by the command: the stored results do not test its code."""
    found = families.row_of("llama", tmp_path)
    assert found.outcome == "packed", found.reason
    for gap in (found.head, found.packing, found.reload):
        assert gap is not None
        assert gap <= families.SAME
