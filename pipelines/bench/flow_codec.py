"""The flow sidecar against other ways to store the same flow: size, encode, decode, measured side by side."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kinema.pipelines.bench.paired import paired
from kinema.pipelines.scenes import Scene
from kinema.pipelines.sidecars.flow_codec import FlowBlob, FlowPair, encode_clip_flow
from kinema.pipelines.sidecars.flow_files import read_kitti_flow, write_kitti_flow


def run(height: int = 480, width: int = 864, num_pairs: int = 8, rounds: int = 3) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}: of sizes, ours / other, smaller is better; of times, other / ours.

    The flow is DIS flow of a rendered scene: as noisy as a teacher's, unlike the scene's exact flow. KITTI's PNG has
    the same step of 1/64 px; fp16 keeps some values finer and large ones coarser.
    """
    flows = _teacher_flows(height, width, num_pairs)

    def encode() -> bytes:
        pairs = [FlowPair(t, 1, flow) for t, flow in enumerate(flows)]
        return encode_clip_flow(
            pairs, height=height, width=width, teacher="dis", weights_hash="none", frames=num_pairs + 1
        )

    with tempfile.TemporaryDirectory(prefix="kinema-bench-") as name:
        png = Path(name) / "flow.png"
        ways: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
            "ours": (encode, lambda data: _decode(data, num_pairs)),
            "fp16 npz": (lambda: _npz(flows), _npz_decode),
            "KITTI PNG": (lambda: _kitti_pngs(flows, png), lambda files: _kitti_decode(files, png)),
            "fp16 as it is": (lambda: [flow.astype(np.float16).tobytes() for flow in flows], _raw_decode),
        }
        stored = {way: pack() for way, (pack, _) in ways.items()}
        times = {
            "encode": paired({way: pack for way, (pack, _) in ways.items()}, rounds),
            "decode": paired({way: partial(unpack, stored[way]) for way, (_, unpack) in ways.items()}, rounds),
        }
    kib = {way: _num_bytes(data) / num_pairs / 1024 for way, data in stored.items()}
    rows = []
    for other in [way for way in ways if way != "ours"]:
        title = f"against {other}, {width}x{height}"
        rows.append(
            {
                "name": f"flow codec size {title}",
                "value": kib["ours"],
                "baseline": kib[other],
                "ratio": kib["ours"] / kib[other],
                "unit": "KiB/pair",
            }
        )
        rows += [
            found.row(f"flow codec {what} {title}", "ours", other, "ms/pair", 1e3 / num_pairs)
            for what, found in times.items()
        ]
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


def _num_bytes(stored: bytes | list[bytes]) -> int:
    return len(stored) if isinstance(stored, bytes) else sum(len(data) for data in stored)


def _kitti_pngs(flows: list[np.ndarray], scratch: Path) -> list[bytes]:
    files = []
    for flow in flows:
        write_kitti_flow(scratch, flow)
        files.append(scratch.read_bytes())
    return files


def _kitti_decode(files: list[bytes], scratch: Path) -> None:
    for data in files:
        scratch.write_bytes(data)
        read_kitti_flow(scratch)


def _raw_decode(files: list[bytes]) -> None:
    for data in files:
        np.frombuffer(data, np.float16).astype(np.float32)
