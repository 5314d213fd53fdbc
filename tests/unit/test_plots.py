"""Figures of reports: SVG and PNG files show what the description contains."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from dftserve.cli import main
from dftserve.page import page
from dftserve.plots import layout, png
from dftserve.plots.figure import (
    SERIES,
    Axis,
    Figure,
    Point,
    Reference,
    Series,
    Span,
    Tick,
    categories,
    linear,
    logarithmic,
)
from dftserve.plots.layout import Band, Line, Mark, Text, shapes
from dftserve.plots.svg import MOST_DESCRIBED, described, svg

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<script>alert("1")</script> & \x00\x0b\ud800 $x$ ]]>'
NUMBERS = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=12)
RATES = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=12)


def figure(**changes) -> Figure:
    """People and a model at three levels, with intervals."""
    levels = tuple(
        Point(Span(x, x - 0.1, x + 0.2), Span(y, y - 3, y + 2), f"level {x}: {y}", f"{x:g}")
        for x, y in ((0.0, 10.0), (0.5, 20.0), (1.0, 40.0))
    )
    people = Point(Span(0.8), Span(30.0, 28.0, 33.0), "people: 30", "people")
    ends = [end for point in (*levels, people) for end in point.y.ends]
    values = {
        "name": "levels",
        "title": "A measure",
        "about": "A point a level.",
        "x": linear("level", [-0.1, 1.2]),
        "y": linear("measure, %", ends, low=0),
        "series": (Series("people", (people,), is_human=True), Series("model", levels, True)),
        "references": (Reference("people 30 [28, 33]", "y", Span(30.0, 28.0, 33.0)),),
    }
    return Figure(**{**values, **changes})


def marks(drawn: Figure) -> list[Mark]:
    """The marks of points, without those of the legend."""
    return [shape for shape in shapes(drawn) if isinstance(shape, Mark) and shape.description]


# ── Axes ─────────────────────────────────────────────────────────────────────────────────────────


@given(NUMBERS)
def test_a_linear_axis_contains_its_values_and_ends_at_ticks(values):
    axis = linear("a", values)
    ticks = [tick.value for tick in axis.ticks]
    reach = 1e-6 * (axis.high - axis.low)
    assert axis.low - reach <= min(values) <= max(values) <= axis.high + reach
    assert (ticks[0], ticks[-1]) == (axis.low, axis.high)
    assert 2 <= len(ticks) <= 8
    for tick in axis.ticks:
        assert float(tick.label) == pytest.approx(tick.value, rel=1e-6, abs=1e-9)


@given(RATES)
def test_a_logarithmic_axis_has_positive_values_inside_and_0_at_its_edge(values):
    axis = logarithmic("a", values)
    for value in values:
        assert (axis.at(value) > 0.01) == (value > 0)
    assert (0.0 in values) == ("0" in [tick.label for tick in axis.ticks])
    assert axis.ticks or max(values) / min(values) < 10


@given(NUMBERS, st.booleans(), st.booleans())
@example([2.2250738585072014e-308], False, False)
@example([5e-324], False, False)
@example([5e-324], True, False)
@example([0.0, 1e-300, 3e-290], False, True)
def test_positions_are_monotonic_in_the_value(values, is_log, is_flipped):
    made = logarithmic("a", map(abs, values)) if is_log else linear("a", values)
    axis = replace(made, is_flipped=is_flipped)
    positions = [axis.at(value) for value in sorted(map(abs, values) if is_log else values)]
    assert all(0 <= position <= 1 for position in positions)
    assert positions == sorted(positions, reverse=is_flipped)


def test_categories_are_evenly_spaced():
    axis = categories("level", ["0", "{}", "1"])
    assert [axis.at(tick.value) for tick in axis.ticks] == pytest.approx([1 / 6, 1 / 2, 5 / 6])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Span(float("nan")), "got nan; accepted: finite"),
        (lambda: Axis("a", 1, 1, ()), "accepted: low < high"),
        (lambda: Axis("a", 0, 1, (), is_log=True), "accepted: 0 < low < high"),
        (lambda: Reference("r", "equal", Span(1)), "accepted: x or y with a span"),
        (lambda: figure(name="../x"), "accepted: as 'ai-phrases'"),
        (
            lambda: figure(series=tuple(Series(f"s{n}", ()) for n in range(SERIES + 1))),
            "accepted: 5 at most",
        ),
    ],
)
def test_invalid_descriptions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ── Layout ───────────────────────────────────────────────────────────────────────────────────────


def at(drawn: Figure, x: float, y: float) -> tuple[float, float]:
    """The position of (x, y) on the canvas, by the definition of the layout."""
    wide = layout.RIGHT - layout.LEFT - 2 * layout.INSET
    tall = layout.BOTTOM - layout.TOP - 2 * layout.INSET
    across = (x - drawn.x.low) / (drawn.x.high - drawn.x.low)
    up = (y - drawn.y.low) / (drawn.y.high - drawn.y.low)
    return (
        layout.LEFT + layout.INSET + wide * across,
        layout.BOTTOM - layout.INSET - tall * up,
    )


def test_every_point_and_both_ends_of_every_interval_are_drawn():
    drawn = figure()
    ends = {
        (round(x, 3), round(y, 3))
        for shape in shapes(drawn)
        if isinstance(shape, Line)
        for x, y in ((shape.x0, shape.y0), (shape.x1, shape.y1))
    }
    positions = {mark.description: (mark.x, mark.y) for mark in marks(drawn)}
    points = [point for series in drawn.series for point in series.points]
    assert len(positions) == len(points) == 4
    for point in points:
        x, y = point.x, point.y
        assert positions[point.description] == pytest.approx(at(drawn, x.value, y.value))
        expected = [(end, y.value) for end in (x.low, x.high)]
        expected += [(x.value, end) for end in (y.low, y.high)]
        for end_point in expected:
            if None not in end_point:
                assert tuple(round(each, 3) for each in at(drawn, *end_point)) in ends


def test_the_human_line_and_band_are_at_the_human_value():
    drawn = figure()
    (line,) = [s for s in shapes(drawn) if isinstance(s, Line) and s.is_dashed]
    (band,) = [s for s in shapes(drawn) if isinstance(s, Band)]
    assert line.y0 == line.y1 == pytest.approx(at(drawn, 0, 30)[1])
    assert sorted((band.y0, band.y1)) == pytest.approx([at(drawn, 0, y)[1] for y in (33, 28)])
    on_x = figure(references=(Reference("people", "x", Span(0.8)),))
    (line,) = [s for s in shapes(on_x) if isinstance(s, Line) and s.is_dashed]
    assert line.x0 == line.x1 == pytest.approx(at(on_x, 0.8, 0)[0])


def test_the_line_of_equal_values_joins_equal_values():
    axis = logarithmic("rate", [0.1, 10])
    same = figure(x=axis, y=axis, series=(), references=(Reference("equal", "equal"),))
    (line,) = [s for s in shapes(same) if isinstance(s, Line) and s.is_dashed]
    half = Point(Span(1.0), Span(1.0), "one")
    (mark,) = marks(replace(same, series=(Series("s", (half,)),)))
    slope = (line.y1 - line.y0) / (line.x1 - line.x0)
    assert mark.y == pytest.approx(line.y0 + slope * (mark.x - line.x0))


def test_all_is_inside_the_canvas_and_series_differ_without_colours():
    many = figure(series=tuple(Series(f"series {n}", figure().series[1].points) for n in range(5)))
    for shape in shapes(many):
        coordinates = vars(shape)
        for name in {"x", "x0", "x1"} & set(coordinates):
            assert 0 <= coordinates[name] <= layout.WIDTH
        for name in {"y", "y0", "y1"} & set(coordinates):
            assert 0 <= coordinates[name] <= layout.HEIGHT
    assert len({mark.form for mark in marks(many)}) == SERIES


def test_labels_of_neighbouring_points_do_not_overlap():
    near = [Point(Span(x), Span(20.0), f"{x}", "a long label") for x in (0.5, 0.51)]
    drawn = figure(series=(Series("s", tuple(near)),), references=())
    first, second = [s for s in shapes(drawn) if isinstance(s, Text) and s.text == "a long label"]
    assert abs(first.y - second.y) > layout.FONT or first.anchor != second.anchor


# ── SVG ──────────────────────────────────────────────────────────────────────────────────────────


def test_an_svg_describes_every_value_and_is_self_contained():
    drawn = figure()
    root = ElementTree.fromstring(svg(drawn))
    ids = {element.get("id"): element.text for element in root.iter() if element.get("id")}
    labels = [ids[name] for name in root.attrib["aria-labelledby"].split()]
    assert (root.get("role"), labels[0]) == ("img", drawn.title)
    titles = {element.text for element in root.iter(f"{SVG}title")}
    texts = {element.text for element in root.iter(f"{SVG}text")}
    for series in drawn.series:
        for point in series.points:
            assert point.description in titles
            assert point.description in labels[1]
            assert point.label in texts
    for tick in (*drawn.x.ticks, *drawn.y.ticks):
        assert tick.label in texts
    assert drawn.references[0].label in texts
    names = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert names == {"svg", "title", "desc", "path", "text"}
    assert not [name for each in root.iter() for name in each.attrib if "href" in name]


def test_colours_can_be_overridden_by_a_page():
    root = ElementTree.fromstring(svg(figure()))
    painted = [each for each in root.iter() if each.tag in (f"{SVG}path", f"{SVG}text")]
    for each in painted:
        assert {each.get("fill"), each.get("stroke")} <= {"currentColor", None}
        assert each.get("color") == layout.COLOURS[each.attrib["class"]]


def test_the_pages_colours_are_the_plots_and_have_enough_contrast_in_both_schemes():
    """WCAG requires a contrast of 4.5 for text."""
    html = page("a page")
    light, dark = (
        dict(PAINT.findall(part)) for part in html.split("prefers-color-scheme:dark")[:2]
    )
    for colours in (light, dark):
        for tone in layout.COLOURS:
            assert contrast(colours[tone], colours["ground"]) >= 4.5, tone
    assert {tone: whole(light[tone]) for tone in layout.COLOURS} == layout.COLOURS
    for tone in layout.COLOURS:
        assert f".plot .{tone}{{color:var(--{tone})}}" in html


PAINT = re.compile(r"--([a-z0-9-]+):(#[0-9a-f]+)")


def whole(colour: str) -> str:
    return colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(whole(first)), luminance(whole(second))), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear_ = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(
        weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear_, strict=True)
    )


def test_an_svg_with_hostile_texts_is_valid_xml():
    point = Point(Span(0.0), Span(1.0), HOSTILE, HOSTILE)
    axis = Axis(HOSTILE, 0, 1, (Tick(0, HOSTILE),))
    hostile = figure(
        title=HOSTILE,
        about=HOSTILE,
        x=axis,
        y=axis,
        series=(Series(HOSTILE, (point,)), Series(HOSTILE, ())),
        references=(Reference(HOSTILE, "y", Span(0)),),
    )
    root = ElementTree.fromstring(svg(hostile).encode())
    assert {element.tag for element in root.iter()} == {
        SVG + name for name in ("svg", "title", "desc", "path", "text")
    }


def test_a_description_of_very_many_values_is_cut_with_the_number_left_out():
    points = tuple(Point(Span(0.5), Span(9.0), f"point {n}") for n in range(MOST_DESCRIBED + 40))
    description = described(figure(series=(Series("s", points),), references=()))
    assert f"point {MOST_DESCRIBED - 1}; and 40 more." in description


# ── PNG ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'dftserve[plots]'")


def pixels(path: Path):
    from matplotlib import image

    return (image.imread(path) * 255).round().astype(int)


def test_a_png_has_each_mark_at_its_position_in_the_layout(matplotlib, tmp_path):
    drawn = figure()
    (path,) = png.write([drawn], tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["levels.png"]
    pixels_HWC = pixels(path)
    assert pixels_HWC.shape[:2] == (png.SCALE * layout.HEIGHT, png.SCALE * layout.WIDTH)
    assert tuple(pixels_HWC[0, 0][:3]) == (255, 255, 255)
    for mark in marks(drawn):
        colour = layout.COLOURS[mark.tone]
        pixel = pixels_HWC[round(png.SCALE * mark.y), round(png.SCALE * mark.x)][:3]
        assert list(pixel) == [int(colour[at : at + 2], 16) for at in (1, 3, 5)], mark.description


def test_the_png_file_does_not_depend_on_the_users_settings(matplotlib, tmp_path):
    (path,) = png.write([figure()], tmp_path)
    before = path.read_bytes()
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "font.size": 40}):
        png.write([figure()], tmp_path)
        assert matplotlib.rcParams["font.size"] == 40
    assert path.read_bytes() == before


def test_dollar_signs_are_not_parsed_as_mathematics(matplotlib, tmp_path):
    png.write([figure(title=r"from $\frac to 1$")], tmp_path)
    assert (tmp_path / "levels.png").stat().st_size


def test_letters_that_the_font_lacks_give_one_warning(matplotlib, tmp_path):
    with pytest.warns(UserWarning, match="levels.png: the font lacks") as warnings:
        png.write([figure(title="一見 and 百聞")], tmp_path)
    assert len(warnings) == 1


def test_a_page_does_not_import_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import dftserve.evaluate.report.html, dftserve.styles.report, dftserve.plots.png"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ── --plots ──────────────────────────────────────────────────────────────────────────────────────

EVALUATE = "evaluate http://127.0.0.1:9 --prompts p.txt --anchors a --out out"
COMMANDS = [
    EVALUATE,
    "evaluate benchmark http://127.0.0.1:9 --out out --data .",
    "style inspect nothing",
    "style fit http://127.0.0.1:9 --profile nothing --prompts p.txt --out out",
]


def run(command: str, *more: str):
    return CliRunner().invoke(main, [*command.split(), *more])


@pytest.mark.parametrize("command", COMMANDS)
def test_without_matplotlib_plots_are_refused_before_anything_is_done(
    command, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(command, "--plots", "plots")
    assert result.exit_code == 1
    assert "--plots needs the package matplotlib" in result.output
    assert "pip install 'dftserve[plots]'" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_done(
    command, matplotlib, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    for place in ("file", "file/plots", "/proc/plots"):
        result = run(command, "--plots", place)
        assert result.exit_code == 2, result.output
        assert "--plots" in result.output
        assert "Traceback" not in result.output
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_missing_folder_is_created(matplotlib, tmp_path):
    png.check(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
