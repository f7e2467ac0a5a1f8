"""The page of a search in a real browser: the query and what was found play side by side, also on a phone."""

import asyncio

import numpy as np
import pytest

from kinema.configs import SearchConfig
from kinema.pipelines import search

from .chromium import browser_tab, find_chromium
from .motion_features import moving_clips, write_motion

FILMS = "[...document.querySelectorAll('video')]"


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["h264", "mpeg4", "mjpeg"])
def test_films_play(tmp_path, codec):
    chromium = find_chromium() or pytest.skip("no chromium on this machine; on Debian: apt-get install chromium")
    clips = moving_clips(tmp_path / "clips", 12, side=64, codec=codec)
    rng = np.random.default_rng(0)
    motion = [np.eye(8)[number % 8] + 0.1 * rng.normal(size=(8, 8)) for number in range(12)]
    write_motion(tmp_path / "features", clips, iter(motion))
    key = clips.samples(["key"])["key"][2].as_py()
    found = search.run(SearchConfig(clips=clips.url, features=str(tmp_path / "features"), query=key,
                                    out=str(tmp_path / "found"), k=6))  # fmt: skip
    assert found.results[0].key == clips.samples(["key"])["key"][10].as_py(), "the other clip that moves right"

    async def look():
        async with browser_tab(chromium) as tab:
            await tab.open(f"file://{found.page}", 1100, 1600)  # a film out of sight does not play
            await tab.wait(f"{FILMS}.every(v => v.readyState >= 2 && v.videoWidth === 64)")
            assert await tab.js("document.querySelectorAll('video').length") == 7
            await tab.wait(f"{FILMS}.every(v => v.currentTime > 0 && !v.paused)")
            await tab.screenshot(tmp_path / "search.png")
            await tab.open(f"file://{found.page}", width=390, height=844, mobile=True)
            assert await tab.js("document.documentElement.scrollWidth") <= 390
            assert tab.problems == []

    asyncio.run(look())
