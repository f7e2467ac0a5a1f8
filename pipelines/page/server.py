"""The page's web server: static files, images in, predictions out, as JSON.

Nothing a client sends is used as a path: files of the page are known by name when the server starts, clips by number,
images by the hash of their pixels.
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from kinema.models.fpt.data_rules import central_square
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.loader.clip import DamagedClip
from kinema.pipelines.page import pictures
from kinema.pipelines.page.guard import Guard
from kinema.pipelines.page.json_answer import JsonAnswer
from kinema.pipelines.page.predictor import Abandoned, ImageGone, NotFinite, Predictor, SeenImage, Timing
from kinema.pipelines.page.questions import (
    MAX_POKES,
    MAX_SAMPLES,
    NotAnImage,
    TooLarge,
    decode_upload,
    read_int,
    read_json,
    read_point,
    read_question,
)
from kinema.pipelines.page.turns import Busy, Stale, Turns
from kinema.pipelines.pictures.motion import wheel_picture
from kinema.pipelines.scenes import Scene

T = TypeVar("T")

MAX_QUESTION_BYTES = 64 * 1024
FORGOTTEN_BYTES = 64 * 1024 * 1024
"""How much of a body above the limit is still read, so that the browser gets to see the answer."""
CLIPS_PER_LIST = 200
PREVIEW_PX = 512
EXAMPLE_PX = 512
WHEEL_PX = 145
MAX_GRID, MAX_SAMPLE_GRID = 64, 32
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_STATUS: dict[type[Exception], int] = {TooLarge: 413, NotAnImage: 415, DamagedClip: 422, ValueError: 400}


@dataclass(frozen=True)
class PageFacts:
    """What the page says about the model and its limits."""

    model: str
    """The model as the user named it."""
    note: str
    """What a reader must know about the weights; empty if nothing."""
    untrained: bool
    """Whether the weights are random."""
    max_upload_bytes: int
    max_megapixels: float
    grid: int
    """Queries a side of dense pictures, to begin with."""


class PageServer:
    """Handlers and what they share. Args: clips, frames to choose from, if any."""

    def __init__(self, predictor: Predictor, facts: PageFacts, clips: ClipIndex | None = None):
        self.facts, self.predictions, self.device = facts, 0, predictor.device
        self._predictor, self._clips = predictor, clips
        self._turns = Turns()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._files, self._wheel = _static_files(), _wheel()

    def app(self) -> Guard:
        """The ASGI application."""
        get = [
            ("/api/state", self.state),
            ("/api/clips", self.list_clips),
            ("/api/clips/{clip:int}/{frame:int}", self.preview),
            ("/api/image/{image}", self.show_image),
            ("/wheel.png", self.wheel),
            *((f"/{name}", self.file) for name in self._files if name != "index.html"),
        ]
        post = [
            ("/api/image", self.upload),
            ("/api/frame", self.pick_frame),
            ("/api/example", self.example),
            ("/api/field", self.field),
            ("/api/point", self.point),
            ("/api/samples", self.samples),
        ]
        routes = [Route("/", _answered(self.file))]
        routes += [Route(path, _answered(handler), methods=["GET"]) for path, handler in get]
        routes += [Route(path, _answered(handler), methods=["POST"]) for path, handler in post]
        return Guard(Starlette(routes=routes, exception_handlers={HTTPException: _http_error}))

    def close(self) -> None:
        """Give up running work."""
        self._turns.close()
        self._reader.shutdown(wait=False)

    async def file(self, request: Request) -> Response:
        """A file of the page."""
        name = request.url.path.removeprefix("/") or "index.html"
        return Response(self._files[name], media_type=_MEDIA_TYPES[os.path.splitext(name)[1]])

    async def wheel(self, request: Request) -> Response:
        """The legend of the flow's colours."""
        return Response(self._wheel, media_type="image/png")

    async def state(self, request: Request) -> Response:
        """What the page needs to know at its start."""
        return JsonAnswer(
            {
                "model": self.facts.model,
                "note": self.facts.note,
                "untrained": self.facts.untrained,
                "device": str(self._predictor.device),
                "clips_per_list": CLIPS_PER_LIST,
                "clips": 0 if self._clips is None else len(self._clips),
                "grid": self.facts.grid,
                "max_upload_bytes": self.facts.max_upload_bytes,
                "max_pokes": MAX_POKES,
                "max_samples": MAX_SAMPLES,
                "max_grid": MAX_GRID,
                "max_sample_grid": MAX_SAMPLE_GRID,
            }
        )

    async def list_clips(self, request: Request) -> Response:
        """Some clips, from `start` on."""
        clips = self._some_clips()
        try:
            start = int(request.query_params.get("start", "0"))
        except ValueError:
            raise ValueError("start must be a whole number") from None
        start = min(max(start, 0), len(clips) - 1)
        columns = ["source", "num_frames", "width", "height", "fps_num", "fps_den"]
        rows = clips.table.select(columns).slice(start, CLIPS_PER_LIST).to_pylist()
        listed = [
            {
                "number": start + i,
                "label": f"{start + i}: {row['source']}",
                "frames": row["num_frames"],
                "fps": round(row["fps_num"] / row["fps_den"], 3),
            }
            for i, row in enumerate(rows)
        ]
        return JsonAnswer({"total": len(clips), "start": start, "clips": listed})

    async def preview(self, request: Request) -> Response:
        """A frame's square, small, before it is chosen."""
        number, frame = request.path_params["clip"], request.path_params["frame"]
        square = await self._read(lambda: self._frame(number, frame))
        return Response(await self._read(lambda: pictures.png(_small(square))), media_type="image/png")

    async def show_image(self, request: Request) -> Response:
        """The square that the model sees of an image."""
        square = self._predictor.image(request.path_params["image"]).square
        return Response(await self._read(lambda: pictures.png(square)), media_type="image/png")

    async def upload(self, request: Request) -> Response:
        """A picture as the request's body."""
        limit = self.facts.max_upload_bytes
        data = await _body(request, limit, f"the file is larger than {limit / 1e6:g} MB; choose a smaller one")
        if not data:
            raise NotAnImage("the file is empty; choose a picture")
        return await self._look(request, lambda: decode_upload(data, self.facts.max_megapixels))

    async def pick_frame(self, request: Request) -> Response:
        """A frame of a clip, both by number."""
        body = await _json_body(request)
        number, frame = (read_int(body, name, 0, 2**31 - 1, 0) for name in ("clip", "frame"))
        return await self._look(request, lambda: self._frame(number, frame))

    async def example(self, request: Request) -> Response:
        """The first frame of a rendered scene, by its seed."""
        seed = read_int(await _json_body(request), "number", 0, 9999, 0)
        return await self._look(request, lambda: _example(seed))

    async def field(self, request: Request) -> Response:
        """Mean motion over the image, and where the pokes say most."""
        body = await _json_body(request)
        question, side = read_question(body), read_int(body, "side", 1, MAX_GRID, self.facts.grid)
        information = body.get("information", False) is True

        def work(abandoned: Callable[[], bool]) -> dict[str, Any]:
            found = self._predictor.field(question, side, information, abandoned)
            longest = pictures.full_colour(found.mean)
            answer = {
                "side": side,
                "flow": _rounded(found.mean),
                "full_colour": round(longest, 5),
                "flow_picture": pictures.data_uri(pictures.flow_overlay(found.mean, longest)),
            }
            if found.information is not None:
                heat, hottest = pictures.heat_overlay(found.information)
                answer |= {"heat_picture": pictures.data_uri(heat), "hottest_nats": round(hottest, 3)}
            return answer | _cost(found.timing)

        return await self._predict(request, "field", work)

    async def point(self, request: Request) -> Response:
        """The distribution at one point."""
        body = await _json_body(request)
        question, point = read_question(body), read_point(body.get("point"))

        def work(abandoned: Callable[[], bool]) -> dict[str, Any]:
            found = self._predictor.point(question, point, abandoned)
            return {
                "point": point,
                "mean": _rounded(found.mean),
                "deviation": _rounded(found.deviation),
                "entropy_nats": round(found.entropy_nats, 3),
                "modes": _rounded(found.density.modes),
                "reach": round(found.density.reach, 6),
                "picture": pictures.data_uri(found.density.picture),
            } | _cost(found.timing)

        return await self._predict(request, "point", work)

    async def samples(self, request: Request) -> Response:
        """Random motions of a grid of points."""
        body = await _json_body(request)
        question, side = read_question(body), read_int(body, "side", 1, MAX_SAMPLE_GRID, 8)
        num, seed = read_int(body, "samples", 1, MAX_SAMPLES, 4), read_int(body, "seed", 0, 2**31 - 1, 0)
        joint = body.get("joint", False) is True

        def work(abandoned: Callable[[], bool]) -> dict[str, Any]:
            found = self._predictor.samples(question, side, num, joint, seed, abandoned)
            return {"side": side, "points": _rounded(found.points), "flow": _rounded(found.flow)} | _cost(found.timing)

        return await self._predict(request, "samples", work)

    async def _look(self, request: Request, read: Callable[[], np.ndarray]) -> Response:
        square = await self._read(read)

        def work(_: Callable[[], bool]) -> SeenImage:
            return self._predictor.look(square)

        seen = await self._turns.run(_client(request), "image", work, request.is_disconnected)
        side = len(seen.square)
        return JsonAnswer({"image": seen.id, "side_px": side, "milliseconds": round(seen.seconds * 1e3, 1)})

    async def _predict(self, request: Request, kind: str, work: Callable[[Callable[[], bool]], Any]) -> Response:
        answer = await self._turns.run(_client(request), kind, work, request.is_disconnected)
        self.predictions += 1
        return JsonAnswer(answer)

    async def _read(self, work: Callable[[], T]) -> T:
        """Work on pictures, beside the model, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def _some_clips(self) -> ClipIndex:
        if self._clips is None:
            raise HTTPException(404, "no clips were given; start the page with clips=DIR")
        return self._clips

    def _frame(self, number: int, frame: int) -> np.ndarray:
        clips = self._some_clips()
        if not 0 <= number < len(clips):
            raise HTTPException(404, f"there is no clip {number}; there are {len(clips)}")
        clip = clips.clip(number)
        if not 0 <= frame < clip.num_frames:
            raise HTTPException(404, f"clip {number} has no frame {frame}; it has {clip.num_frames}")
        return _square(clip.frames([frame])[0])


def _answered(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The handler, with every failure as JSON that the page can show; details stay in the terminal."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except (Stale, Abandoned):
            return _error(409, "nobody waits for this any more", stale=True)
        except ClientDisconnect:
            return _error(400, "the request was cut off")
        except Busy:
            return _error(503, "too many requests are waiting; try again in a moment")
        except NotFinite as error:
            return _error(500, str(error))
        except ImageGone as error:
            return _error(410, str(error), gone=True)
        except ValueError as error:
            status = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
            return _error(status, str(error))
        except HTTPException:
            raise
        except Exception as error:  # noqa: BLE001 - one failed request must not end the page
            if os.environ.get("KINEMA_DEBUG") == "1":
                traceback.print_exception(error)
            line = " ".join(str(error).split())[:300]
            sys.stderr.write(f"kinema demo: {request.url.path}: {type(error).__name__}: {line}\n")
            return _error(500, f"this failed with {type(error).__name__}; the terminal says more")

    return answer


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail)


def _error(status: int, text: str, **flags: bool) -> JsonAnswer:
    return JsonAnswer({"error": text, **flags}, status)


async def _json_body(request: Request) -> Any:
    return read_json(await _body(request, MAX_QUESTION_BYTES, f"the request is larger than {MAX_QUESTION_BYTES} bytes"))


async def _body(request: Request, limit: int, too_large: str) -> bytes:
    """The request's body. Raises: TooLarge."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            chunks.clear()
            if size > limit + FORGOTTEN_BYTES:
                break
        else:
            chunks.append(chunk)
    if size > limit:
        raise TooLarge(too_large)
    return b"".join(chunks)


def _client(request: Request) -> str:
    """Which open page asks; at most a short word is kept of what it says."""
    return request.headers.get("x-page", "")[:40]


def _static_files() -> dict[str, bytes]:
    folder = resources.files("kinema.pipelines.page") / "static"
    return {f.name: f.read_bytes() for f in folder.iterdir() if os.path.splitext(f.name)[1] in _MEDIA_TYPES}


def _wheel() -> bytes:
    """The colour wheel as PNG, clear outside the circle."""
    picture = wheel_picture(WHEEL_PX)
    middle = (WHEEL_PX - 1) / 2
    y, x = np.mgrid[:WHEEL_PX, :WHEEL_PX] - middle
    inside = np.where(np.hypot(x, y) <= middle, 255, 0).astype(np.uint8)
    return pictures.png(np.dstack([picture, inside]))


def _square(frame: np.ndarray) -> np.ndarray:
    top, left, side = central_square(*frame.shape[:2])
    return np.ascontiguousarray(frame[top : top + side, left : left + side])


def _example(seed: int) -> np.ndarray:
    return Scene(seed=seed, height=EXAMPLE_PX, width=EXAMPLE_PX, num_frames=2).frame(0)


def _small(square: np.ndarray) -> np.ndarray:
    import cv2

    if len(square) <= PREVIEW_PX:
        return square
    return cv2.resize(square, (PREVIEW_PX, PREVIEW_PX), interpolation=cv2.INTER_AREA)


def _rounded(values: Any) -> Any:
    return np.asarray(values, np.float64).round(5).tolist()


def _cost(timing: Timing) -> dict[str, Any]:
    rate = timing.queries / max(timing.seconds, 1e-9)
    return {
        "milliseconds": round(timing.seconds * 1e3, 2),
        "queries": timing.queries,
        "queries_per_second": round(rate, 1),
    }
