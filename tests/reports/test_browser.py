"""The page in a real browser: drawn, offline, sortable, narrow, without script."""

import json

import pytest

from mambench import reports
from mambench.reports import units

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page_file(gpu_run, cpu_run, tmp_path_factory):
    return reports.build([gpu_run, cpu_run], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def open_page(chromium):
    """Return a function that opens a file and gathers errors and requests."""
    contexts = []

    def opened(file, *, suffix="", ready=True, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.errors, tab.requests = [], []
        tab.on("pageerror", lambda error: tab.errors.append(str(error)))
        tab.on("console", lambda m: m.type in ("error", "warning") and tab.errors.append(m.text))
        tab.on("request", lambda request: tab.requests.append(request.url))
        tab.goto(file.as_uri() + suffix)
        if ready:
            tab.wait_for_selector("html[data-ready]")
        return tab

    yield opened
    for context in contexts:
        context.close()


def rendered(tab):
    """Scroll through the charts and wait until all that are shown are drawn."""
    for figure in tab.query_selector_all(".card:not([hidden])"):
        figure.scroll_into_view_if_needed()
        figure.wait_for_selector(".plot[data-drawn] .main-svg")
    return tab.query_selector_all(".card:not([hidden]) .plot[data-drawn]")


def holds_the_records_numbers(tab, gpu_report):
    drawn = tab.evaluate(
        "() => document.querySelector('.plot').data.filter(t => !t.meta.failure)"
        ".map(t => [t.name, Array.from(t.x), Array.from(t.y)])"
    )
    for name, x, y in drawn:
        series = next(s for s in gpu_report.slices[0].series if s.label == name)
        rows = [row for row in series.at_state(series.usual_state) if row.ok]
        assert x == [row.seqlen for row in rows]
        assert y == pytest.approx([row.time_s for row in rows], rel=1e-6)


def test_draws_every_chart_and_asks_the_network_for_nothing(open_page, page_file, gpu_report):
    tab = open_page(page_file)
    assert len(rendered(tab)) == 6
    assert tab.locator(".card").first.locator(".scatterlayer .trace").count() == 9
    assert tab.requests == [page_file.as_uri()]
    assert tab.errors == []
    holds_the_records_numbers(tab, gpu_report)


def test_filters_act_on_all_charts_and_live_in_the_address(open_page, page_file):
    tab = open_page(page_file)
    rendered(tab)
    tab.get_by_text("backward", exact=True).click()
    assert "pass=backward" in tab.url
    assert tab.locator(".answer:visible .where").inner_text().count("backward") == 1
    tab.locator("#legend").get_by_role("button", name="associative_scan").click()
    assert "hide=associative_scan" in tab.url
    again = open_page(page_file, suffix=tab.url[tab.url.index("#") :])
    assert again.locator(".answer:visible .where").inner_text().count("backward") == 1
    legend = again.locator("#legend").get_by_role("button", name="associative_scan")
    pressed = legend.get_attribute("aria-pressed")
    assert pressed == "false"
    rendered(again)
    hidden = "() => [...document.querySelectorAll('.plot')].every(p => !p.data || p.data.every("
    hidden += "t => t.meta.series !== 'associative_scan' || t.visible === false))"
    assert again.evaluate(hidden)
    assert again.errors == []


def test_an_address_of_another_report_still_opens(open_page, page_file):
    tab = open_page(page_file, suffix="#device=nonsense&pass=forward&d_state=x&seqlen=1")
    assert len(rendered(tab)) == 6
    assert tab.errors == []


def test_table_sorts_filters_and_shows_where_a_number_comes_from(open_page, page_file):
    tab = open_page(page_file)

    def times():
        return tab.evaluate(
            "() => [...document.querySelectorAll('#case-table tbody tr')].map(r => r.cells[6]"
            ".firstChild.firstChild.textContent)"
        )

    head = tab.locator("#case-table thead").get_by_role("button", name="Time", exact=True)
    head.click()
    first = times()
    head.click()
    last = times()
    scale = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}

    def number(text):
        return float(text.split()[0]) * scale[text.split()[1]]

    up = [number(t) for t in first if t != units.MISSING]
    down = [number(t) for t in last if t != units.MISSING]
    assert len(up) > 40
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert first[-1] == last[-1] == units.MISSING, "missing values stand last both ways"
    assert tab.locator("#case-table th[aria-sort=descending]").count() == 1
    tab.fill("#search", "associative 131072")
    assert tab.locator("#case-table tbody tr").count() == 1
    tab.locator("#case-table tbody button").click()
    said = tab.locator("#detail").inner_text()
    assert "needs 128 GiB of 79 GiB" in said
    assert "run_bench.py show" in said


def test_downloads_hold_all_cases(open_page, page_file, report):
    tab = open_page(page_file, accept_downloads=True)
    with tab.expect_download() as found:
        tab.click("#json")
    data = json.loads(found.value.path().read_text())
    assert [entry["case_id"] for entry in data] == [row.case_id for row in report.rows]
    with tab.expect_download() as found:
        tab.click("#csv")
    lines = found.value.path().read_text().splitlines()
    assert len(lines) == 1 + len(report.rows)


def test_without_script_the_tables_carry_the_results(open_page, page_file, report):
    tab = open_page(page_file, ready=False, java_script_enabled=False)
    assert tab.locator(".answer:visible").count() == len(report.slices)
    assert tab.locator("#fastest table:visible").count() == 2 * len(report.slices)
    assert not tab.locator("#charts").is_visible()
    assert tab.locator("noscript").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_has_no_sideways_scroll(open_page, page_file, scheme):
    tab = open_page(page_file, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    rendered(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")


def test_the_theme_button_repaints_the_charts(open_page, page_file):
    tab = open_page(page_file, color_scheme="light")
    rendered(tab)
    colour = "() => document.querySelector('.plot').data[0].line.color"
    light = tab.evaluate(colour)
    tab.click("#theme")
    tab.click("#theme")
    assert tab.inner_text("#theme") == "Dark"
    assert tab.evaluate(colour) != light


def test_keyboard_reaches_filters_and_cases(open_page, page_file):
    tab = open_page(page_file)
    tab.locator("input[name=pass]:checked").focus()
    tab.keyboard.press("ArrowRight")
    assert "pass=backward" in tab.url
    assert tab.evaluate("document.activeElement.name") == "pass"
    tab.locator("#case-table tbody button").first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#detail").is_visible()
    tab.keyboard.press("Escape")
    assert not tab.locator("#detail").is_visible()


def test_hostile_records_run_nothing(open_page, hostile_run, tmp_path):
    tab = open_page(reports.build([hostile_run], tmp_path / "report.html"))
    rendered(tab)
    tab.locator("#scope").uncheck()
    tab.locator("#case-table tbody button").first.click()
    assert tab.evaluate("window.pwned") is None
    assert tab.locator("main img, dialog img").count() == 0
    assert "<script>window.pwned" in tab.locator("main").inner_text()
    assert tab.errors == []


def test_the_browser_writes_quantities_as_python_does(open_page, page_file):
    tab = open_page(page_file, ready=False)  # these functions come before everything else
    values = [m * 10.0**e for e in range(-8, 14) for m in (1, 1.005, 2.345, 9.996, 99.95, 999.6)]
    found = tab.evaluate(
        "v => v.map(x => [mambenchUnits.seconds(x), mambenchUnits.memory(x * 1e9)])", values
    )
    for value, (time, memory) in zip(values, found, strict=True):
        assert time == units.seconds(value), value
        assert memory == units.memory(value * 1e9), value
