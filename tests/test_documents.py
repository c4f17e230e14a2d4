"""What documents say of measurements is what the published runs hold."""

from pathlib import Path

import pytest

from mambench.harness.store import RunFolder
from mambench.reports import readme

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "published"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_figures_are_made_from_published_runs(document: Path):
    made = readme.render(document, PUBLISHED)
    assert document.read_text(encoding="utf-8") == made.text, "run `make docs`"
    for path, chart in made.charts.items():
        assert path.read_text(encoding="utf-8") == chart, "run `make docs`"


def test_an_edited_figure_is_noticed(tmp_path: Path):
    edited = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "µs" in text
    edited.write_text(text.replace("µs", "ns"), encoding="utf-8")
    assert readme.render(edited, PUBLISHED).text != edited.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "folder",
    sorted(path.parent for path in PUBLISHED.glob("*/manifest.json")),
    ids=lambda p: p.name,
)
def test_published_runs_are_sound(folder: Path):
    with RunFolder.open(folder) as run:
        assert run.observations()
        assert run.manifest["environment"]["libraries"]["torch"]
        assert run.manifest["device"]["name"] in (folder / "report.html").read_text("utf-8")
