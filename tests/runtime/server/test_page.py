"""The page at `/` in a real browser, with a fake camera, about an exported `tiny`."""

from __future__ import annotations

import base64
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastvlm
from fastvlm.runtime.fastvlm import FastVLM
from fastvlm.runtime.server import app
from fastvlm.runtime.server.run import Server

from .conftest import running

pytestmark = pytest.mark.slow

SAMPLES = Path(fastvlm.__file__).parent / "runtime" / "samples"
PROMPT = "Describe the image."
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-background-networking --use-fake-device-for-media-stream
 --use-fake-ui-for-media-stream"""
WAIT_S = 60.0
KEY = "a-key-for-the-page"


class Page:
    """The page in a browser."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def open(self, server: Server, width: int = 1200, height: int = 800) -> None:
        """Opens the page of a server, with nothing remembered."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.get(server.url)
        self.browser.execute_script("sessionStorage.clear()")

    def connected(self) -> None:
        self.until(lambda: self.text("model") == "model")

    def id(self, name: str) -> Any:
        return self.browser.find_element("id", name)

    def texts(self, selector: str) -> list[str]:
        return [found.text for found in self.browser.find_elements("css selector", selector)]

    def text(self, name: str) -> str:
        return self.id(name).text

    def until(self, true: Callable[[], Any]) -> None:
        """Waits until something is true."""
        end = time.monotonic() + WAIT_S
        while not true():
            assert time.monotonic() < end, self.texts("main")
            time.sleep(0.05)

    def ask(self, text: str) -> str:
        """Types a question, waits for the figures of its answer, and returns the answer."""
        before = len(self.texts(".timings"))
        self.id("question").send_keys(text + "\n")
        self.until(lambda: len(self.texts("#messages .timings")) > before)
        return self.texts(".answer")[-1]

    def send_file(self, path: Path, kind: str, event: str) -> None:
        """Drops or pastes a file, as the browser reports it to the page."""
        script = """
            const [content, name, type, event] = arguments;
            const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name, { type }));
            const given = { bubbles: true, cancelable: true };
            dispatchEvent(event === "drop" ? new DragEvent("drop", { ...given, dataTransfer: data })
                                           : new ClipboardEvent("paste", { ...given, clipboardData: data }));
        """
        self.browser.execute_script(script, base64.b64encode(path.read_bytes()).decode(), path.name, kind, event)

    def errors(self) -> list[str]:
        """The errors in the browser's console since the last call."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver (on Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Any) -> Page:
    return Page(browser)


@pytest.fixture(scope="module")
def tiny(shipped_tiny: Path) -> FastVLM:
    return fastvlm.load(shipped_tiny)


@pytest.fixture(scope="module")
def server(tiny: FastVLM) -> Iterator[Server]:
    with running(tiny) as server:
        yield server


def test_chat_about_a_file_equals_generate(page: Page, server: Server, tiny: FastVLM) -> None:
    page.open(server)
    page.connected()
    page.id("file").send_keys(str(SAMPLES / "shapes.png"))
    page.until(lambda: page.id("preview").is_displayed())
    assert page.ask(PROMPT) == tiny.generate(SAMPLES / "shapes.png", PROMPT).text
    page.ask("Is there a red circle?")
    known = [re.search(r"(\d+) of (\d+) prompt tokens known", text) for text in page.texts(".timings")]
    assert known[1] is not None
    reused, asked = map(int, known[1].groups())
    assert asked - reused < 20, "the second question read the image again"
    assert all(f"{stage} " in page.texts(".timings")[-1] for stage in ("preprocess", "encode", "prefill", "sample"))
    assert not page.errors()


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_image_can_be_dropped_and_pasted(page: Page, server: Server, tiny: FastVLM, event: str) -> None:
    page.open(server)
    page.connected()
    page.send_file(SAMPLES / "word.png", "image/png", event)
    page.until(lambda: page.id("preview").is_displayed())
    answer = page.ask("What is written?")
    assert answer == tiny.generate(SAMPLES / "word.png", "What is written?").text
    page.send_file(SAMPLES / "number.png", "image/png", event)  # another image starts another chat
    page.until(lambda: not page.texts(".answer"))


def test_file_that_is_not_an_image_is_refused(page: Page, server: Server) -> None:
    page.open(server)
    page.connected()
    page.send_file(Path(__file__), "text/x-python", "drop")
    page.until(lambda: page.id("error").is_displayed())
    assert page.text("error") == "test_page.py is not an image. Choose another file."


def test_camera_picture_is_asked_about(page: Page, server: Server) -> None:
    page.open(server)
    page.connected()
    page.id("shoot").click()
    page.until(lambda: page.text("shoot") == "Take the picture")
    page.id("shoot").click()
    page.until(lambda: page.id("preview").is_displayed())
    assert page.ask(PROMPT)
    assert not page.browser.execute_script("return document.getElementById('camera').srcObject"), "it is still on"


def test_live_mode_captions_frames_until_it_is_stopped(page: Page, server: Server) -> None:
    page.open(server)
    page.connected()
    page.id("live-mode").click()
    page.id("live-start").click()
    page.until(lambda: page.texts("#rate") and page.text("rate") not in ("", "-"))
    assert float(page.text("rate")) > 0
    assert page.text("live-ttft").endswith("s")
    assert page.text("caption") != ""
    page.id("live-start").click()
    page.until(lambda: page.text("live-start") == "Start")
    stats = server.service.scheduler.stats
    page.until(lambda: stats().running == 0)
    before = stats().prompt_tokens
    time.sleep(0.5)
    assert stats().prompt_tokens == before > 0, "frames are still sent"
    assert not page.errors()


def test_stopped_answer_is_kept_and_leaves_the_batch(page: Page, model: FastVLM) -> None:
    with running(model, max_tokens=1900) as endless:
        page.open(endless)
        page.connected()
        page.browser.execute_script("document.getElementById('max-tokens').value = 1900")
        page.id("question").send_keys("Go on\n")
        page.until(lambda: page.texts(".answer") and page.texts(".answer")[0])
        page.id("stop").click()
        page.until(lambda: "stopped" in page.texts(".note"))
        assert page.texts(".answer")[0]
        page.until(lambda: endless.service.scheduler.stats().running == 0)


def test_key_is_asked_for_and_used(page: Page, model: FastVLM) -> None:
    with running(model, api_key=KEY) as locked:
        page.open(locked)
        page.until(lambda: page.id("key-dialog").is_displayed())
        page.id("key").send_keys("wrong\n")
        page.until(lambda: page.id("key-dialog").is_displayed() and "wrong" in page.text("key-note"))
        page.id("key").send_keys(KEY + "\n")
        page.connected()
        page.browser.execute_script("document.getElementById('max-tokens').value = 4")
        page.ask("Go on")


def test_server_that_is_gone_is_reported(page: Page, model: FastVLM) -> None:
    with running(model) as server:
        page.open(server)
        page.connected()
    page.id("question").send_keys("Go on\n")
    page.until(lambda: "The server does not answer. Check that fastvlm serve still runs." in page.texts(".note"))
    assert page.id("question").get_attribute("value") == "Go on", "the question can be sent again"


@pytest.mark.parametrize("mode", ["chat-mode", "live-mode"])
def test_every_control_has_a_name(page: Page, server: Server, mode: str) -> None:
    page.open(server)
    page.id(mode).click()
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "textbox", "spinbutton", "DisclosureTriangle"}
    controls = [node for node in nodes if node.get("role", {}).get("value") in roles and not node.get("ignored")]
    assert len(controls) > 3
    assert all(node["name"]["value"].strip() for node in controls)


@pytest.mark.parametrize("width", [320, 390, 820, 1200])
@pytest.mark.parametrize("mode", ["chat-mode", "live-mode"])
def test_nothing_is_wider_than_the_window(page: Page, server: Server, mode: str, width: int) -> None:
    page.open(server, width)
    page.id(mode).click()
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_enough_contrast(page: Page, server: Server, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.open(server)
    style = "getComputedStyle(document.documentElement)"
    for front, back, least in [
        ("text", "ground", 4.5),
        ("text", "surface", 4.5),
        ("text", "question", 4.5),
        ("quiet", "ground", 4.5),
        ("quiet", "surface", 4.5),
        ("error", "surface", 4.5),
        ("on-accent", "accent", 4.5),
        ("control", "surface", 3.0),  # WCAG 2.2, 1.4.11
        ("accent", "ground", 3.0),
    ]:
        values = [f"{style}.getPropertyValue('--{name}')" for name in (front, back)]
        colours = page.browser.execute_script(f"return [{', '.join(values)}]")
        assert contrast(*colours) >= least, (front, back)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours `#rrggbb` by WCAG 2.2."""

    def luminance(colour: str) -> float:
        channels = [int(colour.strip()[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_page_needs_nothing_from_elsewhere() -> None:
    files = sorted(app.PAGE.iterdir())
    assert len(files) >= 7
    for file in files:
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", file.read_text()))
        assert addresses <= {"http://www.w3.org"}, file.name  # the name of SVG's XML
