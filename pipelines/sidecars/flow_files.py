"""Flow files: Middlebury .flo, KITTI 16-bit png, .pfm, Spring's .flo5, and KITTI disparity.

Flow is float32 [2, H, W], (x, y) in pixels; a pixel without flow is nan in both components. Each format has a mark of
its own for such pixels (.flo values above 1e9, KITTI the third channel, .pfm the third component, .flo5 nan in both);
nan anywhere else is no measurement and no mark: the file is refused.

KITTI stores 64 u + 32768 in 16 bits. Like the benchmark's own tools the writer truncates (no rounding,
float32 arithmetic), clips to the 16-bit range, and stores missing pixels as zeros; so a round trip is
off by -1/128 px on average. `missing_value=32768` stores missing pixels as zero motion instead, as some
tools do; the valid channel is what readers go by.
"""

import re
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float32

FlowArray = Float32[np.ndarray, "2 H W"]

FLO_MAGIC = b"PIEH"
FLO_UNKNOWN = np.float32(1666666800.0)
FLO_UNKNOWN_ABOVE = 1e9
KITTI_ZERO, KITTI_STEPS_PER_PX = 32768, 64.0
FLO5_NAME = "flow"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def read_flow(path: str | Path) -> FlowArray:
    """Reads .flo, .pfm, .flo5 or KITTI .png, by suffix.

    Raises: ValueError for another suffix, or a file that is not of its format.
    """
    readers = {".flo": read_flo, ".pfm": read_pfm, ".png": read_kitti_flow, ".flo5": read_flo5}
    return _by_suffix(path, readers)(path)


def write_flow(path: str | Path, flow_px: FlowArray) -> None:
    """Writes .flo, .pfm, .flo5 or KITTI .png, by suffix; nan marks missing pixels."""
    writers = {".flo": write_flo, ".pfm": write_pfm, ".png": write_kitti_flow, ".flo5": write_flo5}
    _by_suffix(path, writers)(path, flow_px)


def valid_pixels(flow_px: FlowArray) -> Bool[np.ndarray, "H W"]:
    """Where a flow read from a file has a value."""
    return np.isfinite(flow_px).all(axis=0)


def read_flo(path: str | Path) -> FlowArray:
    """Middlebury .flo; components above 1e9 mean unknown."""
    data = Path(path).read_bytes()
    if data[:4] != FLO_MAGIC or len(data) < 12:
        raise ValueError(f"{path}: not a .flo file (it must start with {FLO_MAGIC.decode()})")
    width, height = np.frombuffer(data, "<i4", 2, offset=4).tolist()
    if width < 1 or height < 1 or len(data) != 12 + 8 * width * height:
        raise ValueError(
            f"{path}: a .flo of {height}x{width} has {12 + 8 * width * height} bytes, this one {len(data)}"
        )
    pixels = np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2)
    _refuse_nan(path, np.isnan(pixels), "unknown pixels of a .flo hold values above 1e9")
    return _without_unknown(pixels)


def write_flo(path: str | Path, flow_px: FlowArray) -> None:
    """Middlebury .flo; missing pixels get the format's unknown value."""
    pixels = _pixels(flow_px)
    pixels = np.where(np.isfinite(pixels).all(-1, keepdims=True), pixels, FLO_UNKNOWN).astype("<f4")
    height, width, _ = pixels.shape
    Path(path).write_bytes(FLO_MAGIC + np.array([width, height], "<i4").tobytes() + pixels.tobytes())


def read_kitti_flow(path: str | Path) -> FlowArray:
    """KITTI flow png: (raw - 32768) / 64 where the third channel is set."""
    raw = _read_png16(path, channels=3)
    flow = (raw[..., :2].astype(np.float32) - KITTI_ZERO) / np.float32(KITTI_STEPS_PER_PX)
    return _planar(np.where(raw[..., 2:] > 0, flow, np.float32(np.nan)))


def write_kitti_flow(path: str | Path, flow_px: FlowArray, missing_value: int = 0) -> None:
    """KITTI flow png; values beyond -512 .. 511.98 px are clipped (see the module for the rounding)."""
    pixels = _pixels(flow_px)
    valid = np.isfinite(pixels).all(-1, keepdims=True)
    steps = np.where(valid, pixels, np.float32(0)) * np.float32(KITTI_STEPS_PER_PX) + np.float32(KITTI_ZERO)
    raw = np.clip(steps, 0, 65535).astype(np.uint16)
    raw = np.where(valid, raw, np.uint16(missing_value))
    _write_png16(path, np.concatenate([raw, valid.astype(np.uint16)], axis=-1))


def read_kitti_disparity(path: str | Path) -> Float32[np.ndarray, "H W"]:
    """KITTI disparity png in pixels (raw / 256); nan where raw is 0. As flow it is (-disparity, 0)."""
    raw = _read_png16(path, channels=1)
    return np.where(raw > 0, raw / np.float32(256.0), np.float32(np.nan)).astype(np.float32)


def write_kitti_disparity(path: str | Path, disparity_px: Float32[np.ndarray, "H W"]) -> None:
    """KITTI disparity png: 256 times the value, truncated; nan is stored as 0."""
    known = np.nan_to_num(disparity_px, nan=0.0) * np.float32(256.0)
    _write_png16(path, np.clip(known, 0, 65535).astype(np.uint16))


def disparity_to_flow(disparity_px: Float32[np.ndarray, "H W"]) -> FlowArray:
    """Motion from the left to the right picture: (-disparity, 0), nan where unknown."""
    return np.stack([-disparity_px, np.where(np.isnan(disparity_px), disparity_px, 0)]).astype(np.float32)


def read_pfm(path: str | Path) -> FlowArray:
    """Three-channel .pfm: (u, v, missing flag), rows from bottom to top; flag above 0.5 means missing."""
    data = Path(path).read_bytes()
    header = re.match(rb"PF[ \t\r]*\n(\d+) (\d+)[ \t\r]*\n([+-]?\d*\.?\d+(?:[eE][+-]?\d+)?)[ \t\r]*\n", data)
    if header is None:
        raise ValueError(f"{path}: not a colour .pfm (lines 'PF', 'WIDTH HEIGHT', 'SCALE' expected)")
    width, height, scale = int(header[1]), int(header[2]), float(header[3])
    payload = data[header.end() :]
    if len(payload) != 12 * width * height:
        raise ValueError(
            f"{path}: a .pfm of {height}x{width} has {12 * width * height} bytes of pixels, this one {len(payload)}"
        )
    # The sign of the scale tells the byte order; its magnitude is ignored, as by other readers of flow.
    pixels = np.frombuffer(payload, "<f4" if scale < 0 else ">f4").reshape(height, width, 3)[::-1]
    missing = pixels[..., 2:] > 0.5
    _refuse_nan(path, ~np.isfinite(pixels[..., :2]) & ~missing, "missing pixels of a .pfm have 1 as third component")
    flow = np.where(missing, np.nan, pixels[..., :2])
    return _planar(flow.astype(np.float32))


def write_pfm(path: str | Path, flow_px: FlowArray) -> None:
    """Three-channel little-endian .pfm; missing pixels keep nan and get flag 1."""
    pixels = _pixels(flow_px)
    missing = ~np.isfinite(pixels).all(-1, keepdims=True)
    rows = np.concatenate([np.where(missing, np.nan, pixels), missing], axis=-1)[::-1].astype("<f4")
    height, width, _ = rows.shape
    Path(path).write_bytes(f"PF\n{width} {height}\n-1.000000\n".encode() + rows.tobytes())


def read_flo5(path: str | Path) -> FlowArray:
    """Spring's .flo5: an HDF5 file with one array `flow` [H, W, 2]; nan in both components means missing.

    Spring stores it at twice the height and width of its images, in pixels of these (see flow_datasets.spring).
    """
    import h5py  # here, for it costs start-up time that only this format needs

    with open(path, "rb") as file:
        magic = file.read(len(_HDF5_MAGIC))
    if magic != _HDF5_MAGIC:
        raise ValueError(f"{path}: not a .flo5 file: it starts with {magic!r}, an HDF5 file with {_HDF5_MAGIC!r}")
    try:
        with h5py.File(path, "r") as file:
            if FLO5_NAME not in file:
                raise ValueError(f"{path}: it holds {sorted(file)}, a .flo5 holds an array named {FLO5_NAME!r}")
            stored = file[FLO5_NAME]
            shape: tuple[int, ...] = getattr(stored, "shape", ())
            kind = getattr(stored, "dtype", None)
            if len(shape) != 3 or shape[2] != 2 or min(shape) < 1 or kind is None or kind.kind != "f":
                raise ValueError(f"{path}: flow is {kind} {list(shape)}; a .flo5 holds floats [H, W, 2]")
            pixels = np.asarray(stored[()], np.float32)
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: cut short or damaged: {' '.join(str(error).split())}; copy it again") from None
    missing = np.isnan(pixels)
    _refuse_nan(path, (missing != missing[..., ::-1]) | np.isinf(pixels), "missing pixels of a .flo5 are nan in both")
    return _planar(pixels)


def write_flo5(path: str | Path, flow_px: FlowArray) -> None:
    """Spring's .flo5, compressed as the published files are; missing pixels are nan in both components."""
    import h5py

    pixels = _pixels(flow_px)
    pixels = np.where(np.isfinite(pixels).all(-1, keepdims=True), pixels, np.float32(np.nan))
    with h5py.File(path, "w") as file:
        file.create_dataset(FLO5_NAME, data=pixels, compression="gzip", compression_opts=5)


def _refuse_nan(path: str | Path, wrong: np.ndarray, mark: str) -> None:
    """Raises: ValueError when a component is neither a number nor the format's mark of a missing pixel."""
    num_wrong = int(wrong.any(axis=-1).sum())
    if num_wrong:
        raise ValueError(f"{path}: flow of {num_wrong} pixels is not a number; {mark}, so write the file anew")


def _by_suffix(path: str | Path, functions: dict):
    suffix = Path(path).suffix.lower()
    if suffix not in functions:
        raise ValueError(f"{path}: unknown flow format {suffix!r}; use one of {', '.join(functions)}")
    return functions[suffix]


def _pixels(flow_px: np.ndarray) -> np.ndarray:
    if flow_px.ndim != 3 or flow_px.shape[0] != 2:
        raise ValueError(f"flow is {list(flow_px.shape)}; it must be [2, H, W]")
    return np.moveaxis(np.asarray(flow_px, dtype=np.float32), 0, -1)


def _planar(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


def _without_unknown(pixels: np.ndarray) -> np.ndarray:
    unknown = ~(np.abs(pixels) <= FLO_UNKNOWN_ABOVE).all(axis=-1, keepdims=True)
    return _planar(np.where(unknown, np.float32(np.nan), pixels).astype(np.float32))


def _read_png16(path: str | Path, channels: int) -> np.ndarray:
    data = np.frombuffer(Path(path).read_bytes(), np.uint8)
    raw = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if raw is None or raw.dtype != np.uint16 or (raw.shape[2] if raw.ndim == 3 else 1) != channels:
        found = "unreadable" if raw is None else f"{raw.dtype} {list(raw.shape)}"
        raise ValueError(f"{path}: not a 16-bit png with {channels} channel(s): {found}")
    return raw[..., ::-1] if channels == 3 else raw


def _write_png16(path: str | Path, raw: np.ndarray) -> None:
    ok, data = cv2.imencode(".png", np.ascontiguousarray(raw[..., ::-1]) if raw.ndim == 3 else raw)
    if not ok:
        raise ValueError(f"{path}: a picture of {list(raw.shape)} cannot be stored as png")
    Path(path).write_bytes(data.tobytes())
