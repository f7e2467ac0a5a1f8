"""A small generated sample of every data set, in its published layout: known motion, exact files, for tests.

Every sequence shows one noise texture that shifts by a constant step of whole pixels, so that flow, occlusion (what
leaves the frame) and sizes have answers that a test can state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from kinema.pipelines.flow_datasets.rendered_sets import THINGS_FRAMES
from kinema.pipelines.sidecars.flow_files import write_flow

STEP_XY = (3, -2)
"""Motion from each frame to the next, in pixels."""


@dataclass(frozen=True)
class Shifting:
    """A texture that moves by STEP_XY a frame."""

    height: int
    width: int
    seed: int = 0

    def image(self, t: int) -> UInt8[np.ndarray, "H W 3"]:
        """Frame t, RGB."""
        rng = np.random.default_rng(self.seed)
        noise = rng.integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        texture = np.asarray(cv2.GaussianBlur(noise, (5, 5), 1.2, borderType=cv2.BORDER_REFLECT), np.uint8)
        return np.roll(texture, (t * STEP_XY[1], t * STEP_XY[0]), axis=(0, 1))

    def flow_px(self, gap: int = 1) -> Float32[np.ndarray, "2 H W"]:
        """Flow over `gap` frames."""
        flow = np.empty((2, self.height, self.width), np.float32)
        flow[0], flow[1] = gap * STEP_XY[0], gap * STEP_XY[1]
        return flow

    def leaves(self, gap: int = 1) -> Bool[np.ndarray, "H W"]:
        """Where the pixel is out of the frame after `gap` frames."""
        y, x = np.mgrid[: self.height, : self.width]
        x, y = x + gap * STEP_XY[0], y + gap * STEP_XY[1]
        return (x < 0) | (y < 0) | (x >= self.width) | (y >= self.height)


def write_tiny(name: str, root: str | Path, height: int = 48, width: int = 64) -> Path:
    """Write the sample of a data set. Returns: its folder. Raises: ValueError for an unknown name."""
    if name not in _WRITERS:
        raise ValueError(f"flow data set {name!r} is not known; use one of {', '.join(_WRITERS)}")
    _WRITERS[name](Path(root), height, width)
    return Path(root)


def _chairs(root: Path, height: int, width: int) -> None:
    for number in (1, 2, 3):
        shot = Shifting(height, width, number)
        for k in (1, 2):
            _picture(root / "data" / f"{number:05d}_img{k}.ppm", shot.image(k - 1))
        _flow(root / "data" / f"{number:05d}_flow.flo", shot.flow_px())
    (root / "FlyingChairs_train_val.txt").write_text("1\n2\n1\n")


def _things(root: Path, height: int, width: int) -> None:
    shot = Shifting(height, width)
    for camera in ("left", "right"):
        for rendering in ("clean", "final"):
            for t in THINGS_FRAMES:
                _picture(root / f"frames_{rendering}pass/TRAIN/A/0000/{camera}/{t:04d}.png", shot.image(t))
        for into, gap in (("future", 1), ("past", -1)):
            for t in THINGS_FRAMES:
                name = f"OpticalFlowInto{into.title()}_{t:04d}_{camera[0].upper()}.pfm"
                _flow(root / f"optical_flow/TRAIN/A/0000/into_{into}/{camera}" / name, shot.flow_px(gap))


def _sintel(root: Path, height: int, width: int) -> None:
    for seed, scene in enumerate(("alley_1", "cave_2")):
        shot = Shifting(height, width, seed)
        for t in (1, 2, 3):
            for rendering in ("clean", "final"):
                _picture(root / f"training/{rendering}/{scene}/frame_{t:04d}.png", shot.image(t))
                _picture(root / f"test/{rendering}/{scene}/frame_{t:04d}.png", shot.image(t))
        for t in (1, 2):
            _flow(root / f"training/flow/{scene}/frame_{t:04d}.flo", shot.flow_px())
            _mask(root / f"training/occlusions/{scene}/frame_{t:04d}.png", shot.leaves())
            _mask(root / f"training/invalid/{scene}/frame_{t:04d}.png", _corner(shot))


def _kitti(root: Path, height: int, width: int, kind: str) -> None:
    for number in (0, 1):
        shot = Shifting(height, width, number)
        for part in ("training", "testing"):
            for t in (10, 11):
                _picture(root / part / kind / f"{number:06d}_{t}.png", shot.image(t))
        known = ~_corner(shot)
        _flow(root / f"training/flow_occ/{number:06d}_10.png", np.where(known, shot.flow_px(), np.float32(np.nan)))
        seen = known & ~shot.leaves()
        _flow(root / f"training/flow_noc/{number:06d}_10.png", np.where(seen, shot.flow_px(), np.float32(np.nan)))


def _hd1k(root: Path, height: int, width: int) -> None:
    shot = Shifting(height, width)
    for t in (0, 1, 2):
        _picture(root / f"hd1k_input/image_2/000000_{t:04d}.png", shot.image(t))
        flow = np.where(_corner(shot), np.float32(np.nan), shot.flow_px())
        _flow(root / f"hd1k_flow_gt/flow_occ/000000_{t:04d}.png", flow)


def _spring(root: Path, height: int, width: int) -> None:
    shot = Shifting(height, width)
    for camera in ("left", "right"):
        for t in (1, 2, 3):
            for part, scene in (("train", "0001"), ("test", "0003")):
                _picture(root / f"{part}/{scene}/frame_{camera}/frame_{camera}_{t:04d}.png", shot.image(t))
        for way, gap, starts in (("FW", 1, (1, 2)), ("BW", -1, (2, 3))):
            for t in starts:
                fine = shot.flow_px(gap).repeat(2, axis=1).repeat(2, axis=2)
                fine[0, 1::2] += 0.25  # the lower two of a pixel's four values
                name = f"flow_{way}_{camera}"
                _flow(root / f"train/0001/{name}/{name}_{t:04d}.flo5", fine)
                maps = root / "train/0001/maps"
                unmatched = np.zeros((height, width, 3), np.uint8)
                unmatched[..., 1] = 255 * shot.leaves(gap)  # red: hidden, green: out of the frame
                _picture(maps / f"matchmap_{name}" / f"matchmap_{name}_{t:04d}.png", unmatched)
                _mask(maps / f"detailmap_{name}" / f"detailmap_{name}_{t:04d}.png", _corner(shot))
                nonrigid = _corner(shot).repeat(2, axis=0).repeat(2, axis=1)
                _mask(maps / f"rigidmap_{way}_{camera}" / f"rigidmap_{way}_{camera}_{t:04d}.png", nonrigid)
                _mask(maps / f"skymap_{camera}" / f"skymap_{camera}_{t:04d}.png", nonrigid)


def _tartanair(root: Path, height: int, width: int) -> None:
    shot, place = Shifting(height, width), root / "office/Easy/P000"
    for t in (0, 1, 2):
        _picture(place / "image_left" / f"{t:06d}_left.png", shot.image(t))
    (place / "flow").mkdir(parents=True, exist_ok=True)
    for t in (0, 1):
        stem = place / "flow" / f"{t:06d}_{t + 1:06d}"
        np.save(f"{stem}_flow.npy", np.moveaxis(shot.flow_px(), 0, -1))
        np.save(f"{stem}_mask.npy", (10 * shot.leaves() + 100 * (_corner(shot) & ~shot.leaves())).astype(np.uint8))


def _viper(root: Path, height: int, width: int) -> None:
    shot = Shifting(height, width)
    for t in (10, 11, 20, 21):
        _picture(root / f"train/img/001/001_{t:05d}.png", shot.image(t))
    (root / "train/flow/001").mkdir(parents=True, exist_ok=True)
    for t in (10, 20):
        u, v = np.where(_corner(shot), np.nan, shot.flow_px()).astype(np.float16)
        np.savez(root / f"train/flow/001/001_{t:05d}.npz", u=u, v=v)


def _middlebury(root: Path, height: int, width: int) -> None:
    for seed, name in enumerate(("RubberWhale", "Venus")):
        shot = Shifting(height, width, seed)
        for t in (10, 11):
            _picture(root / f"other-data/{name}/frame{t}.png", shot.image(t))
        flow = np.where(_corner(shot), np.float32(np.nan), shot.flow_px())
        _flow(root / f"other-gt-flow/{name}/flow10.flo", flow)


def _corner(shot: Shifting) -> Bool[np.ndarray, "H W"]:
    """The upper left eighth in each direction: what some data sets have no flow of."""
    mask = np.zeros((shot.height, shot.width), bool)
    mask[: shot.height // 8, : shot.width // 8] = True
    return mask


def _picture(path: Path, rgb: UInt8[np.ndarray, "H W 3"]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), rgb[..., ::-1])


def _mask(path: Path, mask: Bool[np.ndarray, "H W"]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), 255 * mask.astype(np.uint8))


def _flow(path: Path, flow_px: Float32[np.ndarray, "2 H W"]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_flow(path, flow_px)


_WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "flyingchairs": _chairs,
    "flyingthings3d": _things,
    "sintel": _sintel,
    "kitti2012": lambda root, height, width: _kitti(root, height, width, "colored_0"),
    "kitti2015": lambda root, height, width: _kitti(root, height, width, "image_2"),
    "hd1k": _hd1k,
    "spring": _spring,
    "tartanair": _tartanair,
    "viper": _viper,
    "middlebury": _middlebury,
}
