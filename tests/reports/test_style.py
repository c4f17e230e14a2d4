"""Every implementation keeps its look, and every look can be seen."""

from itertools import combinations

from mambench.reports import style
from mambench.reports.style import DARK_PAGE, LIGHT_PAGE, contrast, marker, styles

KNOWN = ("flash_attention", "selective_scan", "ssd", "associative_scan", "naive_recurrence")
MANY = [*KNOWN, *(f"peer_{i}" for i in range(5))]


def test_contrast_is_wcags():
    assert contrast("#000000", "#ffffff") == 21
    assert round(contrast("#777777", "#ffffff"), 2) == 4.48


def test_all_colours_stand_out_on_both_pages():
    for look in styles(MANY).values():
        assert contrast(look.light, LIGHT_PAGE) >= 3
        assert contrast(look.dark, DARK_PAGE) >= 3


def test_text_colours_of_labels_are_readable():
    # The static chart writes labels in the line's colour.
    for name, look in styles(KNOWN).items():
        assert contrast(look.light, LIGHT_PAGE) >= 4.5, name
        assert contrast(look.dark, DARK_PAGE) >= 4.5, name


def test_looks_differ_without_colour():
    looks = styles(MANY)
    for first, second in combinations(looks.values(), 2):
        assert (first.marker, first.dash) != (second.marker, second.dash)


def test_a_known_implementation_keeps_its_look_whatever_else_is_there():
    alone = styles(["ssd"])["ssd"]
    assert styles(["aaa", "ssd", "zzz"])["ssd"] == alone


def test_families_and_variants_have_other_markers():
    look = styles(["ssd"])["ssd"]
    found = {marker(look, family_rank=f, variant_rank=v) for f in (0, 1) for v in (0, 1, 2)}
    assert len(found) == 6


def test_page_colours_are_those_of_the_style_sheet():
    sheet = (style_folder() / "report.css").read_text()
    assert f"--page: {LIGHT_PAGE}" in sheet
    assert f"--page: {DARK_PAGE}" in sheet


def style_folder():
    from pathlib import Path

    return Path(style.__file__).parent / "assets"
