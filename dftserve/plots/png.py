"""Write figures as PNG files with matplotlib, which the extra `plots` installs.

check(Path("plots"))                    # before hours of work
write(figures, Path("plots"))           # plots/NAME.png of each
"""

import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dftserve import atomic
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
    shapes,
)

SCALE = 2
"""Pixels of a file per pixel of the canvas."""
UNIT = 100
"""Pixels of the canvas per inch."""
POINTS = 72 / UNIT
"""Typographic points per pixel of the canvas."""


def check(folder: Path) -> None:
    """Create the folder, and check that figures can be drawn and written to it.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: the folder cannot be created, or written to.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise RuntimeError(
            "--plots needs the package matplotlib, which is not installed: pip install "
            "'dftserve[plots]', or leave --plots out."
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(
            f"--plots: got {folder}, where no file can be written ({reason}); accepted: a folder "
            "that is writable or can be created."
        ) from None


def write(figures: Iterable[Figure], folder: Path) -> list[Path]:
    """Write each figure to NAME.png in the folder, replacing an existing file."""
    paths = []
    for figure in figures:
        path = folder / f"{figure.name}.png"
        atomic.write_file(path, lambda temporary, figure=figure: _save(figure, temporary))
        paths.append(path)
    return paths


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # The user's own settings are for other plots.
        canvas = _canvas()
        (axes,) = canvas.axes
        for order, shape in enumerate(shapes(figure)):
            _draw(axes, shape, order)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            # Without matplotlib's version in it, the same figure gives the same file.
            canvas.savefig(path, format="png", dpi=UNIT * SCALE, metadata={"Software": None})
        missing = [each for each in raised if "missing from font" in str(each.message)]
        for each in raised:
            if each not in missing:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        if missing:
            warnings.warn(
                f"{figure.name}.png: the font lacks {len(missing)} of its letters, which are "
                "drawn as boxes; the plot in the report has them.",
                stacklevel=2,
            )


def _canvas() -> Any:
    """A matplotlib figure whose coordinates are the canvas's pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(WIDTH / UNIT, HEIGHT / UNIT), facecolor="white")
    FigureCanvasAgg(drawing)
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(HEIGHT, 0)
    axes.set_autoscale_on(False)
    return drawing


def _draw(axes: Any, shape: Shape, order: int) -> None:
    # Without an explicit order, matplotlib draws lines over marks.
    look = {"color": COLOURS[shape.tone], "zorder": order}
    match shape:
        case Line():
            dashes = (0, (5 / shape.width, 4 / shape.width)) if shape.is_dashed else "-"
            axes.plot(
                [shape.x0, shape.x1],
                [shape.y0, shape.y1],
                **look,
                linewidth=shape.width * POINTS,
                alpha=shape.opacity,
                linestyle=dashes,
            )
        case Band():
            axes.fill(
                [shape.x0, shape.x1, shape.x1, shape.x0],
                [shape.y0, shape.y0, shape.y1, shape.y1],
                **look,
                alpha=shape.opacity,
                linewidth=0,
            )
        case Mark():
            axes.fill(*zip(*outline(shape), strict=True), linewidth=0, **look)
        case Text():
            axes.text(
                shape.x,
                shape.y,
                shape.text,
                **look,
                fontsize=FONT * POINTS,
                fontweight="bold" if shape.is_bold else "normal",
                ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
                va="baseline",
                parse_math=False,  # Dollar signs are literal.
            )
