"""Draw a figure as SVG inside a page, without scripts or external resources.

The colours are the page's (`dftserve.page`), which follow the system's light or dark mode; on its
own the SVG has those for a white background. Its title and description put the content into words.
"""

from typing import Any

from markupsafe import Markup

from dftserve.plots.figure import Figure
from dftserve.plots.layout import (
    COLOURS,
    FONT,
    HEIGHT,
    WIDTH,
    Band,
    Line,
    Mark,
    Shape,
    Text,
    outline,
    plain,
    shapes,
)

MOST_DESCRIBED = 60
"""Maximum number of values in the description; each point has its own as a title."""

_DRAWING = Markup(
    '<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="{width}" height="{height}" '
    'viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title {name}-about" '
    'font-family="system-ui,sans-serif" font-size="{font}">'
    '<title id="{name}-title">{title}</title><desc id="{name}-about">{about}</desc>{shapes}</svg>'
)
_LINE = Markup(
    '<path {look} d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="currentColor" '
    'stroke-width="{width:g}" stroke-opacity="{opacity:g}"{dashes}/>'
)
_BAND = Markup(
    '<path {look} d="M{x0:.1f} {y0:.1f}H{x1:.1f}V{y1:.1f}H{x0:.1f}Z" fill="currentColor" '
    'fill-opacity="{opacity:g}"/>'
)
_MARK = Markup('<path {look} d="{path}" fill="currentColor">{title}</path>')
_TEXT = Markup(
    '<text {look} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor"{weight}>'
    "{text}</text>"
)


def svg(figure: Figure) -> Markup:
    """The figure as an SVG element, for a page."""
    return _DRAWING.format(
        width=WIDTH,
        height=HEIGHT,
        font=FONT,
        name=figure.name,
        title=plain(figure.title),
        about=plain(described(figure)),
        shapes=Markup("").join(map(_drawn, shapes(figure))),
    )


def described(figure: Figure) -> str:
    """The figure in words, with its values."""
    values = figure.descriptions
    more = f"; and {len(values) - MOST_DESCRIBED:,} more" if len(values) > MOST_DESCRIBED else ""
    return (
        f"{figure.about} Across: {figure.x.title}. Up: {figure.y.title}. "
        f"{'; '.join(values[:MOST_DESCRIBED])}{more}."
    )


def _drawn(shape: Shape) -> Markup:
    look = Markup('class="{0}" color="{1}"').format(shape.tone, COLOURS[shape.tone])
    match shape:
        case Line():
            dashes = Markup(' stroke-dasharray="5 4"') if shape.is_dashed else ""
            return _LINE.format(look=look, dashes=dashes, **_fields(shape))
        case Band():
            return _BAND.format(look=look, **_fields(shape))
        case Mark():
            description = shape.description
            title = Markup("<title>{}</title>").format(description) if description else ""
            return _MARK.format(look=look, path=_outline(shape), title=title)
        case Text():
            weight = Markup(' font-weight="bold"') if shape.is_bold else ""
            return _TEXT.format(look=look, weight=weight, **_fields(shape))


def _fields(shape: Shape) -> dict[str, Any]:
    return vars(shape)


def _outline(mark: Mark) -> str:
    return f"M{'L'.join(f'{x:.1f} {y:.1f}' for x, y in outline(mark))}Z"
