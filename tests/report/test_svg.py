"""Files of several plots."""

from xml.etree import ElementTree

from mr1_fast.report.svg import plot_element, standalone

SVG = "{http://www.w3.org/2000/svg}svg"


def test_plots_of_a_file_stand_in_rows():
    plots = [(name, plot_element(name, name, lambda axes: axes.plot([1, 2]))) for name in "abc"]
    places = {}
    for columns in (None, 2):
        root = ElementTree.fromstring(standalone(plots, columns))
        drawn = [
            {name: float(plot.get(name)) for name in ("x", "y", "width", "height")}
            for plot in root.findall(f".//{SVG}")
        ]
        places[columns] = [(plot["x"], plot["y"]) for plot in drawn]
        width = max(plot["x"] + plot["width"] for plot in drawn)
        height = max(plot["y"] + plot["height"] for plot in drawn)
        assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
    assert len({y for _, y in places[None]}) == 1 and len({x for x, _ in places[None]}) == 3
    first, second, third = places[2]
    assert first[1] == second[1] < third[1] and first[0] == third[0] < second[0]
