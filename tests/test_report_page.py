"""The page in a browser: it draws, reacts, keeps text text, and needs no network."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is in the extra dev")
from report_cases import INJECTED, train, with_markup
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from poweropd.report import page
from poweropd.report.runs import read_runs
from poweropd.runs.files import write_atomically

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1400,1000",
)
DRAW_ALL = """const done = arguments[0];
Promise.all(charts.map(show)).then(() => done(Object.keys(views)), (error) => done(String(error)));
"""
# How many pixels of a figure have the colour of the run that stands at place arguments[1].
COLOURED = """
const canvas = document.querySelector(`[data-figure="${arguments[0]}"] canvas`);
const swatch = document.querySelectorAll(".swatch")[arguments[1]];
const wanted = getComputedStyle(swatch).borderTopColor.match(/\\d+/g).map(Number);
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
let count = 0;
for (let i = 0; i < pixels.length; i += 4)
  count += wanted.every((value, k) => Math.abs(value - pixels[i + k]) < 8) && pixels[i + 3] > 200;
return count;
"""
# The lowest contrast ratio of any text (WCAG 2.2), with that text.
CONTRAST = """
const parse = (c) => c.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
document.querySelectorAll("details").forEach((e) => (e.open = true));
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let worst = [21, ""];
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || element.closest("script, .chart")) continue;
  const [a, b] = [parse(getComputedStyle(element).color), behind(element)].map(light);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < worst[0]) worst = [ratio, walker.currentNode.data];
}
return worst;
"""


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory, student_dir: Path, teacher_dir: Path, prompts: Path
) -> Path:
    folder = tmp_path_factory.mktemp("report")
    models = (student_dir, teacher_dir)
    runs = [train(folder, models, prompts, name, steps=12) for name in ("log_ratio", "power")]
    page.write_report([*runs, with_markup(runs[0], folder)], folder / "report.html", None)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(DRIVER, log_output=os.devnull))
    yield found
    found.quit()


@pytest.fixture
def opened(browser: webdriver.Chrome, report: Path) -> webdriver.Chrome:
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(report.as_uri())
    return browser


def test_every_figure_is_drawn_without_errors_and_without_a_network(
    opened: webdriver.Chrome, report: Path
) -> None:
    keys = opened.execute_async_script(DRAW_ALL)
    shown = opened.find_elements(By.CSS_SELECTOR, ".chart canvas")
    assert len(keys) == len(shown) > 20
    assert {"reverse_kl", "accuracy-sums", "heatmap-1", "plane-2", "phases", "tail-below"} <= set(
        keys
    )
    assert all(canvas.size["width"] > 200 for canvas in shown)
    assert opened.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    urls = {request["request"]["url"] for request in sent}
    assert {url for url in urls if not url.startswith(("data:", "blob:"))} == {report.as_uri()}


def test_the_list_of_runs_toggles_a_curve_by_mouse_and_keyboard(opened: webdriver.Chrome) -> None:
    opened.execute_async_script(DRAW_ALL)
    box = opened.find_elements(By.CSS_SELECTOR, "input.run")[1]
    assert all(opened.execute_script(COLOURED, "grad_norm", run) > 50 for run in (0, 1))
    box.click()
    assert wait_for(opened, COLOURED, ("grad_norm", 1), lambda count: count == 0)
    assert opened.execute_script(COLOURED, "grad_norm", 0) > 50
    assert opened.switch_to.active_element == box
    box.send_keys(Keys.SPACE)
    assert wait_for(opened, COLOURED, ("grad_norm", 1), lambda count: count > 50)


def test_hovering_shows_the_values_under_the_pointer(opened: webdriver.Chrome) -> None:
    opened.execute_async_script(DRAW_ALL)
    canvas = opened.find_element(By.CSS_SELECTOR, '[data-figure="reverse_kl"] canvas')
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    ActionChains(opened).move_to_element(canvas).move_by_offset(3, 2).perform()
    text = "return document.querySelector('#vg-tooltip-element.visible')?.innerText ?? ''"
    assert wait_for(opened, text, (), lambda shown: "step" in shown and "value" in shown)
    shown = opened.execute_script(text)
    titles = [line.split("\t")[0] for line in shown.splitlines()]
    assert titles == ["run", "step", "value", "smoothed"]  # and not every field of the row
    assert any(name in shown for name in ("log_ratio", "power", "bold")), shown


def test_what_a_model_wrote_is_text(opened: webdriver.Chrome) -> None:
    opened.execute_async_script(DRAW_ALL)
    assert opened.execute_script("return window.injected") is None
    texts = opened.execute_script(
        "return [...document.querySelectorAll('.completion')].map((e) => e.textContent)"
    )
    assert any(f"{INJECTED}</script>&amp;plain" in text for text in texts)
    assert opened.find_elements(By.CSS_SELECTOR, "img, main b, main script") == []
    assert "<b onclick" in opened.find_element(By.CSS_SELECTOR, "fieldset").text


@pytest.mark.parametrize("width", [390, 1366])
def test_charts_fill_their_columns_and_the_page_does_not_scroll_sideways(
    opened: webdriver.Chrome, width: int
) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened.refresh()
        opened.execute_async_script(DRAW_ALL)
        beyond, *charts = opened.execute_script(
            """return [document.documentElement.scrollWidth - innerWidth, ...charts.map((chart) => [
            chart.querySelector("canvas").getBoundingClientRect().width,
            chart.parentElement.getBoundingClientRect().width,
            chart.scrollHeight - chart.clientHeight])]"""
        )
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert beyond <= 0
    assert len(charts) > 20
    assert all(abs(canvas - column) <= 1 for canvas, column, _ in charts), charts
    assert all(column > width / 4 and cut <= 1 for _, column, cut in charts), charts


def test_the_slider_smooths_curves_and_keeps_the_raw_line(opened: webdriver.Chrome) -> None:
    opened.execute_async_script(DRAW_ALL)
    rows = "const view = await views['grad_norm']; return view.data('rows')"
    read = f"const done = arguments[0]; (async () => {{ {rows} }})().then(done);"
    slide = """const slider = document.getElementById("smoothing");
    slider.value = arguments[0]; slider.dispatchEvent(new Event("input"));"""
    opened.execute_script(slide, 0)
    found = opened.execute_async_script(read)
    assert all(row["smooth"] == pytest.approx(row["mean"]) for row in found)
    opened.execute_script(slide, 0.9)
    assert opened.find_element(By.TAG_NAME, "output").text == "0.9"
    first = [row for row in opened.execute_async_script(read) if row["run"] == "power"]
    average = weight = 0.0
    for row in first:
        average, weight = 0.9 * average + 0.1 * row["mean"], 0.9 * weight + 0.1
        assert row["smooth"] == pytest.approx(average / weight)
    assert len({row["mean"] for row in first}) > 5


@pytest.mark.thorough
def test_a_watched_page_loads_again_as_the_reader_left_it(
    opened: webdriver.Chrome, report: Path, tmp_path: Path
) -> None:
    runs = read_runs([report.parent / name for name in ("log_ratio", "power")])
    watched = tmp_path / "watched.html"
    page.write_page(runs, watched, None, refresh=3)
    opened.get(watched.as_uri())
    # In one script, since on a busy machine the page may load again between two.
    opened.execute_script("""window.first = true; scrollTo(0, 900); boxes[0].click();
    const slider = document.getElementById("smoothing");
    slider.value = 0.8; slider.dispatchEvent(new Event("input"));""")
    assert wait_for(opened, "return window.first ?? null", (), lambda first: first is None)
    again = opened.execute_script(
        "return [scrollY, slider.value, boxes.map((b) => b.checked), refresh.checked]"
    )
    assert again == [900, "0.8", [False, True], True]
    text = re.sub(
        r' data-refresh="3"|<label><input[^>]*id="refresh".*</label>', "", watched.read_text()
    )
    write_atomically(watched, text)  # as when the runs are complete
    still = "return document.getElementById('refresh') === null"
    assert wait_for(opened, still, (), lambda gone: gone)
    assert opened.execute_script("return [scrollY, slider.value]") == [900, "0.8"]
    assert opened.get_log("browser") == []


def test_no_script_runs_but_the_pages_own(opened: webdriver.Chrome) -> None:
    opened.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.injected = 1';"
        "document.body.append(s);"
    )
    assert opened.execute_script("return window.injected") is None


def test_keyboard_and_screen_reader_find_their_way(opened: webdriver.Chrome) -> None:
    facts: dict[str, Any] = opened.execute_script(
        """return {
        lang: document.documentElement.lang,
        headings: [...document.querySelectorAll("h1, h2, h3")].map((h) => Number(h.tagName[1])),
        labels: charts.map((c) => [c.getAttribute("role"), c.getAttribute("aria-label")]),
        cells: [...document.querySelectorAll("th")].map((th) => th.scope),
        captions: [...document.querySelectorAll("table")].every((t) => t.caption.textContent),
        named: [...document.querySelectorAll("input")].every((i) => i.labels.length === 1)}"""
    )
    assert facts["lang"] == "en"
    levels = facts["headings"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(role == "img" and len(label) > 30 for role, label in facts["labels"]), facts
    assert set(facts["cells"]) == {"row", "col"}
    assert facts["captions"]
    assert facts["named"]
    opened.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(6):
        ActionChains(opened).send_keys(Keys.TAB).perform()
        focused = opened.switch_to.active_element
        reached.append(f"{focused.tag_name} {focused.get_attribute('class')}".strip())
    assert reached[:4] == ["a skip", "input run", "input run", "input run"]


def test_text_stands_out_from_what_is_behind_it(opened: webdriver.Chrome) -> None:
    ratio, text = opened.execute_script(CONTRAST)
    assert ratio >= 4.5, text


def wait_for(browser: webdriver.Chrome, script: str, arguments: Any, holds: Any) -> bool:
    """Whether the script's result comes to hold within some seconds."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.wait import WebDriverWait

    try:
        return bool(
            WebDriverWait(browser, 10, 0.05).until(
                lambda b: holds(b.execute_script(script, *arguments))
            )
        )
    except TimeoutException:
        return False
