"""A headless Chromium for tests, driven over its DevTools protocol.

As a program it takes a picture of the page: `python tests/pipelines/chromium.py URL OUT.png [--dark] [--view=flow]`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
KEY_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, "Delete": 46, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
KEY_CODES |= {"ArrowDown": 40, " ": 32}
START_S = 60.0


def find_chromium() -> str | None:
    """The browser's program, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One open page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._ids = socket, itertools.count(1)
        self.problems: list[str] = []
        """Exceptions and errors the page's console has seen."""

    async def call(self, method: str, **params):
        """A DevTools command and its result."""
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = json.loads((await self._socket.receive(timeout=60)).data)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message)

    def _note(self, message) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])

    async def open(self, url: str, width: int = 1280, height: int = 900, mobile: bool = False) -> None:
        """Load a page in a window of this size."""
        for domain in ("Page", "Runtime", "Log", "DOM"):
            await self.call(f"{domain}.enable")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)
        await self.call("Page.navigate", url=url)
        await self.wait("document.readyState === 'complete'")

    async def js(self, expression: str):
        """The value of an expression in the page."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def wait(self, expression: str, timeout_s: float = 30.0):
        """Wait until the expression is true; returns it."""
        end = time.monotonic() + timeout_s
        while not (value := await self.js(expression)):
            assert time.monotonic() < end, f"never true: {expression}; {self.problems}"
            await asyncio.sleep(0.02)
        return value

    async def mouse(self, kind: str, x: float, y: float, **extra) -> None:
        """kind: mousePressed, mouseMoved or mouseReleased."""
        button = "none" if kind == "mouseMoved" and not extra.get("buttons") else "left"
        extra.setdefault("clickCount", 0 if kind == "mouseMoved" else 1)
        await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, **extra)

    async def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 5) -> None:
        """Press, move and release the mouse."""
        await self.mouse("mouseMoved", *start)
        await self.mouse("mousePressed", *start, buttons=1)
        for step in range(1, steps + 1):
            at = [a + (b - a) * step / steps for a, b in zip(start, end, strict=True)]
            await self.mouse("mouseMoved", *at, buttons=1)
        await self.mouse("mouseReleased", *end)

    async def swipe(self, start: tuple[float, float], end: tuple[float, float], steps: int = 5) -> None:
        """The same with a finger."""
        await self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": start[0], "y": start[1]}])
        for step in range(1, steps + 1):
            x, y = (a + (b - a) * step / steps for a, b in zip(start, end, strict=True))
            await self.call("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": x, "y": y}])
        await self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    async def key(self, name: str, shift: bool = False) -> None:
        """Press and release a key."""
        text = {"Enter": "\r", " ": " "}.get(name)
        common = {"key": name, "code": name, "windowsVirtualKeyCode": KEY_CODES[name], "modifiers": 8 * shift}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def choose_file(self, selector: str, path: Path) -> None:
        """Fill a file input, as the dialog would."""
        document = await self.call("DOM.getDocument")
        node = await self.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node["nodeId"])

    async def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height on the screen."""
        rect = f"document.querySelector({selector!r}).getBoundingClientRect()"
        return tuple(await self.js(f"(() => {{ const r = {rect}; return [r.x, r.y, r.width, r.height]; }})()"))

    async def screenshot(self, path: Path, whole: bool = False) -> bytes:
        """The window, or the whole page, as PNG."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        data = base64.b64decode(shot["data"])
        Path(path).write_bytes(data)
        return data


@contextlib.asynccontextmanager
async def browser_tab(program: str) -> AsyncIterator[Tab]:
    """A browser of its own with one empty tab; it is gone afterwards, with its profile."""
    profile = tempfile.mkdtemp(prefix="kinema-chromium-")
    flags = ["--headless=new", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    flags += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server", "--mute-audio"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-extensions"]
    process = subprocess.Popen(
        [program, *flags, "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = await _debugging_port(Path(profile) / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                target = next(t for t in await answer.json() if t["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Tab(socket)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        shutil.rmtree(profile, ignore_errors=True)


async def _debugging_port(file: Path, process: subprocess.Popen) -> int:
    end = time.monotonic() + START_S
    while True:
        assert process.poll() is None, f"chromium ended with status {process.returncode}"
        assert time.monotonic() < end, f"chromium did not open its debugging port in {START_S:g} s"
        if file.exists() and (lines := file.read_text().split()):
            return int(lines[0])
        await asyncio.sleep(0.05)


async def picture_of_page(url: str, out: Path, view: str = "flow", dark: bool = False, size=(1280, 1000)) -> None:
    """Load the page's example, poke it twice, look at one point, and save what the window shows."""
    program = find_chromium()
    assert program, f"none of {', '.join(NAMES)} is installed"
    async with browser_tab(program) as tab:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await tab.call("Emulation.setEmulatedMedia", features=[scheme])
        await tab.open(url, *size)
        await tab.wait("document.body.dataset.ready")
        await tab.js("document.getElementById('example-first').click()")
        await tab.wait("document.body.dataset.image", 120)
        left, top, width, height = await tab.box("#stage")

        def at(x: float, y: float) -> tuple[float, float]:
            return left + x * width, top + y * height

        await tab.js(f"document.querySelector('input[value={view}]').click()")
        await tab.drag(at(0.5, 0.5), at(0.62, 0.44))
        await tab.drag(at(0.2, 0.75), at(0.26, 0.8))
        await tab.drag(at(0.6, 0.65), at(0.6, 0.65))
        await tab.wait("!document.body.classList.contains('busy')", 300)
        await tab.screenshot(out)


if __name__ == "__main__":
    words = [a for a in sys.argv[1:] if not a.startswith("--")]
    chosen = next((a.partition("=")[2] for a in sys.argv[1:] if a.startswith("--view=")), "flow")
    asyncio.run(picture_of_page(words[0], Path(words[1]), chosen, "--dark" in sys.argv))
