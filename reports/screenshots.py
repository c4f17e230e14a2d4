"""Pictures of a published report, as a browser shows it: `make screenshots`."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambench.harness.errors import UsageError
from mambench.reports import page as pages

HOW = "screenshots need Playwright (pip install 'mambench[test]') and Chromium."
CHROMIUM = Path("/usr/bin/chromium")  # Debian's; else Playwright's own, where it is installed
# Name, width, height, scheme, and the element that stands at the top (None: the page's).
VIEWS: Sequence[tuple[str, int, int, str, str | None]] = (
    ("report-light", 1200, 1140, "light", None),
    ("report-heatmap", 1200, 640, "light", "#wins"),
)


def write(run_folder: Path, folder: Path) -> tuple[Path, ...]:
    """Write one PNG for each of `VIEWS` of a run's report, made anew, and return their paths.

    Raises RunFolderError where the folder is not a sound run, UsageError without a browser.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = pages.build([run_folder], folder / ".report.html")
    try:
        with _playwright() as playwright:
            path = str(CHROMIUM) if CHROMIUM.exists() else None
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            try:
                return tuple(_picture(browser, page, folder, view) for view in VIEWS)
            finally:
                browser.close()
    finally:
        page.unlink()


def _picture(
    browser: Any, page: Path, folder: Path, view: tuple[str, int, int, str, str | None]
) -> Path:
    name, width, height, scheme, top = view
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    tab = context.new_page()
    tab.goto(page.resolve().as_uri())
    tab.wait_for_selector("html[data-ready]")
    if top is not None:
        tab.evaluate("selector => document.querySelector(selector).scrollIntoView()", top)
    tab.wait_for_function(_SHOWN_ARE_DRAWN)
    path = folder / f"{name}.png"
    tab.screenshot(path=path)
    context.close()
    return path


_SHOWN_ARE_DRAWN = """() => [...document.querySelectorAll(".card:not([hidden])")].every((card) => {
  const box = card.getBoundingClientRect();
  return box.bottom < 0 || box.top > innerHeight || card.querySelector("[data-drawn] .main-svg");
})"""


def _playwright() -> Any:
    try:
        return importlib.import_module("playwright.sync_api").sync_playwright()
    except ImportError:
        raise UsageError(HOW) from None


def main(arguments: Sequence[str]) -> None:
    """Write the pictures: `_start.py reports.screenshots RUN_DIR FOLDER`."""
    for path in write(Path(arguments[0]), Path(arguments[1])):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
