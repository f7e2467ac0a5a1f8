"""Error of the consensus beside its members', where the true motion is known.

`python -m kinema.pipelines.bench.consensus WEIGHTS [FOLDER]`: rendered scenes and, with a folder that holds
`sintel/training`, `middlebury` and `kitti` pairs, real ones. Members: RAFT-small with these weights, DIS, and chained
DIS where frames in between (or, for neighbours, one beside them) are at hand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from kinema.models.flow.consensus import consensus
from kinema.models.flow.dis import DIS
from kinema.models.flow.geometry import warp
from kinema.models.flow.raft.network import raft_small
from kinema.pipelines.scenes import Scene
from kinema.pipelines.sidecars.flow_files import read_flow

SEEDS = range(700, 705)
ITERS = 12


class Pair(NamedTuple):
    """Two frames with known motion between them, and a way from one to the other over a third."""

    name: str
    frames: Mapping[int, Tensor]
    first: int
    second: int
    path: Sequence[int]
    truth: np.ndarray
    known: np.ndarray


def run(weights: str, folder: str = "", seeds: Sequence[int] = SEEDS) -> None:
    """Print a row per pair: end-point error of every member and of the consensus, px, and the ratio to the best."""
    raft, dis, worst = raft_small(weights=weights), DIS(), 0.0
    for pair in [*_scenes(seeds), *(_real(Path(folder)) if folder else [])]:
        a, b = pair.frames[pair.first], pair.frames[pair.second]
        with torch.inference_mode():
            members = {"raft_small": (raft(a, b, iters=ITERS)[0], raft(b, a, iters=ITERS)[0])}
            members["dis"] = (dis(a, b)[0], dis(b, a)[0])
            if pair.path:
                members["chain"] = (_chained(dis, pair.frames, pair.path), _chained(dis, pair.frames, pair.path[::-1]))
            there, back = zip(*members.values(), strict=True)
            agreed = consensus(a[0], b[0], there, back).flow_px
        each = {name: _error(flow, pair) for name, (flow, _) in members.items()}
        found = _error(agreed, pair)
        ratio = found / min(each.values())
        worst = max(worst, ratio)
        listed = "  ".join(f"{name} {error:.3f}" for name, error in each.items())
        print(f"{pair.name:<16} {listed}  consensus {found:.3f}  ratio to the best {ratio:.3f}", flush=True)
    print(f"largest ratio {worst:.3f}")


def _error(flow: Tensor, pair: Pair) -> float:
    return float(np.hypot(*(flow.numpy() - pair.truth))[pair.known].mean())


def _chained(dis: DIS, frames: Mapping[int, Tensor], path: Sequence[int]) -> Tensor:
    whole = dis(frames[path[0]], frames[path[1]])
    for before, after in zip(path[1:], path[2:], strict=False):
        whole = whole + warp(dis(frames[before], frames[after]), whole)[0]
    return whole[0]


def _scenes(seeds: Sequence[int]) -> Iterator[Pair]:
    for seed in seeds:
        scene = Scene(seed=seed, height=192, width=256, num_frames=6, num_objects=4)
        frames = {t: _image(scene.frame(t)) for t in range(6)}
        for gap, path in ((1, (0, 2, 1)), (4, (0, 1, 2, 3, 4))):
            truth, _ = scene.motion(0, gap)
            yield Pair(f"scene {seed} gap {gap}", frames, 0, gap, path, truth, np.isfinite(truth).all(axis=0))


def _real(folder: Path) -> Iterator[Pair]:
    """Pairs of MPI Sintel's layout with the frame before them, and one of Middlebury and KITTI."""
    training = folder / "sintel" / "training"
    for flow_file in sorted(training.glob("flow/*/frame_*.flo")):
        scene, number = flow_file.parent.name, int(flow_file.stem[-4:])
        unknown = cv2.imread(str(training / "invalid" / scene / f"{flow_file.stem}.png"), cv2.IMREAD_GRAYSCALE)
        for kind in ("clean", "final"):
            files = {t: training / kind / scene / f"frame_{t:04d}.png" for t in (number - 1, number, number + 1)}
            frames = {t: _read(file) for t, file in files.items() if file.is_file()}
            path = (number, number - 1, number + 1) if number - 1 in frames else ()
            truth = read_flow(flow_file)
            known = np.isfinite(truth).all(axis=0) if unknown is None else unknown == 0
            yield Pair(f"{scene} {kind}", frames, number, number + 1, path, truth, known)
    middlebury = folder / "middlebury"
    for flow_file in sorted(middlebury.glob("*_flow10.flo")):
        name, truth = flow_file.stem.removesuffix("_flow10"), read_flow(flow_file)
        frames = {t: _read(middlebury / f"{name}{t + 1}.png") for t in range(2)}
        yield Pair(name, frames, 0, 1, (), truth, np.isfinite(truth).all(axis=0))
    if (folder / "kitti" / "flow_gt.png").is_file():
        truth = read_flow(folder / "kitti" / "flow_gt.png")
        frames = {t: _read(folder / "kitti" / f"frame{t + 1}.png") for t in range(2)}
        yield Pair("kitti", frames, 0, 1, (), truth, np.isfinite(truth).all(axis=0))


def _read(file: Path) -> Tensor:
    picture = cv2.imread(str(file))
    if picture is None:
        raise ValueError(f"{file}: not a picture that can be read")
    return _image(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))


def _image(frame: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() / 255


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
