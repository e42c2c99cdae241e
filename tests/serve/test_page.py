"""The page in a browser: its numbers are those of the library, by mouse and by keyboard, and nothing goes wrong unseen."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("playwright")

from page_browser import CHROMIUM, listening, looking, running_browser
from serve_runs import CONTEXT, DST, OTHER, SRC, held, make_run
from servers import wait_for

from ping_llm.data.inspect.plots import hilbert_positions
from ping_llm.inference.model import PingModel
from ping_llm.serve.maps import parts_of_space
from ping_llm.serve.rows import RowsFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
QUERY = f"/#src={SRC}&dst={DST}+{OTHER}&at=2026-01-02"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return PingModel.load(make_run(tmp_path_factory.mktemp("run")), "cpu")


@pytest.fixture(scope="module")
def served(model, rows_folder):
    with listening(model, RowsFolder(rows_folder)) as (url, service):
        yield url, service


@pytest.fixture(scope="module")
def url(served):
    return served[0]


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture
def asked(browser, url):
    """A page with a query of its own, without context, that is answered; its ranking and its map may not be."""
    with looking(browser, url + QUERY) as look:
        look.is_done("query")
        yield look


def number(text):
    """An RTT or a probability as the page writes it."""
    (found,) = re.findall(r"[\d,.]+", text)
    return float(found.replace(",", "")) / (100 if "%" in text else 1)


def shown(look):
    """Of each destination P(no answer), the 5, 25, 50, 75 and 95 % quantiles."""
    found = {}
    for row in look.page.locator("#numbers tbody tr").all():
        low, high = row.locator(".most").inner_text().split("–")
        quarter, upper = row.locator(".half").inner_text().split("–")
        median = row.locator(".median").inner_text()
        numbers = [number(row.locator(".p-fail").inner_text()), *map(number, (low, quarter, median, upper, high))]
        found[row.get_attribute("data-dst")] = numbers
    return found


def expected(model, dst, at="2026-01-02", context=None, src=SRC):
    one = model.rtt(src, dst, at, context)
    return pytest.approx([one.p_fail, *one.quantile(np.array([0.05, 0.25, 0.5, 0.75, 0.95]))], rel=1e-2)


def drop(look, text, name="pings.csv"):
    """Drops a file on the panel of the context."""
    script = """([text, name]) => {
      const data = new DataTransfer();
      data.items.add(new File([text], name));
      const event = new DragEvent("drop", { dataTransfer: data, cancelable: true, bubbles: true });
      document.getElementById("context").dispatchEvent(event);
    }"""
    look.page.evaluate(script, [text, name])


def csv(rows):
    return "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])


def test_an_example_is_filled_in_and_answered_in_less_than_200_kb(browser, url, model):
    with looking(browser, url) as look:
        look.all_is_done()
        context = look.page.evaluate("fetch('/v1/example').then((answer) => answer.json())")
        src, dst, at = (look.page.input_value(f"#{name}") for name in ("src", "dst", "at"))
        assert (src, dst.split(), at) == (context["src"], context["dst"], context["at"])
        numbers = shown(look)
        assert list(numbers) == context["dst"]
        for one in context["dst"]:
            assert numbers[one] == expected(model, one, at, context["context"], src)
        assert look.text("#query-status") and re.fullmatch(r"3 distributions in [\d.]+ s", look.text("#query-status"))
        assert len(look.page.locator("#density .series .line").all()) == 3
        assert 20_000 < look.bytes_loaded < 200_000


def test_a_dropped_context_moves_the_numbers_and_so_does_each_of_its_rows(asked, model):
    before = shown(asked)
    assert before[DST] == expected(model, DST)
    drop(asked, csv(CONTEXT))
    asked.page.wait_for_selector("#context-rows tbody tr >> nth=11")
    asked.page.wait_for_selector("#density .without")
    with_context = shown(asked)
    assert with_context[DST] == expected(model, DST, context=CONTEXT) != before[DST]
    asked.page.get_by_label("Use ping 1, to 198.51.100.1", exact=True).uncheck()
    asked.page.get_by_label("Remove ping 12").click()
    wait_for(lambda: shown(asked)[DST] != with_context[DST])
    asked.is_done("query")
    assert shown(asked)[DST] == expected(model, DST, context=CONTEXT[1:-1])
    assert asked.text("#context-count") == "10 of 11 on"
    asked.page.get_by_role("button", name="All off").click()
    asked.page.wait_for_selector("#density .without", state="detached")
    assert shown(asked)[DST] == expected(model, DST)


@pytest.mark.parametrize("text", ["\n".join(map(json.dumps, CONTEXT)), json.dumps(CONTEXT, indent=1)])
def test_a_context_may_be_pasted(asked, text):
    asked.page.get_by_role("button", name="Paste").click()
    asked.page.fill("#paste-text", text)
    asked.page.get_by_role("button", name="Add these rows").click()
    asked.page.wait_for_selector("#context-rows tbody tr >> nth=11")
    assert asked.text("#context-count") == "12 of 12 on" and asked.page.locator("#paste").is_hidden()


def test_the_ranking_is_that_of_the_library(asked, model):
    drop(asked, csv(CONTEXT))
    asked.page.wait_for_selector("#density .without")
    asked.is_done("ranking")
    ranking = model.rank(SRC, [DST, OTHER], "2026-01-02", CONTEXT)
    rows = ranking.table.to_pylist()
    items = asked.page.locator("#ranking li").all()
    assert [item.get_attribute("data-dst") for item in items] == [row["dst_addr"] for row in rows]
    for item, row in zip(items, rows, strict=True):
        assert number(item.locator(".p-fastest").inner_text()) == pytest.approx(row["p_fastest"], abs=6e-3)
        assert number(item.locator(".more").inner_text().split("ms")[0]) == pytest.approx(row["median_ms"], rel=1e-2)
        p, (one, other) = row["p_fastest"], item.locator(".odds").inner_text().removeprefix("odds ").split(" : ")
        assert float(one) / float(other) == pytest.approx(p / (1 - p), rel=0.06)
    assert number(asked.text("#ranking-note").rstrip(".")) == pytest.approx(ranking.p_none, abs=6e-3)


def told(look):
    """What the map says of the cell that is looked at."""
    names, values = (look.page.locator(f"#cell {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def test_the_map_says_what_the_library_says_and_zooms_to_the_24(asked, model):
    def cell(prefix):
        return asked.page.locator(f'[data-prefix="{prefix}"]')

    asked.is_done("map")
    for prefix in ("198.0.0.0/8", "198.51.0.0/16", "198.51.100.0/24"):
        bits = int(prefix.split("/")[1])
        assert len(asked.page.locator('.map-cell[data-state="known"]').all()) == len(parts_of_space(parent(prefix)))
        cell(prefix).hover()
        found, one = told(asked), model.rtt(SRC, prefix, "2026-01-02")
        assert found["prefix"] == prefix
        assert number(found["median"]) == pytest.approx(one.median, rel=0.02)
        assert number(found["no answer"]) == pytest.approx(one.p_fail, rel=0.02)
        low, high = map(number, found["90 % within"].split("–"))
        assert [low, high] == pytest.approx(list(one.quantile(np.array([0.05, 0.95]))), rel=0.02)
        at = asked.page.evaluate(PLACES)
        names = [name for name, _, _ in at]
        numbers = np.array([int(name.split("/")[0].replace(".", " ").split()[bits // 8 - 1]) for name in names])
        base = int.from_bytes(bytes(map(int, prefix.split("/")[0].split(".")))) >> (32 - bits) & ~255
        x, y = hilbert_positions(base + numbers, bits // 2)
        assert [(a, b) for _, a, b in at] == list(zip((x % 16).tolist(), (y % 16).tolist(), strict=True))
        cell(prefix).click()
        if bits < 24:
            asked.page.wait_for_selector(f'#crumbs [aria-current]:has-text("{prefix}")')
            asked.is_done("map")
    # A /24 becomes a destination.
    asked.page.wait_for_selector('#numbers [data-dst="198.51.100.0/24"]')
    assert shown(asked)["198.51.100.0/24"] == expected(model, "198.51.100.0/24")


PLACES = """[...document.querySelectorAll(".map-cell")].map((cell) => [cell.dataset.prefix,
  ...cell.getAttribute("transform").match(/\\d+/g).map((pixel) => pixel / 28)])"""
PLACE = "document.activeElement.getAttribute('transform').match(/\\d+/g).map((pixel) => pixel / 28)"


def parent(prefix):
    """The prefix one byte shorter."""
    address, bits = prefix.split("/")
    kept = int(bits) // 8 - 1
    return ".".join([*address.split(".")[:kept], "0", "0", "0", "0"][:4]) + f"/{8 * kept}"


def test_space_without_hosts_is_blank_and_cannot_be_entered(asked):
    asked.is_done("map")
    blank = asked.page.locator('.map-cell[data-state="blank"]').all()
    assert len(blank) == 35 and blank[0].get_attribute("aria-label") == "0.0.0.0/8: no public hosts"
    assert blank[0].locator("rect").get_attribute("fill") == "none"
    blank[0].click()
    assert asked.text("#crumbs [aria-current]") == "IPv4" and told(asked)["prefix"] == "0.0.0.0/8"


def test_all_of_it_can_be_done_by_keyboard(browser, url, model):
    with looking(browser, url) as look:
        look.all_is_done()
        keyboard, page = look.page.keyboard, look.page

        def go_to(selector):
            for _ in range(60):
                keyboard.press("Tab")
                if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                    return
            raise AssertionError(f"{selector} is not reached")

        go_to("#src")
        keyboard.press("Control+A")
        keyboard.type(SRC)
        for name, text in (("dst", f"{DST} {OTHER}"), ("at", "2026-01-02")):
            go_to(f"#{name}")
            keyboard.press("Control+A")
            keyboard.type(text)
        go_to("#context-none")
        keyboard.press("Space")
        page.wait_for_selector(f'#numbers [data-dst="{OTHER}"]')
        page.wait_for_selector("#density .without", state="detached")
        look.is_done("map")
        assert shown(look)[DST] == expected(model, DST)
        go_to(".map-cell")
        assert told(look)["prefix"] == "198.0.0.0/8"  # of the first destination
        keyboard.press("Enter")
        page.wait_for_selector('#crumbs [aria-current]:has-text("198.0.0.0/8")')
        look.is_done("map")
        assert told(look)["prefix"] == "198.51.0.0/16"
        before = page.evaluate(PLACE)
        keyboard.press("ArrowLeft")
        keyboard.press("ArrowDown")
        assert page.evaluate(PLACE) == [before[0] - 1, before[1] + 1]
        keyboard.press("Escape")
        page.wait_for_selector('#crumbs [aria-current]:has-text("IPv4")')
        assert told(look)["prefix"] == "198.0.0.0/8"
        look.is_done("map")
        look.forgive("status of 400")  # while the source was another one than that of the context


def test_a_question_that_is_outdated_is_cancelled_and_never_shown(asked, served):
    _, service = served
    dropped = service.metrics.dropped.labels("gone")
    before = dropped._value.get()
    asked.is_done("map")
    with held(service):
        asked.page.fill("#dst", "198.51.100.20")
        asked.page.press("#dst", "Enter")
        asked.page.wait_for_selector("#query-status[data-state=busy]")
        wait_for(lambda: service.worker.waiting == 1)
        assert re.match(r"Computing 1 distribution … [\d.]+ s", asked.text("#query-status"))
        asked.page.fill("#dst", "198.51.100.21")
        asked.page.press("#dst", "Enter")
        wait_for(lambda: service.worker.waiting == 2)
        asked.page.wait_for_function(
            "() => parseFloat(document.getElementById('query-status').textContent.split('…')[1]) > 0.4"
        )
        assert set(shown(asked)) == {DST, OTHER}  # until there is something new
    asked.is_done("query")
    assert list(shown(asked)) == ["198.51.100.21"]
    assert dropped._value.get() == before + 1


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"src": "192.0.2.300"}, "'192.0.2.300' is not an IPv4 or IPv6 address"),
        ({"dst": "198.51.0.0/40"}, "'198.51.0.0/40': the prefix length must be a number from 0 to 32"),
        ({"at": "01/03/2026"}, "'01/03/2026' is not a time; write it like 2026-01-31T12:00:00Z"),
        ({"dst": " ".join(f"198.51.100.{i}" for i in range(9))}, "9 destinations; 8 at most are told apart"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(browser, url, fields, line):
    with looking(browser, url + QUERY) as look:
        look.is_done("query")
        for name, text in fields.items():
            look.page.fill(f"#{name}", text)
        look.page.get_by_role("button", name="Ask").click()
        look.page.wait_for_selector("#query-status[data-state=error]")
        query = next(iter(fields))
        said = look.text("#query-status")
        assert line in said and "\n" not in said, query
        look.forgive("status of 400")
        for name, text in {"src": SRC, "dst": DST, "at": "2026-01-02"}.items():
            look.page.fill(f"#{name}", text)
        look.page.press("#at", "Enter")
        look.is_done("query")
        assert list(shown(look)) == [DST]


def test_a_file_that_is_no_table_is_said_in_one_line_and_changes_nothing(asked):
    numbers = shown(asked)
    drop(asked, "hello")
    asked.page.wait_for_selector("#context-status[data-state=error]")
    assert asked.text("#context-status") == "the table has no column src_addr; it has hello"
    assert shown(asked) == numbers and asked.text("#context-count") == "none"
    drop(asked, f"src_addr,dst_addr,rtt\n{SRC},{DST},{'9' * 1000}x")
    wait_for(lambda: "row 1: rtt" in asked.text("#context-status"))
    assert len(asked.text("#context-status")) <= 301
    asked.forgive("status of 400")


def test_a_service_that_is_gone_is_said_in_one_line(asked):
    asked.page.route("**/v1/**", lambda route: route.abort())
    asked.page.get_by_role("button", name="Ask").click()
    asked.page.wait_for_selector("#query-status[data-state=error]")
    assert asked.text("#query-status") == "the service does not answer; start it again, then ask again"
    asked.forgive("ERR_FAILED")
