"""Write the README's tables from bench/results.

    python bench/report.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def main() -> None:
    text = README.read_text()
    for name, table in TABLES.items():
        document = json.loads((RESULTS / f"{name}.json").read_text())
        text = replaced(text, name, table(document))
    README.write_text(text)


def replaced(text: str, name: str, table: str) -> str:
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no place for the table {name!r}: <!-- table: {name} -->")
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def overhead(document: dict[str, Any]) -> str:
    lines = [
        "| vocabulary | batch | no field | field on every request | law written plainly |",
        "|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        cells = [
            f"{row[f'{way}_ratio']:.2f} [{row[f'{way}_interval'][0]:.2f}, "
            f"{row[f'{way}_interval'][1]:.2f}]"
            for way in ("no field", "field", "naive")
        ]
        lines.append(f"| {row['vocabulary']:,} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"overhead": overhead}


if __name__ == "__main__":
    main()
