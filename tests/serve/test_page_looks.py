"""How the page looks, in light, dark and narrow; its token; and the page of anomalies, whose numbers are the library's."""

import re
from contextlib import contextmanager

import pytest

pytest.importorskip("playwright")

from conftest import make_row, write_rows
from page_browser import CHROMIUM, listening, looking, running_browser
from serve_runs import DST, SRC, make_run
from servers import wait_for

from ping_llm.data.rows import RowReader
from ping_llm.inference.model import PingModel
from ping_llm.serve.rows import RowsFolder, context_of
from ping_llm.serve.tables import as_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
PAGES = ("/", "/anomalies.html")
TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return PingModel.load(make_run(tmp_path_factory.mktemp("run")), "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rows = {"train": [make_row(9)], "val": [make_row(n, seed=n, probe_id=n) for n in (60, 30)]}
    return write_rows(tmp_path_factory.mktemp("rows"), rows)


@pytest.fixture(scope="module")
def url(model, folder):
    with listening(model, RowsFolder(folder)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


def lightness(look):
    """Of the ground of the page, 0 to 1."""
    color = look.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3])) / (3 * 255)


def ended(look):
    look.page.wait_for_selector("#query-status[data-state=done], #run-status[data-state=done]")


@pytest.mark.parametrize("page", PAGES)
def test_it_is_dark_where_the_system_is_until_the_switch_says_otherwise(browser, url, page):
    with looking(browser, url + page, color_scheme="dark") as look:
        assert lightness(look) < 0.2
        switch = look.page.locator("#theme")
        switch.click()
        assert lightness(look) > 0.8 and switch.get_attribute("aria-label") == "Colours: light"
        look.page.reload()
        assert lightness(look) > 0.8
        switch.click()
        assert lightness(look) < 0.2 and switch.get_attribute("aria-label") == "Colours: dark"


@pytest.mark.parametrize("page", PAGES)
def test_it_is_readable_at_360_pixels(browser, url, page):
    with looking(browser, url + page, viewport={"width": 360, "height": 740}) as look:
        ended(look)
        assert look.page.evaluate("document.documentElement.scrollWidth") <= 360
        small = """[...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() && !node.closest("svg")
          && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())
          && parseFloat(getComputedStyle(node).fontSize) < 11.5).map((node) => node.textContent)"""
        assert look.page.evaluate(small) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, url, scheme):
    """WCAG 2 wants a contrast of 4.5 of small text."""
    contrast = """() => {
      const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
      const light = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(channel)
        .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
      const clear = (color) => color === "transparent" || /, 0\\)$/.test(color);
      const ground = (node) => clear(getComputedStyle(node).backgroundColor) ? ground(node.parentElement)
        : light(getComputedStyle(node).backgroundColor);
      return [...document.querySelectorAll("main *")].filter((node) => node.checkVisibility() && !node.closest("svg")
        && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())).map((node) => {
          const [a, b] = [light(getComputedStyle(node).color), ground(node)];
          return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent];
        });
    }"""
    with looking(browser, url, color_scheme=scheme) as look:
        ended(look)
        found = look.page.evaluate(contrast)
        assert len(found) > 40 and min(found)[0] >= 4.5, min(found)


def test_nothing_jumps_when_the_answers_come(browser, url):
    places = """[...document.querySelectorAll(".panel")].filter((node) => !node.hidden)
      .map((node) => { const { x, y, width, height } = node.getBoundingClientRect(); return [x, y, width, height]; })"""
    with looking(browser, url) as look:
        look.page.route("**/v1/rtt", lambda route: None)  # never answered
        look.page.reload()
        look.page.wait_for_selector("#query-status[data-state=busy]:has-text('Computing')")
        before = look.page.evaluate(places)
        look.page.unroute("**/v1/rtt")
        look.page.get_by_role("button", name="Ask").click()
        look.all_is_done()
        assert len(before) == 5
        for was, now in zip(before, look.page.evaluate(places), strict=True):
            assert now == pytest.approx(was, abs=2)


def test_a_service_with_a_token_is_asked_with_it(browser, model):
    with listening(model, token=TOKEN) as (url, _), looking(browser, f"{url}/#src={SRC}&dst={DST}") as look:
        for word in ("wrong-wrong-wrong-wrong", TOKEN):
            look.page.wait_for_selector("#token:not([hidden])")
            look.page.fill("#token-word", word)
            look.page.press("#token-word", "Enter")
        look.is_done("query")
        assert look.page.locator("#token").is_hidden()
        assert look.page.locator("#numbers tbody tr").count() == 1
        look.forgive("status of 401")


@contextmanager
def anomalies(browser, url, at, probes=8):
    """The page of anomalies, ended, with a threshold that no other has: a model that learned nothing is rarely surprised."""
    with looking(browser, f"{url}/anomalies.html") as look:
        ended(look)
        look.page.evaluate(f"document.querySelector('#at option').value = '{at}'")
        look.page.select_option("#sources", str(probes))
        look.page.select_option("#at", str(at))
        wait_for(lambda: look.text("#run-status").startswith(f"{90 if probes > 1 else 60} measurements of"))
        yield look


def test_anomalies_are_those_of_the_library(browser, url, model, folder):
    with anomalies(browser, url, at=0.9) as look:
        scored = [one for row in RowReader(folder, "val") for one in model.score(as_rows(context_of(row, slice(None))))]
        found = [one for one in scored if one["p_value"] <= 0.9]
        text = look.text("#list-count")
        count, total, chance = re.fullmatch(r"(\d+) of (\d+) measurements; by chance ([\d.]+)", text).groups()
        # Stretches are read with less before them than rows as a whole are: some are at the border.
        assert int(count) == pytest.approx(len(found), abs=3) and len(found) > 20
        assert (int(total), float(chance)) == (90, 81.0)
        failed, slower = ([one for one in found if (one["rtt"] < 0) == kind] for kind in (True, False))
        assert look.page.locator("#timeline .mark").count() == int(count)
        assert look.page.locator("#timeline .mark.failed").count() == pytest.approx(len(failed), abs=2)
        assert look.page.locator("#timeline .mark.faster").count() == pytest.approx(
            len([one for one in slower if one["pit"] < 0.5]), abs=3
        )


def test_the_most_surprising_are_listed_with_what_was_expected_and_lead_to_their_query(browser, url, folder):
    with anomalies(browser, url, at=0.95, probes=1) as look:
        rows = look.page.locator("#list tbody tr").all()
        p_values = [float(row.locator(".p").inner_text()) for row in rows]
        assert p_values == sorted(p_values) and len(rows) > 10
        row = RowReader(folder, "val")[0]
        measured = {(one["dst_addr"], one["event_time"]): one for one in as_rows(context_of(row, slice(None)))}
        shown = [row.locator("td").all_inner_texts() for row in rows]
        for time, src, dst, observed, *_ in shown:
            one = measured[dst, time.replace(" ", "T") + "Z"]
            assert src == one["src_addr"]
            assert ("no answer" in observed) == (one["rtt"] < 0)
            if one["rtt"] > 0:
                assert float(re.sub("[^0-9.]", "", observed)) == pytest.approx(one["rtt"], rel=1e-2)
        rows[0].get_by_role("link").click()
        look.is_done("query")
        assert look.page.input_value("#src") == shown[0][1] and look.page.input_value("#dst") == shown[0][2]


def test_anomalies_at_360_pixels_say_all_there_is_without_scrolling(browser, url):
    with looking(browser, f"{url}/anomalies.html", viewport={"width": 360, "height": 740}) as look:
        ended(look)
        look.page.evaluate("document.querySelector('#at option').value = '0.9'")
        look.page.select_option("#at", "0.9")
        look.page.wait_for_selector("#list tbody tr")
        ended(look)
        cells = look.page.locator("#list tbody tr").first.locator("td").all()
        assert len(cells) == 8
        for cell in cells:
            box = cell.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_looking_can_be_stopped_and_a_service_without_rows_says_so(browser, url, model):
    with looking(browser, f"{url}/anomalies.html") as look:
        ended(look)
        assert look.text("#go") == "Look again"
        look.page.route("**/v1/anomalies", lambda route: None)  # never answered
        look.page.click("#go")
        wait_for(lambda: look.text("#list-count") == "")
        assert look.text("#go") == "Stop"
        look.page.click("#go")
        assert look.text("#run-status") == "Stopped after 0 measurements" and look.text("#go") == "Look again"
    with listening(model) as (bare, _), looking(browser, f"{bare}/anomalies.html") as look:
        look.page.wait_for_selector("#run-status[data-state=error]")
        assert "start it with --rows ROWS" in look.text("#run-status")
        look.page.goto(bare)
        look.is_done("query")
        assert look.page.locator("#to-anomalies").is_hidden()
        assert "made up, as an example" in look.text("#context-status")
