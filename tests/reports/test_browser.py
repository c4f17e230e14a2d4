"""The page in a real browser: drawn, offline, sortable, narrow, without script."""

import json
import shutil

import pytest

from mambench import reports
from mambench.harness import history as harness_history
from mambench.harness import reproduce
from mambench.harness.analysis import loading
from mambench.harness.plan import Plan
from mambench.harness.spec import Device, DeviceKind, Settings
from mambench.reports import history, machines, rows, units
from mambench.reports.style import DARK_PAGE, LIGHT_PAGE

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


@pytest.fixture(scope="module")
def unchanged(chromium, page_file):
    """The page opened once, for tests that leave it as it is."""
    context = chromium.new_context(accept_downloads=True)
    tab = context.new_page()
    tab.goto(page_file.as_uri())
    tab.wait_for_selector("html[data-ready]")
    yield tab
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
    first = tab.locator(".card").first
    assert first.locator(".scatterlayer .trace").count() == 9
    offered = first.locator(".modebar-btn").evaluate_all("all => all.map(b => b.dataset.title)")
    assert offered == ["Download plot as a PNG", "Reset axes"]  # and nothing that uploads it
    assert tab.requests == [page_file.as_uri()]
    assert tab.errors == []
    holds_the_records_numbers(tab, gpu_report)


def test_filters_act_on_all_charts_and_live_in_the_address(open_page, page_file):
    tab = open_page(page_file)
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
    assert tab.locator(".card:visible").count() == 6
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
    assert "run_bench.py run --suite custom" in said


def test_the_command_that_repeats_a_case_is_the_programs_own(unchanged, report):
    devices = {"gpu-run": "cuda:0", "cpu-run": "cpu"}
    settings = Settings(seed=0, target_s=0.5)
    rows = report.rows[:: len(report.rows) // 40]
    assert {row.result.run_id for row in rows} == set(devices)
    written = unchanged.evaluate("all => all.map(mambenchCommand)", [row.index for row in rows])
    for row, said in zip(rows, written, strict=True):
        name = devices[row.result.run_id]
        kind = DeviceKind(name.partition(":")[0])
        device = Device(kind=kind, name="any", memory_bytes=1)
        plan = Plan(suite="any", device=device, settings=settings, cases=())
        assert said == reproduce.command(row.result.case, plan, program=["python", "run_bench.py"])


def test_downloads_hold_all_cases(unchanged, report):
    with unchanged.expect_download() as found:
        unchanged.click("#json")
    data = json.loads(found.value.path().read_text())
    assert [entry["case_id"] for entry in data] == [row.case_id for row in report.rows]
    with unchanged.expect_download() as found:
        unchanged.click("#csv")
    lines = found.value.path().read_text().splitlines()
    assert len(lines) == 1 + len(report.rows)


def test_without_script_the_tables_carry_the_results(open_page, page_file, report):
    tab = open_page(page_file, ready=False, java_script_enabled=False)
    assert tab.locator(".answer:visible").count() == len(report.slices)
    assert tab.locator("#fastest table:visible").count() == 2 * len(report.slices)
    assert not tab.locator("#controls").is_visible()
    assert tab.locator("#charts svg.still:visible").count() == 1, "the first chart needs no script"
    assert tab.locator("noscript").count() == 1


def test_a_narrow_screen_has_no_sideways_scroll(open_page, page_file):
    tab = open_page(page_file, viewport={"width": 360, "height": 740}, color_scheme="light")
    rendered(tab)
    for scheme, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 28)")):
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == paper


def test_the_theme_button_repaints_the_charts(open_page, page_file):
    tab = open_page(page_file, color_scheme="light")
    tab.wait_for_selector(".plot[data-drawn]")
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
    tab.wait_for_selector(".plot[data-drawn]")
    tab.locator("#scope").uncheck()
    tab.locator("#case-table tbody button").first.click()
    assert tab.evaluate("window.pwned") is None
    assert tab.locator("main img, dialog img").count() == 0
    assert "<script>window.pwned" in tab.locator("main").inner_text()
    assert tab.errors == []


def test_the_browser_writes_quantities_as_python_does(unchanged):
    values = [m * 10.0**e for e in range(-8, 14) for m in (1, 1.005, 2.345, 9.996, 99.95, 999.6)]
    found = unchanged.evaluate(
        "v => v.map(x => [mambenchUnits.seconds(x), mambenchUnits.memory(x * 1e9)])", values
    )
    for value, (time, memory) in zip(values, found, strict=True):
        assert time == units.seconds(value), value
        assert memory == units.memory(value * 1e9), value
    keys = ("a.power_w", "after.sm_clock_hz", "peak_bytes", "b.temperature_c", "errors.max_abs")
    texts = unchanged.evaluate("k => k.map(key => mambenchUnits.entry(key, 1234.5))", keys)
    assert texts == [units.entry(key, "1234.5") for key in keys]


@pytest.fixture(scope="module")
def full_page(full_run, other_run, tmp_path_factory):
    return reports.build([full_run, other_run], tmp_path_factory.mktemp("full") / "report.html")


@pytest.fixture(scope="module")
def both(full_run, other_run):
    return rows.make(loading.load([full_run, other_run]))


def test_who_wins_where_holds_the_ratios_of_the_records(open_page, full_page, both):
    tab = open_page(full_page)
    cells = tab.evaluate(
        "() => [...document.querySelectorAll('#wins-table td[data-row]')].map(c => "
        "[+c.dataset.row, +c.dataset.baseline, c.textContent, c.className, "
        "mambenchSpeedup(+c.dataset.row, +c.dataset.baseline)])"
    )
    assert len(cells) > 40
    for ours, theirs, text, kind, found in cells:
        expected = machines.ratio(both.rows[ours], both.rows[theirs])
        assert found["ratio"] == pytest.approx(expected.ratio, rel=1e-5)
        assert found["low"] == pytest.approx(expected.low, rel=1e-3)
        assert found["high"] == pytest.approx(expected.high, rel=1e-3)
        assert kind == (
            "unsure" if not expected.significant else "faster" if expected.ratio >= 1 else "slower"
        )
        shown = units.digits(expected.ratio) if expected.ratio >= 0.1 else "1/"
        assert text.startswith(shown[:3])
    ended = tab.locator("#wins-table td.ended").all_inner_texts()
    assert {"oom", "timeout"} <= {text.strip() for text in ended}
    tab.locator("#wins-baseline select").select_option("ssd")
    assert "baseline=ssd" in tab.url
    assert tab.locator("#wins-table tbody th", has_text="flash_attention").count() == 1
    assert tab.errors == []


def test_machines_are_compared_and_normalised(open_page, full_page):
    tab = open_page(full_page)
    rendered(tab)
    drawn = "() => [...document.querySelectorAll('.card')].filter(c => c.textContent.includes("
    drawn += "'Machine against'))[0].querySelector('.plot').data.flatMap(t => Array.from(t.y))"
    here = tab.inner_text(".answer:visible .where strong")
    plain = tab.evaluate(drawn)
    assert len(plain) > 20
    expected = 0.5 if "H200" in here else 2
    assert plain == pytest.approx([expected] * len(plain), rel=1e-5)
    tab.get_by_label("divided by").select_option("bandwidth")
    # One machine's limits were not measured, so that both are the datasheets'.
    scale = 4.8e12 / 3.35e12 if expected == 2 else 3.35e12 / 4.8e12
    assert tab.evaluate(drawn) == pytest.approx([expected / scale] * len(plain), rel=1e-5)
    assert "norm=bandwidth" in tab.url
    assert tab.errors == []


def test_a_point_shows_where_it_comes_from(open_page, full_page, both):
    tab = open_page(full_page)
    tab.get_by_text("Fixture GPU 80GB", exact=True).first.click()
    assert "chunk_scan</b>" in tab.inner_text("#kernels-table"), "hostile names are text"
    assert tab.locator("#kernels-table b").count() == 0
    rendered(tab)
    box = tab.locator(".plot .scatterlayer .point").first.bounding_box()
    tab.locator(".plot").first.scroll_into_view_if_needed()
    box = tab.locator(".plot .scatterlayer .point").first.bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    panel = tab.locator("#detail")
    assert panel.is_visible()
    said = panel.inner_text()
    for text in (
        "run_bench.py run --suite custom -i",
        "--pass forward",
        "HBM traffic",
        "tok/J",
        "0123456789",
    ):
        assert text in said, text
    assert panel.locator("svg").count() == 2, "distribution, power"
    assert tab.errors == []


def test_points_with_gaps_between_launches_are_hollow(open_page, gaps_run, tmp_path):
    tab = open_page(reports.build([gaps_run], tmp_path / "report.html"))
    rendered(tab)
    found = tab.evaluate(
        "() => [...document.querySelectorAll('.card:not([hidden])')].map(c => "
        "[c.querySelector('figcaption').textContent, c.querySelector('.plot').data"
        ".filter(t => t.meta.series && !t.meta.failure)"
        ".map(t => [t.meta.series, Array.from(t.x), t.marker.symbol])])"
    )
    (time,) = [traces for title, traces in found if title.startswith("Timemedian")]
    (memory,) = [traces for title, traces in found if title.startswith("Peak memory")]
    symbols = {name: symbol for name, _, symbol in time}
    lengths = {name: x for name, x, _ in time}
    for name, own, other in (
        ("ssd", "diamond", "diamond-open"),
        ("naive_recurrence · ssd", "cross-open", "cross-open-dot"),
    ):
        assert symbols.pop(name) == [other if n > 1024 else own for n in lengths[name]]
    assert all(isinstance(symbol, str) for symbol in symbols.values())
    assert all(isinstance(symbol, str) for _, _, symbol in memory)
    assert tab.locator("#hollow").is_visible()
    tab.locator("label", has_text="training").click()
    assert not tab.locator("#hollow").is_visible()
    assert tab.errors == []


def test_axe_finds_no_violation_in_light_nor_dark(open_page, full_page):
    axe = pytest.importorskip("axe_core_python.sync_playwright").Axe()
    # The page's own policy forbids foreign scripts, axe's among them.
    tab = open_page(full_page, color_scheme="light", bypass_csp=True)
    # Rows, charts and selections repeat one another: a few of each say as much, and much sooner.
    tab.evaluate(
        "document.querySelectorAll('tbody').forEach(b => [...b.rows].slice(6).forEach("
        "row => row.remove()));"
        "[...document.querySelectorAll('.card')].slice(3).forEach(card => card.remove());"
        "document.querySelectorAll('[data-slice][hidden]').forEach(part => part.remove())"
    )
    rendered(tab)
    tab.locator(".names summary").first.click()

    def violations(context=None, options=None):
        found = axe.run(tab, context=context, options=options)["violations"]
        return [(v["id"], [n["html"][:160] for n in v["nodes"][:3]]) for v in found]

    assert violations() == []
    tab.locator("#case-table tbody button").first.click()
    assert violations("#detail") == []
    tab.keyboard.press("Escape")
    tab.emulate_media(color_scheme="dark")
    colours = {"runOnly": ["color-contrast", "link-in-text-block"]}
    assert violations(options=colours) == []
    tab.locator("#case-table tbody button").first.click()
    assert violations("#detail", colours) == []


@pytest.mark.parametrize(("scheme", "page"), [("light", LIGHT_PAGE), ("dark", DARK_PAGE)])
def test_the_index_of_runs_looks_like_a_report(open_page, full_run, tmp_path, scheme, page):
    shutil.copytree(full_run, tmp_path / "run")
    index = reports.index_page(tmp_path, tmp_path / "there" / "index.html")
    tab = open_page(index, ready=False, color_scheme=scheme, viewport={"width": 390, "height": 700})
    painted = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = (int(page[i : i + 2], 16) for i in (1, 3, 5))
    assert painted == f"rgb({red}, {green}, {blue})"
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert (
        tab.locator("td.text small").first.evaluate("e => getComputedStyle(e).display") == "block"
    )
    assert tab.title() == f"Mambench runs: {tmp_path.name}"
    assert tab.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_in_the_pages_without_script(open_page, full_run, tmp_path, scheme):
    axe = pytest.importorskip("axe_core_python.sync_playwright").Axe()
    shutil.copytree(full_run, tmp_path / "run")
    index = reports.index_page(tmp_path)
    harness_history.add(tmp_path / "store", full_run)
    series = harness_history.series(harness_history.read(tmp_path / "store"), "time_s")
    drawn = history.build(list(series)[:3], tmp_path / "history.html")
    for page in (index, drawn):
        tab = open_page(page, ready=False, color_scheme=scheme, bypass_csp=True)
        assert [v["id"] for v in axe.run(tab)["violations"]] == []


def test_print_is_on_white_and_shows_every_chart(open_page, full_page):
    tab = open_page(full_page, color_scheme="dark")
    rendered(tab)
    tab.emulate_media(media="print")
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    assert not tab.locator("#controls").is_visible()
    assert tab.locator(".card:visible .plot[data-drawn]").count() >= 8
