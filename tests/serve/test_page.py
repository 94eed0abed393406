"""The chat page in headless Chromium: types, streams, stops, and outlives its server."""

import contextlib
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright
from servers import load, save, serving

from heddle.jax.engine import Engine

SECONDS = 60
expect.set_options(timeout=1000 * SECONDS)


def until(page, condition) -> None:
    """Wait for it. (What Playwright offers for that runs strings as code, which the page's policy forbids.)"""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)


def chromium() -> str | None:
    """Playwright's own, if it is installed (None), or the system's."""
    with sync_playwright() as session:
        if Path(session.chromium.executable_path).exists():
            return None
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "missing")


@pytest.fixture(scope="module")
def browser():
    executable = chromium()
    if executable == "missing":
        pytest.skip("no Chromium here: `python -m playwright install chromium`, or the system's package")
    # In a container Chromium's own sandbox can't be had as root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with (
        sync_playwright() as session,
        contextlib.closing(session.chromium.launch(executable_path=executable, args=arguments)) as browser,
    ):
        yield browser


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save(folder)
    return load(folder)


class Slow(Engine):
    """A model so small that nobody could stop its answers: each step waits a little."""

    def step(self) -> bool:
        time.sleep(0.03)
        return super().step()


def engine_of(pair) -> Engine:
    return Slow(*pair, max_batch=4, blocks=24, block_size=16, prefill_chunk=32)


@contextlib.contextmanager
def through(port: int):
    """A port that leads to another one, and a function that cuts the connections there are."""
    listener, open_ = socket.create_server(("127.0.0.1", 0)), []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        cut_both(source, sink)

    def cut_both(*ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                open_.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], lambda: cut_both(*open_)
    finally:
        cut_both(listener, *open_)
        for end in (listener, *open_):
            end.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(1000 * SECONDS)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    asked: list[str] = []
    page.asked = asked
    yield page
    context.close()
    assert not errors


def test_it_streams_and_stops_with_the_keyboard_alone(page, pair):
    with serving(engine_of(pair)) as url:
        page.goto(url)
        expect(page.locator("#model")).to_have_text("tiny")
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.keyboard.type("hello")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("there")
        page.keyboard.press("Enter")
        page.wait_for_selector(".message.user")
        box, window = page.locator("#ask").bounding_box(), page.viewport_size
        assert box["y"] + box["height"] == pytest.approx(window["height"], abs=1)  # it stands at the bottom
        assert page.inner_text(".message.user") == "hello\nthere"
        # It grows while it comes.
        said = page.locator(".assistant .text")
        until(page, lambda: len(said.text_content()) > 2)
        assert page.is_visible("#stop")
        length = len(said.text_content())
        until(page, lambda: len(said.text_content()) > length + 3)
        page.keyboard.press("Escape")
        page.wait_for_selector(".assistant .note:has-text('stopped')")
        assert page.is_visible("#send")
        # What was said is kept over a reload, and forgotten on demand.
        text = page.text_content(".assistant .text")
        page.reload()
        page.wait_for_selector(".assistant")
        assert page.text_content(".assistant .text") == text
        page.click("#new")
        assert page.locator(".message").count() == 0
        assert all(asked.startswith((url, "data:")) for asked in page.asked)  # no outside assets


def test_a_click_on_stop_ends_the_answer_and_the_next_question_goes_on(page, pair):
    engine = engine_of(pair)
    with serving(engine) as url:
        page.goto(url)
        expect(page.locator("#model")).to_have_text("tiny")
        page.fill("#prompt", "hello")
        page.click("#send")
        said = page.locator(".assistant .text")
        until(page, lambda: len(said.text_content()) > 2)
        page.click("#stop")
        page.wait_for_selector(".assistant .note:has-text('stopped')")
        until(page, lambda: engine.counters.finished["cancelled"] == 1)
        assert not page.is_visible("#stop")
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.fill("#prompt", "more")
        page.click("#send")
        until(page, lambda: page.locator(".assistant").count() == 2)
        page.wait_for_selector(".assistant:last-child .note:has-text('tokens')")


def test_an_answer_that_breaks_off_is_kept_and_told(page, pair):
    """The server's connections are cut while it speaks."""
    engine = engine_of(pair)
    with serving(engine) as url, through(int(url.rpartition(":")[2])) as (port, cut):
        page.goto(f"http://127.0.0.1:{port}")
        expect(page.locator("#model")).to_have_text("tiny")
        page.fill("#prompt", "hello")
        page.click("#send")
        said = page.locator(".assistant .text")
        until(page, lambda: len(said.text_content()) > 2)
        cut()
        page.wait_for_selector(".assistant .note.bad:has-text('The connection broke off.')")
        assert len(said.text_content()) > 2
        assert page.is_visible("#send")
        until(page, lambda: engine.counters.finished["cancelled"] == 1)
        page.reload()
        assert page.locator(".message").count() == 2  # what was said is kept


def test_settings_are_sent_and_the_dark_mode_is_kept(page, pair):
    with serving(engine_of(pair)) as url:
        page.goto(url)
        expect(page.locator("#model")).to_have_text("tiny")
        page.click("#open-settings")
        page.fill("#system", "be brief")
        page.fill("#max_tokens", "3")
        page.fill("#temperature", "0")
        page.fill("#seed", "7")
        page.keyboard.press("Escape")
        page.click("#theme")
        assert page.get_attribute("html", "data-theme") == "dark"
        with page.expect_request("**/v1/chat/completions") as sent:
            page.fill("#prompt", "hi")
            page.click("#send")
        body = sent.value.post_data_json
        assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        assert (body["max_tokens"], body["temperature"], body["seed"], body["stream"]) == (3, 0, 7, True)
        page.wait_for_selector(".assistant .note:has-text('3 tokens')")
        page.reload()
        assert page.get_attribute("html", "data-theme") == "dark"


def test_what_a_model_says_is_never_html(page, pair):
    with serving(engine_of(pair)) as url:
        page.goto(url)
        page.evaluate(
            """localStorage.setItem("heddle messages", JSON.stringify([
            {role: "user", content: "<img src=x onerror=alert(1)>"},
            {role: "assistant", content: "see\\n```html\\n<b>bold</b>\\n```\\nend"}]))"""
        )
        page.reload()
        page.wait_for_selector(".assistant")
        assert page.inner_text(".message.user") == "<img src=x onerror=alert(1)>"
        assert page.inner_text(".assistant pre") == "<b>bold</b>"
        assert page.locator("main img, main b").count() == 0


def test_it_outlives_its_server(page, pair):
    with serving(engine_of(pair)) as url:
        page.goto(url)
        expect(page.locator("#model")).to_have_text("tiny")
        page.fill("#prompt", "first")
        page.keyboard.press("Enter")
        page.wait_for_selector(".assistant .note:has-text('tokens')")
    page.fill("#prompt", "second")
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice:has-text('The server is gone')")
    assert page.input_value("#prompt") == "second"  # not lost
    with serving(engine_of(pair), port=int(url.rpartition(":")[2])):
        expect(page.locator("#notice")).to_be_empty()
        page.click("#send")
        expect(page.locator(".assistant")).to_have_count(2)
        page.wait_for_selector(".assistant:last-child .note:has-text('tokens')")
        assert page.locator(".message.user").count() == 2


def test_a_wrong_key_is_told(page, pair):
    with serving(engine_of(pair), api_keys=["secret"]) as url:
        page.goto(url)
        page.wait_for_selector("#notice:has-text('An API key goes into the settings')")
        page.click("#open-settings")
        page.fill("#key", "secret")
        page.click("#settings button.main")
        expect(page.locator("#model")).to_have_text("tiny")
        assert page.text_content("#notice") == ""
