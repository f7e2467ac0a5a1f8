"""The page of `kinema demo fpt` in a real browser: mouse, keyboard, touch. Screenshots lie in the tests' folder."""

import asyncio
import re

import pytest

from kinema.pipelines.page.predictor import Predictor
from kinema.pipelines.scenes import Scene

from .chromium import browser_tab, find_chromium
from .served_page import Served, encoded, random_model, two_clips

OVERLAY = "document.getElementById('overlay').src"
DENSITY = "document.getElementById('inset').toDataURL()"
STATUS = "document.getElementById('status').textContent"
POINT = "document.getElementById('point-numbers').innerText"


@pytest.fixture(scope="module")
def served(fill, tmp_path_factory):
    served = Served(
        Predictor(random_model(fill), cached_images=1), two_clips(tmp_path_factory.mktemp("page") / "clips")
    )
    yield served
    served.close()


@pytest.fixture(scope="module")
def chromium():
    return find_chromium() or pytest.skip("no chromium on this machine; on Debian: apt-get install chromium")


async def answered(tab, action):
    """Do something on the page, and wait until a prediction has come back and nothing is under way."""
    before = int(await tab.js("Number(document.body.dataset.answers || 0)"))
    await action
    await tab.wait(f"Number(document.body.dataset.answers || 0) > {before}")
    await tab.wait("!document.body.classList.contains('busy')")


async def pokes(tab):
    """The poke list as (right, down) in percent; the mouse meets whole pixels, so that they are near the aim."""
    items = await tab.js("Array.from(document.querySelectorAll('#poke-list span')).map((e) => e.textContent)")
    return [in_percent(item.partition(":")[2]) for item in items]


def in_percent(text):
    """`20.0 % left, 10.0 % down` as (-20, 10)."""
    found = re.findall(r"([\d.]+) %(?: (left|right|up|down))?", text)
    return [-float(number) if word in ("left", "up") else float(number) for number, word in found]


def near(*values):
    return pytest.approx(list(values), abs=0.3)


def test_in_a_browser_with_mouse_and_keyboard(served, chromium, tmp_path):
    picture = tmp_path / "scene.png"
    picture.write_bytes(encoded(Scene(seed=5, height=96, width=128, num_frames=2).frame(0)))
    text = tmp_path / "notes.txt"
    text.write_text("not a picture")

    async def scenario(tab):
        await tab.open(served.url)
        await tab.wait("document.body.dataset.ready")
        assert "random weights" in await tab.js("document.getElementById('note').textContent")
        await tab.choose_file("#file", text)
        await tab.wait("!document.getElementById('error').hidden")
        assert "notes.txt" in await tab.js("document.getElementById('error').textContent")

        await tab.choose_file("#file", picture)
        await tab.wait("document.body.dataset.image")
        left, top, width, height = await tab.box("#stage")
        assert width == pytest.approx(height, abs=1)

        def at(x, y):
            return left + x * width, top + y * height

        # Looking at a point shows its density over the picture.
        await answered(tab, tab.mouse("mouseMoved", *at(0.3, 0.3)))
        assert not await tab.js("document.getElementById('density').hidden")
        first_density = await tab.js(DENSITY)
        assert in_percent((await tab.js(POINT)).splitlines()[1]) == near(30, 30)

        # Dragging a poke changes the mean flow.
        await answered(tab, tab.js("document.querySelector('input[value=flow]').click()"))
        unpoked = await tab.js(OVERLAY)
        before = await tab.screenshot(tmp_path / "unpoked.png")
        await answered(tab, tab.drag(at(0.4, 0.5), at(0.6, 0.4)))
        assert await pokes(tab) == [near(20, -10)]
        poked = await tab.js(OVERLAY)
        assert poked != unpoked
        assert before != await tab.screenshot(tmp_path / "poked.png")
        assert re.search(r"Whole picture: 256 queries in [\d.]+ ms \([\d,]+ queries/s\)", await tab.js(STATUS))

        # So does moving its tip, and its start takes the poke along.
        await answered(tab, tab.drag(at(0.6, 0.4), at(0.6, 0.7)))
        assert await pokes(tab) == [near(20, 20)]
        await answered(tab, tab.drag(at(0.4, 0.5), at(0.3, 0.3)))
        assert await pokes(tab) == [near(20, 20)]
        assert await tab.js(OVERLAY) not in (unpoked, poked)
        await answered(tab, tab.mouse("mouseMoved", *at(0.3, 0.31)))
        assert await tab.js(DENSITY) != first_density

        # Keys: the tip has the focus after its drag; the start was dragged last.
        await tab.js("document.querySelector('[data-part=tip]').focus()")
        await answered(tab, tab.key("ArrowRight"))
        assert await pokes(tab) == [near(21, 20)]
        await answered(tab, tab.key("ArrowUp", shift=True))
        assert await pokes(tab) == [near(21, 15)]
        await tab.key("Escape")
        assert await tab.js("document.activeElement.id") == "stage"
        await answered(tab, tab.key("ArrowLeft"))
        assert in_percent((await tab.js(POINT)).splitlines()[1]) == near(49, 50)
        await answered(tab, tab.key("Enter"))
        assert await pokes(tab) == [near(21, 15), near(10, 0)]
        assert "Poke 2, tip" in await tab.js("document.activeElement.getAttribute('aria-label')")
        await tab.screenshot(tmp_path / "keyboard.png")
        await answered(tab, tab.key("Delete"))
        assert await pokes(tab) == [near(21, 15)]
        assert "Poke 1, tip" in await tab.js("document.activeElement.getAttribute('aria-label')")
        await tab.key("Tab")
        assert await tab.js("document.getElementById('stage').contains(document.activeElement)") is False

        # The other views.
        await answered(tab, tab.js("document.querySelector('input[value=part]').click()"))
        assert re.fullmatch(r"\d+\.\d\d nats", await tab.js("document.getElementById('hottest').textContent"))
        assert await tab.js(OVERLAY) != poked
        await tab.screenshot(tmp_path / "part.png")
        await answered(tab, tab.js("document.querySelector('input[value=samples]').click()"))
        await answered(tab, tab.js("document.querySelector('input[name=joint][value=yes]').click()"))
        assert "Samples: 400 queries" in await tab.js(STATUS)
        assert await tab.js("document.getElementById('shown').options.length") == 5
        await tab.screenshot(tmp_path / "samples.png")
        # The server has forgotten the picture meanwhile: the page sends it again.
        served.post("/api/example", {})
        await answered(tab, tab.js("document.getElementById('static').click()"))
        assert await tab.js("document.getElementById('error').hidden")

        # A frame of a clip.
        image = await tab.js("document.body.dataset.image")
        await tab.js("document.getElementById('frame').value = 3")
        await tab.js("document.getElementById('frame').dispatchEvent(new Event('change'))")
        await tab.wait(f"document.body.dataset.image !== '{image}'")
        assert await pokes(tab) == []
        assert [text for text in tab.problems if "410" not in text] == []

    run_in_browser(chromium, scenario)


def test_in_a_browser_on_a_phone(served, chromium, tmp_path):
    async def scenario(tab):
        await tab.call("Emulation.setTouchEmulationEnabled", enabled=True)
        await tab.open(served.url, width=390, height=844, mobile=True)
        await tab.wait("document.body.dataset.ready")
        await tab.js("document.getElementById('example-first').click()")
        await tab.wait("document.body.dataset.image")
        assert await tab.js("document.documentElement.scrollWidth") <= 390
        left, top, width, height = await tab.box("#stage")
        await tab.js("document.querySelector('input[value=flow]').click()")
        await tab.wait("!document.getElementById('overlay').hidden")
        start, end = (left + 0.5 * width, top + 0.5 * height), (left + 0.5 * width, top + 0.8 * height)
        await answered(tab, tab.swipe(start, end))
        assert await pokes(tab) == [near(0, 30)]
        point = (left + 0.2 * width, top + 0.2 * height)
        await answered(tab, tab.swipe(point, point))
        assert in_percent((await tab.js(POINT)).splitlines()[1]) == near(20, 20)
        assert await tab.js("window.scrollY") == 0, "a finger on the picture pokes and does not scroll"
        await tab.screenshot(tmp_path / "phone.png", whole=True)
        assert tab.problems == []

    run_in_browser(chromium, scenario)


def run_in_browser(program, scenario):
    async def run():
        async with browser_tab(program) as tab:
            await scenario(tab)

    asyncio.run(run())
