"""Bars of ours against the best peer."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import mambench
from mambench.harness.analysis import loading
from mambench.reports import bars, ratios, readme

PUBLISHED = Path(mambench.__file__).resolve().parents[1] / "published"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def found():
    return ratios.make(loading.load([PUBLISHED / "h100-peers"]))


def drawn(found):
    root = ElementTree.fromstring(bars.chart(found, subtitle="a GPU"))
    rectangles = root.findall(f"{SVG}rect")[1:]  # after the page
    return root, [float(r.attrib["width"]) for r in rectangles], rectangles


def test_every_ratio_has_a_bar_as_long_as_it_is(found):
    root, lengths, rectangles = drawn(found)
    values = [r.value for r in found]
    scale = (float(root.find(f"{SVG}path").attrib["d"][1:].split()[0]) - bars.LEFT) / 1
    assert lengths == pytest.approx([scale * value for value in values], abs=0.2)
    behind = ["opacity" in r.attrib for r in rectangles]
    assert behind == [r.winner is r.peer for r in found]
    assert max(lengths) <= bars.WIDTH - bars.LEFT - bars.RIGHT + 0.1
    assert "as fast" in ElementTree.tostring(root, encoding="unicode")


def test_what_has_no_ratio_has_no_bar(found):
    with pytest.raises(ValueError, match="got none"):
        bars.chart([], subtitle="a GPU")
    assert len(drawn(found[:1])[1]) == 1


def test_a_document_shows_them_before_the_table(tmp_path):
    path = tmp_path / "x.md"
    path.write_text(
        "<!-- figures:begin h100-peers table=ratios chart=bars -->\n<!-- figures:end -->\n"
    )
    made = readme.render(path, PUBLISHED)
    assert [p.name for p in made.charts] == ["ratios-all.svg"]
    assert made.text.index("ratios-all.svg") < made.text.index("| operation |")
    path.write_text(path.read_text().replace("bars", "pie"))
    with pytest.raises(Exception, match="pie"):
        readme.render(path, PUBLISHED)
