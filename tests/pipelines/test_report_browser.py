"""Pages in a real browser: the growing report reads itself again, the slider moves time, a click finds near patches."""

import asyncio

import numpy as np
import pytest

from kinema.pipelines.demo.server import PageServer
from kinema.pipelines.report import Page

from .chromium import browser_tab, find_chromium


@pytest.fixture(scope="module")
def chromium():
    return find_chromium() or pytest.skip("no chromium on this machine; on Debian: apt-get install chromium")


def picture(value: int) -> np.ndarray:
    return np.full((32, 48, 3), value, np.uint8)


def growing(path, live: str, frames: int) -> None:
    page = Page("Demo", "lead", live)
    page.section("What was learned")
    page.times(["frame", "flow"], [("film.mp4", [[picture(40 * i) for i in range(frames)]] * 2)])
    page.write(path)


@pytest.mark.slow
def test_a_served_page_grows_and_its_slider_moves_time(tmp_path, chromium):
    growing(tmp_path / "report.html", "training ...", 2)
    server = PageServer(tmp_path / "report.html")

    async def look():
        async with browser_tab(chromium) as tab:
            await tab.open(server.address, 1000, 700)
            assert "training ..." in await tab.js("document.querySelector('.live').textContent")
            growing(tmp_path / "report.html", "", 4)
            await tab.wait("!document.body.dataset.live && document.querySelectorAll('.cell')[0].children.length === 4")
            await tab.js("(() => { const s = document.querySelector('.times input'); s.value = 3;"
                         " s.dispatchEvent(new Event('input')); })()")  # fmt: skip
            shown = await tab.js(
                "[...document.querySelectorAll('.cell')].map(c => [...c.children].findIndex(i => !i.hidden))"
            )
            assert shown == [3, 3] and await tab.js("document.querySelector('.times output').textContent") == "4 / 4"
            await tab.screenshot(tmp_path / "report.png")
            assert tab.problems == []

    try:
        asyncio.run(look())
    finally:
        server.close()


@pytest.mark.slow
def test_a_click_lights_up_what_is_like_it(tmp_path, chromium):
    """Two pictures, left half one feature, right half another: the right half goes dark when the left is clicked."""
    features = np.zeros((2, 4, 4, 2), np.float32)
    features[:, :, :2, 0] = 1
    features[:, :, 2:, 1] = 1
    page = Page("Features")
    page.section("Nearest patches")
    page.patches([(picture(255), "a"), (picture(255), "b")], features)
    path = page.write(tmp_path / "features.html")

    async def look():
        async with browser_tab(chromium) as tab:
            await tab.open(path.as_uri(), 1000, 700)
            left, top, width, height = await tab.box(".over")
            at = (left + 0.1 * width, top + 0.5 * height)
            await tab.mouse("mousePressed", *at)
            await tab.mouse("mouseReleased", *at)
            await tab.wait("document.querySelectorAll('.over canvas')[1].width > 0")
            alpha = (
                "(x => { const c = document.querySelectorAll('.over canvas')[1];"
                " return c.getContext('2d').getImageData(x * c.width, c.height * 0.9, 1, 1).data[3]; })"
            )
            assert await tab.js(f"{alpha}(0.2)") < 20 and await tab.js(f"{alpha}(0.8)") > 150
            await tab.screenshot(tmp_path / "features.png")
            assert tab.problems == []

    asyncio.run(look())


def test_only_this_page_is_served_and_only_to_this_machine(tmp_path):
    import http.client

    (tmp_path / "report.html").write_text("page")
    (tmp_path / "secret.txt").write_text("secret")
    server = PageServer(tmp_path / "report.html")
    try:
        host = server.address.removeprefix("http://").rstrip("/")
        assert host.startswith("127.0.0.1:")
        for path, header, status in [
            ("/", host, 200), ("/report.html", host, 200), ("/secret.txt", host, 404), ("/../secret.txt", host, 404),
            ("/", "evil.example:80", 404),
        ]:  # fmt: skip
            connection = http.client.HTTPConnection(host, timeout=10)
            connection.putrequest("GET", path, skip_host=True)
            connection.putheader("Host", header)
            connection.endheaders()
            assert connection.getresponse().status == status, (path, header)
            connection.close()
    finally:
        server.close()
