"""The page in a browser: the system's Chromium, headless, as a person opens it from the disk."""

import shutil
from pathlib import Path

import pytest

from src.reporting import report
from tests.reporting import fabricate

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), "")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    """Of three settings with two seeds each, whose scores are in another order than the settings."""
    folder = tmp_path_factory.mktemp("page") / "sweep"
    for i in range(6):
        beta = 0.005 * 2 ** (i // 2)
        run = fabricate.run(folder / str(i), seed=i % 2, loss=0.5 + i, **{"schedule.beta_end": beta})
        if i < 5:
            fabricate.evaluation(run, "a", {"fd_pixels": (9.0, 10.0, 1.0, 2.0, 5.0)[i]})
    fabricate.run(folder / "6", finished=False, **{"schedule.beta_end": 0.02})
    (folder / "report").mkdir()
    report.make([folder], [], folder / "report")
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, html):
    """Opens the page at a width and in colours, and waits for its charts; nothing may be fetched or complained of."""
    contexts, said = [], []

    def open_page(width: int = 1280, colours: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colours)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type != "info" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else said.append(r.url))
        page.goto(html.as_uri())
        page.wait_for_function(f"document.documentElement.dataset.drawn === '{colours}'", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


INK = """canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let ink = 0;
  for (let i = 3; i < data.length; i += 4) ink += data[i] > 128;
  return ink;
}"""


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_chart_draws(opened, colours):
    page = opened(colours=colours)
    places = page.locator("[data-chart]")
    assert places.count() >= 9
    for i in range(places.count()):
        canvas = places.nth(i).locator("canvas")
        assert canvas.count() == 1
        assert canvas.evaluate(INK) > 300
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if colours == "light" else "rgb(13, 17, 23)")


def test_the_button_turns_the_colours_of_page_and_charts(opened):
    page = opened()
    page.locator("#theme").click()
    page.wait_for_function("document.documentElement.dataset.drawn === 'dark'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    assert page.locator("[data-chart] canvas").count() == page.locator("[data-chart]").count()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("canvas").first.bounding_box()["width"] <= width


def column(page, table: str, number: int) -> list[str]:
    cells = page.locator(f"#{table} tbody tr > :nth-child({number})")
    return [cell.strip() for cell in cells.all_inner_texts()]


def test_tables_sort_by_number_and_back_and_keep_what_is_missing_below(opened):
    """9.5, 1.5 and 5 are in another order as texts than as numbers when 9.5 is 10.5; so is the setting 0.02."""
    page = opened()
    assert column(page, "table-scores", 1) == ["0.005", "0.01", "0.02"]
    head = page.locator("#table-scores th").nth(2)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "table-scores", 1) == ["0.01", "0.02", "0.005"]
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, "table-scores", 1) == ["0.005", "0.02", "0.01"]

    wall = page.locator("#table-runs th", has_text="wall time")
    for _ in range(2):
        wall.locator("button").click()
        assert column(page, "table-runs", 1)[-1] == "6"  # which has no time, whichever way round


def test_the_slider_moves_the_samples_through_training(opened):
    page = opened()
    shown = page.locator(".grids figure").first.locator("img:visible")
    assert (shown.count(), shown.get_attribute("data-step")) == (1, "20")
    page.locator("#time").focus()
    page.keyboard.press("Home")
    assert (shown.count(), shown.get_attribute("data-step")) == (1, "10")
    assert page.locator("#now").inner_text() == "step 10"
    assert "step 10, 320 images" in page.locator(".grids figcaption").first.inner_text()
    page.locator("#play").click()
    assert (shown.count(), shown.get_attribute("data-step")) == (1, "20")


def test_pixels_of_samples_are_squares_of_screen_pixels(opened):
    """Catches grids that the page stretches: each width is a whole multiple of the picture's own."""
    for width in (390, 1280):
        page = opened(width)
        for size in ("small", "large"):
            if width == 1280:
                page.locator(f"[data-size={size}]").click()
            image = page.locator(".grids img:visible").first
            box = image.bounding_box()
            assert box["width"] % 37 == 0
            assert box["width"] == box["height"]
            assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"


def test_a_pointer_finds_the_values(opened):
    """Somewhere along the curve: the tip names setting, run and loss."""
    page = opened()
    chart = page.locator("[data-chart=train_images] canvas")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    tip = page.locator("#vg-tooltip-element.visible")
    for across in range(10, 95, 2):
        for down in range(4, 80, 4):
            page.mouse.move(box["x"] + box["width"] * across / 100, box["y"] + box["height"] * down / 100)
        if tip.count():
            break
    assert "setting" in tip.inner_text()
    assert "training loss" in tip.inner_text()


def test_paper_gets_pictures_in_the_place_of_charts(opened):
    page = opened(colours="dark")
    page.emulate_media(media="print")
    assert page.locator(".still:visible").count() == page.locator("[data-chart]").count()
    assert page.locator("[data-chart]:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")
