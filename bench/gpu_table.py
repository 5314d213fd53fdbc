"""The table of bench/gpu.py's result: what was measured, and what was required of it."""

from typing import Any

import cells

from ratios import shown


def table(document: dict[str, Any]) -> str:
    """For docs/results.md."""
    found = cells.table("| | | measured | asked |", _rows(document))
    return f"On one {document['machine']['device']}:\n\n{found}"


def _rows(document: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for name in ("exactness", "sampler", "step", "train", "targets", "generate"):
        if "failed" in document[name]:
            rows.append((name, "", f"failed: {document[name]['failed'][:80]}", ""))
        elif not isinstance(document[name]["result"], str):
            rows += _ROWS[name](document[name]["result"])
    return rows


def _exactness_rows(found: Any) -> list[tuple[str, str, str, str]]:
    worst = f"{found['worst']['log_p']:.1e} / {found['worst']['nats']:.1e} nats"
    return [("worst difference from fp64", f"{found['rows']} rows", worst, "")]


def _sampler_rows(found: Any) -> list[tuple[str, str, str, str]]:
    return [
        (
            "one call / a copy",
            f"V={row['vocabulary']:,}, R={row['rows']}",
            shown(row["ours_to_copy"]),
            ASKED.get((row["vocabulary"], row["rows"]), ""),
        )
        for row in found
        if row["vocabulary"] > 4096
    ]


def _step_rows(found: Any) -> list[tuple[str, str, str, str]]:
    rows = [
        ("host time of a step", f"R={row['rows']}", f"{row['host_us']:.0f} µs", "60 µs")
        for row in found
    ]
    return rows + [
        ("a step in a graph / a copy", f"R={row['rows']}", f"{row['captured_us'] / copy:.2f}", "–")
        for row in found
        if (copy := row.get("copy_us"))
    ]


def _train_rows(found: Any) -> list[tuple[str, str, str, str]]:
    times = found["time"].items()
    rows = [("training step / stock", name, shown(time), "1.05") for name, time in times]
    memory = found["memory"]["forward_kl"]
    measured = "not measured" if memory is None else f"{memory:.2f}"
    return [*rows, ("peak memory / stock", "forward_kl", measured, "0.60")]


def _targets_rows(found: Any) -> list[tuple[str, str, str, str]]:
    return [("targets, tokens a second", "", f"{found['tokens_per_second']:,.0f}", "50,000")]


def _generate_rows(found: Any) -> list[tuple[str, str, str, str]]:
    return [
        ("generate() / without the field", f"B={row['batch']}", shown(row["throughput"]), "")
        for row in found
    ]


ASKED = {
    **dict.fromkeys([(131_072, 64)], "1.15"),
    **dict.fromkeys([(131_072, 256), (131_072, 512)], "1.30"),
    **dict.fromkeys([(32_768, rows) for rows in (1, 8, 64, 256, 512)], "1.50"),
}
_ROWS = {
    "exactness": _exactness_rows,
    "sampler": _sampler_rows,
    "step": _step_rows,
    "train": _train_rows,
    "targets": _targets_rows,
    "generate": _generate_rows,
}
