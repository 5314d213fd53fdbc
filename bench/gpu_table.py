"""The table of bench/gpu.py's result, with the required value of each figure."""

from typing import Any

from ratios import shown


def table(document: dict[str, Any]) -> str:
    """For docs/results.md."""
    lines = [f"On one {document['machine']['device']}:", ""]
    lines += ["| | | measured | asked |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in _cells(document)]
    return "\n".join(lines)


def _cells(document: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    cells: list[tuple[str, str, str, str]] = []
    for name in ("exactness", "sampler", "step", "train", "targets", "generate"):
        if "failed" in document[name]:
            cells.append((name, "", f"failed: {document[name]['failed'][:80]}", ""))
        elif not isinstance(document[name]["result"], str):
            cells += _CELLS[name](document[name]["result"])
    return cells


def _exactness_cells(found: Any) -> list[tuple[str, str, str, str]]:
    worst = f"{found['worst']['log_p']:.1e} / {found['worst']['nats']:.1e} nats"
    return [("worst difference from fp64", f"{found['rows']} rows", worst, "")]


def _sampler_cells(found: Any) -> list[tuple[str, str, str, str]]:
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


def _step_cells(found: Any) -> list[tuple[str, str, str, str]]:
    cells = [
        ("host time of a step", f"R={row['rows']}", f"{row['host_us']:.0f} µs", "60 µs")
        for row in found
    ]
    return cells + [
        ("a step in a graph / a copy", f"R={row['rows']}", f"{row['captured_us'] / copy:.2f}", "–")
        for row in found
        if (copy := row.get("copy_us"))
    ]


def _train_cells(found: Any) -> list[tuple[str, str, str, str]]:
    times = found["time"].items()
    cells = [("training step / stock", name, shown(time), "1.05") for name, time in times]
    memory = found["memory"]["forward_kl"]
    measured = "not measured" if memory is None else f"{memory:.2f}"
    return [*cells, ("peak memory / stock", "forward_kl", measured, "0.60")]


def _targets_cells(found: Any) -> list[tuple[str, str, str, str]]:
    return [("targets, tokens a second", "", f"{found['tokens_per_second']:,.0f}", "50,000")]


def _generate_cells(found: Any) -> list[tuple[str, str, str, str]]:
    return [
        ("generate() / without the field", f"B={row['batch']}", shown(row["throughput"]), "")
        for row in found
    ]


ASKED = {
    **dict.fromkeys([(131_072, 64)], "1.15"),
    **dict.fromkeys([(131_072, 256), (131_072, 512)], "1.30"),
    **dict.fromkeys([(32_768, rows) for rows in (1, 8, 64, 256, 512)], "1.50"),
}
_CELLS = {
    "exactness": _exactness_cells,
    "sampler": _sampler_cells,
    "step": _step_cells,
    "train": _train_cells,
    "targets": _targets_cells,
    "generate": _generate_cells,
}
