"""One HTML file that needs nothing else: tables, bars, texts side by side.

jinja2 with autoescape: what is `str` is escaped, what these functions return is `Markup` and is
not. `Markup("<b>{}</b>").format(text)` escapes `text` too.
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
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #ddd}
td.text,th.text{text-align:left}
table.code td.text{font-family:ui-monospace,monospace;white-space:pre}
pre,.sample{background:#f5f5f5;padding:1rem;overflow:auto}.sample{white-space:pre-wrap}
.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1rem}
rect{fill:#4477aa}rect.after{fill:#cc6677}text{font-size:11px;fill:#222}
.note{color:#666}
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
<svg width="{{ bins|length * width }}" height="{{ height + 20 }}" role="img">
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
    return _PAGE.render(title=title, parts=parts)


def section(title: str, *parts: str) -> Markup:
    return Markup("<h2>{}</h2>{}").format(title, joined(parts))


def note(text: str) -> Markup:
    return Markup('<p class="note">{}</p>').format(text)


def joined(parts: Iterable[str]) -> Markup:
    """One behind the other, those that are `str` escaped."""
    return Markup("").join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> Markup:
    """`text`: the columns that are words, set to the left; the others are numbers."""
    return Markup(_TABLE.render(head=head, rows=list(rows), text=text, code=False))


def code_table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int]) -> Markup:
    """A table whose words keep their spaces."""
    return Markup(_TABLE.render(head=head, rows=list(rows), text=text, code=True))


def bars(bins: Sequence[tuple[float, int]]) -> Markup:
    """A histogram: the lower end of each bin, and its count."""
    highest = max(1, *(count for _, count in bins))
    return Markup(_BARS.render(bins=bins, highest=highest, height=BAR_HEIGHT, width=BAR_WIDTH))
