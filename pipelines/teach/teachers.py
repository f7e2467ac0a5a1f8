"""The flow networks behind one call: features of a frame once, then flow of any pairs of frames.

Images are resized here (short_side), never enlarged; flow is in pixels of the image the network saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from kinema.configs.models.row import resolve
from kinema.configs.models.table import MODELS
from kinema.models.cuda_graphs import Graphed
from kinema.models.dinoflow.model import DinoFlowFeatures, FlowModel
from kinema.models.flow.dis import DIS
from kinema.models.flow.networks import flow_network
from kinema.models.flow.raft.network import RAFT, FrameFeatures
from kinema.models.flow.sea_raft.network import SEARAFT
from kinema.models.flow.waft.network import WAFT
from kinema.models.weights import file_sha256, local_file
from kinema.pipelines.precision import autocast
from kinema.pipelines.teach.protocol import FlowEstimate, Teacher
from kinema.pipelines.teach.tiling import TiledTeacher
from kinema.pipelines.train.checkpoint import weights_file


@dataclass(frozen=True)
class TeacherSpec:
    """All that decides a teacher's numbers, and where it runs. Travels to actors; weights go by path."""

    name: str
    """A teacher of the table of models."""
    weights: str = ""
    """Local path of the checkpoint; empty for a teacher without."""
    weights_hash: str = ""
    """sha256 of that file; empty for a teacher without."""
    iters: int = 0
    """Refinement iterations; 0 for the preset of dis."""
    scale: int = 0
    """The network sees frames at 2^scale times their size (SEA-RAFT, WAFT)."""
    padding: str = "sintel"
    """How RAFT and SMURF pad frames to multiples of 8: `sintel` or `kitti`."""
    short_side: int = 0
    """Shorter side the frames are reduced to; 0 keeps them."""
    max_pixels: int = 0
    """Frames with more pixels than this (after short_side) are too large for the network; 0: none is."""
    too_large: str = "downscale"
    """What becomes of those: downscale (flow is stored at the reduced size), or tile."""
    uncertainty: bool = False
    """Also ask for the network's own expected error."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: str = "fp32"
    """fp32, or bf16 autocast."""
    cuda_graphs: bool = True
    """Whether work on a GPU is repeated as graphs (models/cuda_graphs.py)."""
    threads: int = 1
    """CPU threads."""

    def load(self) -> Teacher:
        """Build the network and load its weights. Raises: ValueError for weights that do not fit."""
        if self.max_pixels and self.too_large == "tile":
            of_a_tile = replace(self, short_side=0, max_pixels=0)
            return TiledTeacher(of_a_tile.load(), self.max_pixels, self.flow_size)
        facts = MODELS[self.name].teacher
        assert facts is not None, f"{self.name} is no teacher"
        return resolve(facts.load)(self)

    def flow_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which the flow of frames of this size is computed and stored."""
        height, width = reduced_size(height, width, self.short_side)
        if self.max_pixels and self.too_large == "downscale" and height * width > self.max_pixels:
            scale = math.sqrt(self.max_pixels / (height * width))
            return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        return height, width


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """CPU threads of torch and OpenCV inside the block; with them, the last bits of a network's output are fixed."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def locate_weights(name: str, weights: str) -> tuple[str, str]:
    """Local file and sha256 of a teacher's weights; both empty for one without.

    Args: weights, a path or http(s) URL, or a training run of the network; empty means the published file.
    Raises: ValueError, one line that names weights=, when there is none or it does not fit the network.
    """
    row = MODELS[name]
    if row.teacher is not None and not row.teacher.needs_weights:
        if weights:
            raise ValueError(
                f"weights={weights}: the teacher {name} has no weights; use teacher=raft or leave weights out"
            )
        return "", ""
    path = local_file(weights_file(weights), row.weights or name)
    row.make(weights=path)  # a wrong file is refused before an artifact is tied to its hash
    return str(path), file_sha256(path)


def reduced_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side at most `short_side`; 0 keeps the size."""
    shorter = min(height, width)
    if not short_side or shorter <= short_side:
        return height, width
    return max(1, round(height * short_side / shorter)), max(1, round(width * short_side / shorter))


def to_image(frame: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], device: str) -> Float[Tensor, "1 3 h w"]:
    """RGB bytes as float in 0..1, at `size` (height, width), reduced with antialiasing."""
    image = torch.from_numpy(np.ascontiguousarray(frame)).to(device).permute(2, 0, 1)[None].float() / 255
    if size != tuple(image.shape[-2:]):
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
    return image


class DISTeacher:
    """OpenCV's Dense Inverse Search; needs no weights."""

    def __init__(self, spec: TeacherSpec):
        self.spec = spec
        self.network = DIS()

    def features(self, frame: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, "1 3 h w"]:
        """The reduced image itself."""
        return to_image(frame, self.spec.flow_size(*frame.shape[:2]), "cpu")

    def flow(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> FlowEstimate:
        """One solver call a pair."""
        first, second = (torch.cat(images) for images in zip(*pairs, strict=True))
        return FlowEstimate(self.network(first, second, iters=self.spec.iters or None))


def _has_graphs(spec: TeacherSpec) -> bool:
    return spec.cuda_graphs and spec.device == "cuda"


class _NetworkTeacher:
    """What the networks share: weights, device, precision, and features that are computed once per frame."""

    def __init__(self, spec: TeacherSpec):
        self.spec = spec
        network = flow_network(spec.name, weights=spec.weights, scale=spec.scale)
        self.network: Any = network.to(spec.device).eval()
        self._encode: Callable[[Tensor], Any] = self._encoded
        self._estimate: Callable[[Any, Any], FlowEstimate] = self._estimated
        if _has_graphs(spec):
            self._encode, self._estimate = Graphed(self._encoded), Graphed(self._estimated)

    @torch.inference_mode()
    def features(self, frame: UInt8[np.ndarray, "H W 3"]) -> Any:
        """What `encode` of the network gives of one frame."""
        return self._encode(to_image(frame, self.spec.flow_size(*frame.shape[:2]), self.spec.device))

    @torch.inference_mode()
    def flow(self, pairs: Sequence[tuple[Any, Any]]) -> FlowEstimate:
        """All pairs in one network call."""
        stack = type(pairs[0][0]).stack
        first, second = (stack(features) for features in zip(*pairs, strict=True))
        return self._estimate(first, second)

    def _encoded(self, image: Tensor) -> Any:
        with autocast(self.spec.precision, self.spec.device):
            return self.network.encode(image)

    def _estimated(self, first: Any, second: Any) -> FlowEstimate:
        raise NotImplementedError


class RAFTTeacher(_NetworkTeacher):
    """RAFT, RAFT-small or SMURF; each frame passes through both encoders once."""

    network: RAFT

    def __init__(self, spec: TeacherSpec):
        super().__init__(spec)
        self.network.padding = spec.padding

    def _estimated(self, first: FrameFeatures, second: FrameFeatures) -> FlowEstimate:
        with autocast(self.spec.precision, self.spec.device):
            return FlowEstimate(self.network.flow_from_features(first, second, iters=self.spec.iters).float())


class DinoFlowTeacher(_NetworkTeacher):
    """DinoFlow; each frame passes through the encoder once."""

    network: FlowModel

    def _estimated(self, first: DinoFlowFeatures, second: DinoFlowFeatures) -> FlowEstimate:
        with autocast(self.spec.precision, self.spec.device):
            return FlowEstimate(self.network.flow_from_features(first, second).float())


class MixtureTeacher(_NetworkTeacher):
    """SEA-RAFT or WAFT, which state the error they expect; what looks at one frame alone is run once per frame."""

    network: SEARAFT | WAFT

    def _estimated(self, first: Any, second: Any) -> FlowEstimate:
        """The flow, and the error that the mixture expects where the spec asks for it."""
        with autocast(self.spec.precision, self.spec.device):
            if not self.spec.uncertainty:
                return FlowEstimate(self.network.flow_from_features(first, second, iters=self.spec.iters).float())
            flow, info = self.network.prediction_from_features(first, second, iters=self.spec.iters)
        return FlowEstimate(flow.float(), self.network.uncertainty(info.float())[:, 0])
