"""Predictions for the benchmarks' withheld test splits, in the files that their servers take.

- Sintel: `clean/SCENE/frame0001.flo`, `final/...`: what the publishers' `bundler` packs for upload.
- KITTI 2015: `flow/000000_10.png` in a zip archive; KITTI 2012: `000000_10.png` in one.
- Spring: `SCENE/flow_FW_left/flow_FW_left_0001.flo5`: what the publishers' `flow_subsampling` packs for upload.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from kinema.pipelines.flow_datasets import FlowFiles
from kinema.pipelines.sidecars.flow_files import write_flow

SUBMITTED = ("sintel", "kitti2012", "kitti2015", "spring")


def submission_path(dataset: str, pair: FlowFiles) -> Path:
    """Where the prediction of a test pair lies in the submission. Raises: ValueError for a set without a server."""
    if dataset == "sintel":
        scene = pair.scene.rpartition("/")[2]
        return Path(pair.group, scene, f"frame{pair.frame:04d}.flo")
    if dataset == "kitti2015":
        return Path("flow", pair.image1.name)
    if dataset == "kitti2012":
        return Path(pair.image1.name)
    if dataset == "spring":
        scene, camera = pair.scene.split("/")
        way = f"flow_{'FW' if pair.gap > 0 else 'BW'}_{camera}"
        return Path(scene, way, f"{way}_{pair.frame:04d}.flo5")
    raise ValueError(f"{dataset} takes no submissions here; those that do are {', '.join(SUBMITTED)}")


class Submission:
    """One data set's folder of predictions; `close` packs what its server takes as one file."""

    def __init__(self, folder: Path, dataset: str):
        self.folder, self.dataset = folder, dataset
        self.written: list[Path] = []
        if dataset not in SUBMITTED:
            raise ValueError(f"{dataset} takes no submissions here; those that do are {', '.join(SUBMITTED)}")

    def add(self, pair: FlowFiles, flow_px: Float32[np.ndarray, "2 H W"]) -> Path:
        """Write one prediction, whole or not at all."""
        target = self.folder / submission_path(self.dataset, pair)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".partial{target.suffix}")
        write_flow(partial, flow_px)
        partial.replace(target)
        self.written.append(target)
        return target

    def close(self) -> Path:
        """What to upload, or to hand to the publishers' packer: the archive for KITTI, the folder for the others."""
        if not self.dataset.startswith("kitti"):
            return self.folder
        archive = self.folder / f"{self.dataset}.zip"
        partial = archive.with_suffix(".partial")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as packed:
            for path in self.written:
                # A fixed date: equal predictions, equal archive.
                packed.writestr(zipfile.ZipInfo(path.relative_to(self.folder).as_posix()), path.read_bytes())
        partial.replace(archive)
        return archive
