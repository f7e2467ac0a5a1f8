"""The flow sidecar against an fp16 .npz of the same flow: size, encode, decode, measured side by side."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import cv2
import numpy as np

from kinema.pipelines.scenes import Scene
from kinema.pipelines.sidecars.flow_codec import FlowBlob, FlowPair, encode_clip_flow

T = TypeVar("T")


def run(height: int = 480, width: int = 864, num_pairs: int = 8) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}; ratio = ours / fp16 npz, smaller is better.

    The flow is DIS flow of a rendered scene: as noisy as a teacher's, unlike the scene's exact flow.
    """
    flows = _teacher_flows(height, width, num_pairs)
    rows = []

    def encode() -> bytes:
        pairs = [FlowPair(t, 1, flow) for t, flow in enumerate(flows)]
        return encode_clip_flow(
            pairs, height=height, width=width, teacher="dis", weights_hash="none", frames=num_pairs + 1
        )

    blob, encode_s = _fastest(encode)
    npz, npz_encode_s = _fastest(lambda: _npz(flows))
    _, decode_s = _fastest(lambda: _decode(blob, num_pairs))
    _, npz_decode_s = _fastest(lambda: _npz_decode(npz))
    for name, value, baseline, unit in [
        ("size", len(blob) / num_pairs / 1024, len(npz) / num_pairs / 1024, "KiB/pair"),
        ("encode", encode_s / num_pairs * 1e3, npz_encode_s / num_pairs * 1e3, "ms/pair"),
        ("decode", decode_s / num_pairs * 1e3, npz_decode_s / num_pairs * 1e3, "ms/pair"),
    ]:
        rows.append(
            {
                "name": f"flow codec {name} against fp16 npz, {width}x{height}",
                "value": value,
                "baseline": baseline,
                "ratio": value / baseline,
                "unit": unit,
            }
        )
    return rows


def _teacher_flows(height: int, width: int, num_pairs: int) -> list[np.ndarray]:
    scene = Scene(seed=3, height=height, width=width, num_frames=num_pairs + 1)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in scene.frames()]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = []
    for first, second in itertools.pairwise(gray):
        flow = np.asarray(dis.calc(first, second, None))  # type: ignore[call-overload]  # stubs omit None
        flows.append(np.ascontiguousarray(flow.transpose(2, 0, 1)))
    return flows


def _npz(flows: list[np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, *(flow.astype(np.float16) for flow in flows))
    return buffer.getvalue()


def _npz_decode(data: bytes) -> None:
    with np.load(io.BytesIO(data)) as arrays:
        for name in arrays.files:
            arrays[name].astype(np.float32)


def _decode(data: bytes, num_pairs: int) -> None:
    blob = FlowBlob(data)
    for t in range(num_pairs):
        blob.flow(t, 1)


def _fastest(function: Callable[[], T], repeats: int = 3) -> tuple[T, float]:
    """The result and the fastest of a few runs, in seconds: other load only ever adds time."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
    return result, min(times)
