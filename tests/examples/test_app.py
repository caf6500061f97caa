"""The page in a real browser: what a visitor does and reads."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

APP = Path(__file__).parents[2] / "examples" / "app.py"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
SECONDS = 60_000  # milliseconds for whatever draws; an image of three steps takes about one second

expect.set_options(timeout=SECONDS)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the page is served, by the command of the README with fewer steps and pixels."""
    command = [sys.executable, str(APP), "--steps", "3", "--size", "64", "--prompts", "fox", "penguin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("Drawing an example")
        line = server.stdout.readline()
        assert line.startswith("Open "), "the page is not served; see stderr"
        yield line.removeprefix("Open ").strip()
        server.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs Chromium: `apt-get install chromium`")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=FLAGS) as browser:
        yield browser


class Visitors:
    """Opens the page for one visitor after the other, and notes what their browsers ask for."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser = browser
        self.address = address
        self.requests: list[str] = []

    def enter(self) -> Page:
        page = self.browser.new_context().new_page()
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(self.address)
        expect(past_runs(page)).to_have_count(1)  # the example
        return page

    def leave(self) -> None:
        for context in self.browser.contexts:
            context.close()


@pytest.fixture
def visitors(browser: Browser, address: str) -> Iterator[Visitors]:
    """Whatever they do, no other host may be asked for anything."""
    visitors = Visitors(browser, address)
    yield visitors
    visitors.leave()
    assert visitors.requests
    assert [url for url in visitors.requests if not url.startswith((address, "data:", "blob:"))] == []


def fill(page: Page, **fields: object) -> None:
    for name, value in fields.items():
        field = page.locator(f"#{name}").locator("textarea, input:not([type=range])")
        field.fill(str(value))
        field.blur()


def draw(page: Page, runs: int) -> dict[str, str]:
    """Draw, wait until there are so many runs besides the example, and read the tiles: name and value of each."""
    page.locator("#draw").click()
    expect(past_runs(page)).to_have_count(1 + runs)
    return tiles(page)


def tiles(page: Page) -> dict[str, str]:
    return {
        tile.locator("span").inner_text(): tile.locator("b").inner_text() for tile in page.locator(".tiles div").all()
    }


def past_runs(page: Page) -> Locator:
    return page.get_by_role("button", name="Thumbnail")


def code(page: Page) -> Locator:
    return page.locator("#code .cm-content")


def fraction_of_clusters(page: Page) -> float:
    """What "614 clusters of 1024 tokens" says, as a fraction."""
    clusters, tokens = map(int, re.findall(r"\d+", page.locator("#heading").inner_text()))
    return clusters / tokens


def number(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text))


def test_a_visitor_finds_an_example_draws_changes_the_fraction_and_looks_back(visitors):
    page = visitors.enter()
    expect(page.locator(".tiles")).to_contain_text("dB")
    expect(code(page)).to_contain_text("from atc_diffusion import ATCConfig, apply_patch")
    expect(code(page)).to_contain_text("apply_patch(pipe, ATCConfig.fast())")
    first = draw(page, runs=1)
    assert number(first["of the time"]) == pytest.approx(
        100 * number(first["merged"]) / number(first["unmerged"]), rel=0.1
    )
    assert number(first["PSNR"]) > 15  # an unrelated image is at about 10 dB
    assert 1 >= number(first["SSIM"]) > 0.8
    expect(code(page)).to_contain_text("apply_patch(pipe, ATCConfig.fast())")
    assert fraction_of_clusters(page) == pytest.approx(0.125, abs=0.01)

    fill(page, r=0.25, r_keys=0.25)
    assert number(draw(page, runs=2)["PSNR"]) < number(first["PSNR"])
    expect(code(page)).to_contain_text("apply_patch(pipe, ATCConfig.fast(r=0.25, r_keys=0.25))")
    assert fraction_of_clusters(page) == pytest.approx(0.25, abs=0.01)

    past_runs(page).nth(1).click()
    expect(code(page)).to_contain_text("apply_patch(pipe, ATCConfig.fast())")
    assert fraction_of_clusters(page) == pytest.approx(0.125, abs=0.01)


def test_the_handle_wipes_between_the_two_images(visitors):
    page = visitors.enter()
    draw(page, runs=1)
    merged = page.get_by_test_id("imageslider-image").last
    sources = page.locator("img").evaluate_all("images => images.map(image => image.src)")
    assert len(set(sources)) == len(sources)  # a file that two share is written while the browser reads it
    expect(merged).to_have_css("clip-path", "inset(0px 0px 0px 50%)")
    handle = page.locator("#images").get_by_test_id("slider")
    box = handle.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 100, box["y"] + box["height"] / 2, steps=3)
    page.mouse.up()
    assert 10 < number(str(merged.evaluate("image => image.style.clipPath.split(' ').pop()"))) < 45


def test_the_clusters_of_another_layer_and_step_can_be_seen(visitors):
    page = visitors.enter()
    fill(page, steps=4)  # tokens are reclustered at the fourth
    draw(page, runs=1)
    clusters = page.locator("#clusters img")
    last_layer = str(clusters.get_attribute("src"))
    page.locator("#layer input").click()
    page.get_by_role("option").first.click()
    expect(clusters).not_to_have_attribute("src", last_layer)
    last_step = str(clusters.get_attribute("src"))
    fill(page, step=0)
    expect(clusters).not_to_have_attribute("src", last_step)


def test_a_second_visitor_is_served_and_sees_only_their_own_run(visitors):
    first, second = visitors.enter(), visitors.enter()
    fill(first, steps=12)
    fill(second, prompt="penguin")
    first.locator("#draw").click()
    draw(second, runs=1)
    expect(past_runs(first)).to_have_count(2)
    expect(second.get_by_role("gridcell", name="penguin")).to_have_count(1)
    expect(first.get_by_role("gridcell", name="penguin")).to_have_count(0)


def test_bad_input_is_a_sentence_beside_its_field(visitors):
    page = visitors.enter()
    fill(page, prompt=" ", seed="", steps=0, size=100)
    page.locator("#draw").click()
    expect(page.locator("#prompt")).to_contain_text("Say what to draw, for example: red apple.")
    expect(page.locator("#seed")).to_contain_text("Seed must be a whole number from 0 to 4294967295.")
    expect(page.locator("#steps")).to_contain_text("Steps must be a whole number from 1 to 1000.")
    expect(page.locator("#size")).to_contain_text("Size must be a multiple of 8 from 16 to 4096.")
    fill(page, prompt="fox", seed=1, steps=1, size=64)
    draw(page, runs=1)

    page.locator("#preset input").click()
    page.get_by_role("option", name="ToMe").click()
    expect(page.locator("#r input[type=number]")).to_have_value("0.5")
    fill(page, r=0.1, r_keys=0.05)
    page.locator("#draw").click()
    expect(page.locator("#r")).to_contain_text("keeps at least 0.25 of the tokens, got r=0.1")
    expect(page.locator("#r_keys")).to_contain_text("keeps at least 0.25 of the tokens, got r_keys=0.05")


def test_a_preset_is_drawn_as_it_is(visitors):
    page = visitors.enter()
    page.locator("#preset input").click()
    page.get_by_role("option", name="ATC, faster:").click()
    draw(page, runs=1)
    expect(code(page)).to_contain_text("apply_patch(pipe, ATCConfig.faster())")


def test_a_run_can_be_cancelled(visitors):
    page = visitors.enter()
    fill(page, steps=1000)
    page.locator("#draw").click()
    expect(page.locator("#images")).to_contain_text("Unmerged image")
    page.locator("#cancel").click()
    expect(page.locator("#images")).not_to_contain_text("Unmerged image")
    fill(page, steps=2)
    draw(page, runs=1)  # would wait for the other run's thousand steps
    expect(page.get_by_role("gridcell", name="1000")).to_have_count(0)
