"""TAP-Vid's files: videos with tracked points, as published (pickles) or as .npz.

A pickle can run any program when it is read in the ordinary way. Here it cannot: `_Reader` knows the handful of
names that numpy arrays are made of, builds the arrays itself from checked parts, and refuses every other name.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, UnidentifiedImageError


@dataclass(frozen=True)
class TapVidVideo:
    """One video with ground truth."""

    name: str
    """Its name in the benchmark, or its number."""
    frames: UInt8[np.ndarray, "T H W 3"]
    """RGB."""
    points: Float[np.ndarray, "N T 2"]
    """(x, y) in 0..1 of the picture."""
    occluded: Bool[np.ndarray, "N T"]
    """Where the point is not seen."""


def find_files(source: str | Path) -> list[Path]:
    """The benchmark's files: `source` itself, or the .pkl and .npz files of that folder.

    Raises: ValueError that says what was looked for and what is there.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(
            f"{source}: no such file or folder; give TAP-Vid's .pkl file or a folder of .pkl or .npz files"
        )
    files = sorted(p for p in source.iterdir() if p.suffix in (".pkl", ".npz") and p.is_file())
    if not files:
        found = ", ".join(sorted(p.name for p in source.iterdir())[:8]) or "nothing"
        raise ValueError(f"{source}: no .pkl or .npz file of TAP-Vid in it; found {found}")
    return files


class TapVidFiles:
    """The videos of a benchmark file or folder, one file in memory at a time; iterate over them.

    Pickles hold a mapping (DAVIS, RoboTAP) or a list (Kinetics, RGB-Stacking) of mappings with `video` (uint8
    frames, or the bytes of a picture each), `points` and `occluded`; a .npz file holds these three arrays.

    Raises: ValueError, one line that names the file, for anything else; at once if there are no files.
    """

    def __init__(self, source: str | Path) -> None:
        self.files = find_files(source)
        self.num_known = 0
        """Videos in the files that were opened so far."""

    def __iter__(self) -> Iterator[TapVidVideo]:
        self.num_known = 0
        for path in self.files:
            entries = _entries(path)
            self.num_known += len(entries)
            while entries:
                name, entry = entries.pop(0)
                yield _video(path, name, entry)


def _entries(path: Path) -> list[tuple[str, Any]]:
    """Names and contents of a file's videos."""
    if path.suffix == ".npz":
        return [(path.stem, _read_npz(path))]
    content = read_arrays(path)
    if isinstance(content, dict):
        return [(str(name), entry) for name, entry in content.items()]
    if isinstance(content, list):
        return [(f"{path.stem}-{number:04d}", entry) for number, entry in enumerate(content)]
    raise ValueError(f"{path}: holds {type(content).__name__}; a mapping or list of videos is needed")


def write_npz(video: TapVidVideo, path: str | Path) -> None:
    """Store a video in the form that needs no pickle."""
    np.savez_compressed(path, video=video.frames, points=video.points, occluded=video.occluded)


def read_arrays(path: str | Path) -> Any:
    """The content of a pickle of numpy arrays and plain containers; nothing else is admitted, nothing is run.

    Raises: ValueError that names what the file holds beside those, or that it is damaged.
    """
    with open(path, "rb") as stream:
        try:
            return _finished(_Reader(stream).load())
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path}: {error}; only numpy arrays and plain containers are read, or use .npz"
            ) from error
        except (EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path}: not a pickle of arrays, or cut short ({error})") from error
        except (MemoryError, RecursionError) as error:
            raise ValueError(f"{path}: not a pickle of arrays ({type(error).__name__})") from error


class _Dtype:
    """Stands for numpy.dtype while a pickle is read."""

    def __init__(self, spec: Any, *_: Any) -> None:
        if not isinstance(spec, str | bytes):
            raise pickle.UnpicklingError("an array of a compound type")
        text = spec.decode("ascii") if isinstance(spec, bytes) else spec
        self.dtype = np.dtype(text)
        if self.dtype.kind not in "biufSUO" or self.dtype.names or self.dtype.subdtype:
            raise pickle.UnpicklingError(f"an array of type {text}")

    def __setstate__(self, state: tuple) -> None:
        _version, order, subdtype, names, fields = state[:5]
        if subdtype or names or fields:
            raise pickle.UnpicklingError("an array of a compound type")
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for numpy.ndarray while a pickle is read; `value` is the array, or a list for an array of objects."""

    def __init__(self, *_: Any) -> None:
        self.value: Any = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, kind, fortran, data = state
        self.value = _array(data, kind, shape, "F" if fortran else "C")


class _BufferArray(_Array):
    """Stands for numpy's way to describe an array by its buffer (protocol 5)."""

    def __init__(self, data: Any, kind: Any, shape: Any, order: Any) -> None:
        self.value = _array(data, kind, shape, order)


class _Scalar(_Array):
    """Stands for a single number of numpy."""

    def __init__(self, kind: Any, data: Any = b"") -> None:
        self.value = _array(data, kind, (), "C")[()]


class _Bytes(bytes):
    """Stands for the bytes that old protocols describe as text to be encoded."""

    def __new__(cls, text: Any, encoding: Any = "latin1") -> _Bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("text in an encoding other than latin1")
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("bytes with attributes")


class _Mapping(dict):
    """Stands for an ordered dictionary."""

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("a mapping with attributes")


def _array(data: Any, kind: Any, shape: Any, order: str) -> Any:
    if not isinstance(kind, _Dtype) or order not in ("C", "F") or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("an array whose parts do not fit")
    if kind.dtype.kind == "O":
        if type(data) is not list or len(shape) != 1 or len(data) != shape[0]:
            raise pickle.UnpicklingError("an array of objects of more than one dimension")
        return data
    raw = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote bytes as text
    if not isinstance(raw, bytes | bytearray) or len(raw) != math.prod(shape) * kind.dtype.itemsize:
        raise pickle.UnpicklingError("an array whose bytes and shape disagree")
    return np.frombuffer(raw, kind.dtype).reshape(shape, order=order)  # type: ignore[call-overload]


# Arrays are described as calls of these; older files say numpy.core where newer ones say numpy._core. All are
# classes that say themselves what a state may set: a pickle can also set attributes of what it was given by name.
_ADMITTED: dict[tuple[str, str], type] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _BufferArray for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Bytes,
    ("collections", "OrderedDict"): _Mapping,
}


class _Reader(pickle.Unpickler):
    """Unpickler for which no names exist but those of `_ADMITTED`."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"holds {module}.{name}")
        return _ADMITTED[module, name]


def _finished(value: Any) -> Any:
    """The arrays in place of what stood for them."""
    if isinstance(value, _Array):
        return _finished(value.value) if isinstance(value.value, list) else value.value
    if isinstance(value, dict):
        return {key: _finished(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finished(entry) for entry in value]
    return bytes(value) if isinstance(value, _Bytes) else value


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file of arrays ({error})") from error


def _video(path: Path, name: str, entry: Any) -> TapVidVideo:
    if not isinstance(entry, dict) or not {"video", "points", "occluded"} <= set(entry):
        found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{path}: {name} needs video, points and occluded; it has {found}")
    frames = _frames(path, name, entry["video"])
    points, occluded = np.asarray(entry["points"]), np.asarray(entry["occluded"])
    if points.ndim != 3 or points.shape[1:] != (len(frames), 2) or occluded.shape != points.shape[:2]:
        raise ValueError(
            f"{path}: {name} has points {list(points.shape)} and occluded {list(occluded.shape)}; "
            f"with {len(frames)} frames they must be [N, {len(frames)}, 2] and [N, {len(frames)}]"
        )
    return TapVidVideo(name, frames, points.astype(np.float32), occluded.astype(bool))


def _frames(path: Path, name: str, stored: Any) -> np.ndarray:
    if isinstance(stored, list) and stored and isinstance(stored[0], bytes):
        stored = np.stack([_decoded(path, name, picture) for picture in stored])
    frames = np.asarray(stored)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"{path}: {name} has a video of {frames.dtype} {list(frames.shape)}, not uint8 [T, H, W, 3]")
    return frames if frames.flags.writeable else frames.copy()


def _decoded(path: Path, name: str, picture: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            return np.array(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: {name} has a frame that is no picture ({error})") from error
