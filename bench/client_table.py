"""The table of docs/clients.md. Ways to write the field that have the same outcome share a line."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import cells

Row = dict[str, Any]

HEADER = "x-dftserve-diversity"
HEAD = "| client | route | where the field is put | the field | answer | stream | a wrong value |"


def table(document: dict[str, Any]) -> str:
    lines = []
    for rows in _merged(document["rows"]):
        routes = ", ".join(dict.fromkeys(row["route"] for row in rows))
        where = _places(rows, document["rows"])
        lines.append([rows[0]["client"], routes, where, *fate(rows[0])])
    return cells.table(HEAD, lines)


def _places(rows: list[Row], known: list[Row]) -> str:
    """Where these rows put the field; "any" if they are all rows of their route, three or more."""
    places = dict.fromkeys(row["written"] for row in rows)
    route = (rows[0]["client"], rows[0]["route"])
    others = [row for row in known if (row["client"], row["route"]) == route]
    return "any" if len(places) == len(others) > 2 else ", ".join(places)


def _merged(rows: list[Row]) -> list[list[Row]]:
    """The rows of each line: rows of a route with the same outcome are merged, then routes with
    the same rows."""
    ways = _grouped(rows, lambda row: (row["client"], row["route"], *fate(row)))
    lines = _grouped(
        ways, lambda way: (way[0]["client"], *(r["written"] for r in way), *fate(way[0]))
    )
    return [[row for way in line for row in way] for line in lines]


def _grouped(items: Iterable[Any], key: Callable[[Any], Hashable]) -> list[list[Any]]:
    groups: dict[Hashable, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def fate(row: Row) -> tuple[str, str, str, str]:
    """(the field, its answer, its answer on a stream, a wrong value)"""
    if row["field"] == "refused by the client":
        return f"refused: {row['error']}", "–", "–", "–"
    if row["field"] == "lost silently":
        return "**lost silently**", "–", "–", "200, ignored"
    stream = _read(row["stream"])
    if "events" in row:
        stream = f"{stream}; events {row['events']}"
    return "arrives", _read(row["plain"]), stream, _refusal(row["wrong"])


def _read(answer: Row) -> str:
    """The parts of an answer that the client can read."""
    read = ["object"] if answer["object"] else []
    if answer["header"]:
        prefix = answer["header"].removesuffix(HEADER)
        read.append(f"`{prefix}` header" if prefix else "header")
    return ", ".join(read) or "nothing"


def _refusal(wrong: Row) -> str:
    if not wrong["readable"]:
        return f"{wrong['as']}, without the reason"
    return f"{wrong['as']}, message" + (", `param`" if wrong["param"] else "")
