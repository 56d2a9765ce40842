"""Charts: every value is where it belongs, whatever the values."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_results import NASTY

from promot_jax.report import svg as charts
from promot_jax.report.html import visible
from promot_jax.report.svg import Chart, Line, Panel, Point

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = st.floats(-1e4, 1e5, allow_nan=False)


def chart(*lines, right="", title="t", name="n"):
    return Chart(name, title, "alt", (Panel("x", "y", lines, "p", right),))


def plot(chart):
    return charts.plot(chart, *chart.panels)


def places(svg, kind):
    """Positions of the markers of a kind."""
    moved = re.findall(rf'transform="translate\(([-\d.]+) ([-\d.]+)\)" class="{kind}"', svg)
    return [(float(x), float(y)) for x, y in moved]


def test_points_are_to_scale():
    line = Line("a", 0, (Point(0, 0, "zero"), Point(10, 50, "half"), Point(20, 100, "all")))
    first, second, third = places(plot(chart(line)), "mark")
    assert first[0] < second[0] < third[0] and first[1] > second[1] > third[1]
    assert math.isclose(second[0] - first[0], third[0] - second[0], abs_tol=0.2)
    assert math.isclose(first[1] - second[1], second[1] - third[1], abs_tol=0.2)
    assert first[1] == charts.HEIGHT - charts.BOTTOM  # zero is the foot of the plot


def test_panels_share_their_axis():
    low, high = (Panel("x", "y", (Line("a", 0, (Point(0, value, "p"),)),)) for value in (5, 50))
    for panel, top in ((low, False), (high, True)):
        (place,) = places(charts.plot(Chart("n", "t", "alt", (low, high)), panel), "mark")
        assert (place[1] < 20) is top


def test_two_axes_have_their_own_scales():
    left, right = Line("a", 0, (Point(0, 100, "l"),)), Line("b", 1, (Point(0, 10, "r"),), right=True)
    svg = plot(chart(left, right, right="other"))
    (one, other) = places(svg, "mark")
    assert one == other  # both at the top of their axis
    assert ">100<" in svg and ">10<" in svg and ">other<" in svg


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=6),
    st.sampled_from(["line", "stairs", "marks", "thin", "dots", "ruled"]),
)
def test_any_values_give_a_plot_within_its_frame(values, kind):
    points = tuple(Point(x, y, "p", min(y, z), max(y, z)) for x, y, z in values)
    svg = plot(chart(Line("a", 3, points, kind)))
    assert "nan" not in svg and "inf" not in svg
    for x, y in re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', svg):
        assert charts.LEFT - 1 <= float(x) <= charts.WIDTH and 0 <= float(y) <= charts.HEIGHT - charts.BOTTOM + 1
    assert len(re.findall(r'class="point"', svg)) == len(points)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 60, ["0", "20", "40", "60"]),
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (0, 20000, ["0", "5,000", "10,000", "15,000", "20,000"]),
    ],
)
def test_ticks_are_round(low, high, labels):
    axis = charts._Axis([low, high], 0, 100, zero=True)
    assert [name for _, name in axis.ticks()] == labels


@given(NASTY, NASTY)
def test_file_is_xml_that_holds_its_texts(text, label):
    line = Line(label or "-", 0, (Point(0, 1, text), Point(1, 2, "b")))
    parsed = ElementTree.fromstring(charts.document(chart(line, title=text or "-")))
    titles = [node.text or "" for node in parsed.iter(f"{SVG}title")]
    assert titles[0] == visible(text or "-") and visible(text) in titles[1:]
    assert {node.tag for node in parsed.iter()} <= {
        f"{SVG}{name}" for name in ("svg", "title", "desc", "style", "rect", "text", "g", "path", "circle")
    }
    assert "var(" not in charts.document(chart(line))


def test_legend_has_each_line_once():
    lines = [
        Line("a", 0, (Point(0, 1, "a"),)),
        Line("b", 1, (Point(0, 1, "b"),)),
        Line("", 1, (Point(0, 1, "c"),), "dots"),
    ]
    twice = Chart("n", "t", "alt", tuple(Panel("x", "y", tuple(lines)) for _ in range(2)))
    assert [line.label for line in charts.legend(twice)] == ["a", "b"]


def test_stairs_go_down_before_they_go_right():
    """What is reached at a target score is the ICL of the next point to the right."""
    line = Line("a", 0, (Point(0, 100, "p"), Point(10, 50, "q"), Point(20, 0, "r")), "stairs")
    svg = plot(chart(line))
    (x0, y0), (x1, y1), (x2, y2) = places(svg, "mark")
    assert f'class="stairs" d="M{x0} {y0}V{y1}H{x1}V{y2}H{x2}"' in svg


@pytest.mark.parametrize("kind", ["stairs", "marks"])
def test_bars_reach_from_end_to_end(kind):
    line = Line("a", 0, (Point(50, 50, "p", 40, 60, 45, 70), Point(100, 100, "q"), Point(0, 0, "r")), kind)
    svg = plot(chart(line))
    (x, y), (right, top), (left, bottom) = places(svg, "mark")
    (bars,) = re.findall(r'class="bar" d="M([-\d.]+) ([-\d.]+)V([-\d.]+)M([-\d.]+) ([-\d.]+)H([-\d.]+)"', svg)
    low, high = (bottom + (top - bottom) * share for share in (0.4, 0.6))
    ends = [left + (right - left) * share for share in (0.45, 0.7)]
    assert [*map(float, bars)] == pytest.approx([x, low, high, ends[0], y, ends[1]], abs=0.2)
    assert (kind == "stairs") == ('class="stairs"' in svg)
    assert 'class="bar"' not in plot(chart(Line("a", 0, (Point(0, 0, "p"),), kind)))


def test_axes_have_room_for_bars():
    svg = plot(chart(Line("a", 0, (Point(50, 50, "p", 40, 160, 10, 90), Point(60, 50, "q")), "marks")))
    (x, _), _ = places(svg, "mark")
    left, right = map(float, re.search(r"M([-\d.]+) [-\d.]+H([-\d.]+)\"/>", svg[svg.index('class="bar"') :]).groups())
    assert charts.LEFT <= left < x < right <= charts.WIDTH - charts.RIGHT and ">200<" in svg
