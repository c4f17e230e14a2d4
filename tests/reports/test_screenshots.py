"""Pictures of a report: taken of what is drawn, and refused without a browser."""

import struct

import pytest

from mambench.harness.errors import UsageError
from mambench.reports import screenshots


@pytest.mark.browser
def test_every_view_is_a_picture_of_its_size(chromium, gpu_run, tmp_path, monkeypatch):
    views = (("top", 600, 500, "light", None), ("wins", 360, 300, "dark", "#wins"))
    monkeypatch.setattr(screenshots, "VIEWS", views)

    class Running:
        """The session's browser: only one Playwright can run in a process."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        @property
        def chromium(self):
            return self

        def launch(self, **options):
            return self

        def new_context(self, **options):
            return chromium.new_context(**options)

        def close(self):
            pass

    monkeypatch.setattr(screenshots, "_playwright", Running)
    written = screenshots.write(gpu_run, tmp_path)
    sizes = [struct.unpack(">II", path.read_bytes()[16:24]) for path in written]
    assert sizes == [(600, 500), (360, 300)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["top.png", "wins.png"]


def test_without_playwright_it_says_what_to_install(gpu_run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "playwright.sync_api", None)
    with pytest.raises(UsageError, match="pip install"):
        screenshots.write(gpu_run, tmp_path)
    assert list(tmp_path.iterdir()) == []
