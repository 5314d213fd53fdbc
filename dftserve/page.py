"""Build a self-contained HTML file: tables, bars, plots (`dftserve.plots`), texts side by side; in
the system's light or dark mode.

jinja2 autoescapes: a `str` is escaped; these functions return `Markup`, which is not.
`Markup("<b>{}</b>").format(text)` escapes `text` too.
"""

from collections.abc import Iterable, Sequence

from jinja2 import Environment
from markupsafe import Markup

_TEMPLATES = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

_PAGE = _TEMPLATES.from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
:root{color-scheme:light dark;--text:#222;--muted:#666;--ground:#fff;--rule:#ddd;--panel:#f5f5f5;
--human:#1f7a3d;--series-1:#3a6ea5;--series-2:#b5485a;--series-3:#8a6200;--series-4:#7b3fa0;--series-5:#00757a}
@media(prefers-color-scheme:dark){:root{--text:#ddd;--muted:#aaa;--ground:#1b1b1b;--rule:#444;
--panel:#2a2a2a;--human:#5fc486;--series-1:#7fb2e5;--series-2:#ee8c9b;--series-3:#d9b04c;
--series-4:#c79be6;--series-5:#5fc7cc}}
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;
color:var(--text);background:var(--ground)}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid var(--rule)}
td.text,th.text{text-align:left}
table.code td.text{font-family:ui-monospace,monospace;white-space:pre}
pre,.sample{background:var(--panel);padding:1rem;overflow:auto}.sample{white-space:pre-wrap}
.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1rem}
rect{fill:var(--series-1)}svg.bars text{font-size:11px;fill:var(--text)}
svg.plot{display:block;max-width:100%;height:auto;margin:1rem 0}
.note{color:var(--muted)}.plot .text{color:var(--text)}.plot .muted{color:var(--muted)}
.plot .human{color:var(--human)}
.plot .series-1{color:var(--series-1)}.plot .series-2{color:var(--series-2)}
.plot .series-3{color:var(--series-3)}.plot .series-4{color:var(--series-4)}
.plot .series-5{color:var(--series-5)}
</style>
<h1>{{ title }}</h1>
{% for part in parts %}
{{ part }}
{% endfor %}
</html>
""")

_TABLE = _TEMPLATES.from_string("""\
{% macro line(tag, cells) %}
<tr>{% for cell in cells %}
<{{ tag }}{% if loop.index0 in text %} class="text"{% endif %}>{{ cell }}</{{ tag }}>
{%- endfor %}</tr>
{% endmacro %}
<table{% if code %} class="code"{% endif %}>
{{ line("th", head) }}
{% for row in rows %}
{{ line("td", row) }}
{% endfor %}
</table>""")

_BARS = _TEMPLATES.from_string("""\
<svg class="bars" width="{{ bins|length * width }}" height="{{ height + 20 }}" role="img">
{% for low, count in bins %}
{% set tall = height * count / highest %}
<rect x="{{ loop.index0 * width }}" y="{{ '%.1f'|format(height - tall) }}" \
width="{{ width - 3 }}" height="{{ '%.1f'|format(tall) }}">\
<title>{{ '%.1f'|format(low) }}: {{ '{:,}'.format(count) }}</title></rect>
<text x="{{ loop.index0 * width }}" y="{{ height + 14 }}">{{ '%.1f'|format(low) }}</text>
{% endfor %}
</svg>""")

BAR_HEIGHT, BAR_WIDTH = 160, 28


def page(title: str, *parts: str) -> str:
    """A whole HTML page; `parts` are escaped unless they are `Markup`."""
    return _PAGE.render(title=title, parts=parts)


def section(title: str, *parts: str) -> Markup:
    """A heading and what follows it."""
    return Markup("<h2>{}</h2>{}").format(title, joined(parts))


def note(text: str) -> Markup:
    """A paragraph of explanation, in a muted colour."""
    return Markup('<p class="note">{}</p>').format(text)


def joined(parts: Iterable[str]) -> Markup:
    """The parts concatenated; those that are `str` are escaped."""
    return Markup("").join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> Markup:
    """`text`: indices of the columns of text, which are aligned left; the others are numbers."""
    return Markup(_TABLE.render(head=head, rows=list(rows), text=text, code=False))


def code_table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int]) -> Markup:
    """A table whose columns of text keep their spaces."""
    return Markup(_TABLE.render(head=head, rows=list(rows), text=text, code=True))


def bars(bins: Sequence[tuple[float, int]]) -> Markup:
    """A histogram: the lower end of each bin, and its count."""
    highest = max(1, *(count for _, count in bins))
    return Markup(_BARS.render(bins=bins, highest=highest, height=BAR_HEIGHT, width=BAR_WIDTH))
