"""The model behind the page: images seen once and remembered, predictions that can be abandoned.

One thread at a time may predict; `image` may be called from any.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinema.models.fpt.data_rules import frame_to_image
from kinema.models.fpt.mixture import GaussianMixture
from kinema.models.fpt.model import FlowPokeTransformer
from kinema.pipelines.page.pictures import Density, density_of
from kinema.pipelines.page.questions import Question

DIVERGENCE_POINTS = 32
"""Points per component of the divergence: enough for a picture, where 128 would take four times as long."""
SHOWN_PX = 768
"""Side of the square that the page shows, at most."""
_UNCONDITIONAL_KEPT = 4


class ImageGone(LookupError):
    """The image was dropped to make room for newer ones."""


class Abandoned(Exception):
    """The prediction was given up in the middle, since nobody waits for it any more."""


class NotFinite(RuntimeError):
    """The model predicts NaN or infinity."""


@dataclass
class SeenImage:
    """What is remembered of an image."""

    id: str
    square: UInt8[np.ndarray, "S S 3"]
    """The part the model sees, as the page shows it."""
    features: dict[str, Tensor]
    """Embedded and projected, for `predict_parallel`."""
    seconds: float
    """What embedding took."""
    unconditional: OrderedDict[tuple[int, bool], GaussianMixture] = field(default_factory=OrderedDict)
    """Predictions without pokes by (side, camera_static)."""


@dataclass(frozen=True)
class Timing:
    """What a prediction cost."""

    seconds: float
    queries: int


@dataclass(frozen=True)
class FieldPrediction:
    """Motion at every point of a grid; cell centres, rows first."""

    mean: Float[np.ndarray, "G G 2"]
    information: Float[np.ndarray, "G G"] | None
    """KL(given the pokes || without any) in nats, if asked for."""
    timing: Timing


@dataclass(frozen=True)
class PointPrediction:
    """The distribution of the motion of one point."""

    mean: tuple[float, float]
    deviation: tuple[float, float]
    entropy_nats: float
    density: Density
    timing: Timing


@dataclass(frozen=True)
class SampledMotion:
    """Random motions of a grid of points."""

    points: Float[np.ndarray, "Q 2"]
    flow: Float[np.ndarray, "N Q 2"]
    timing: Timing


class Predictor:
    """Args: model, in eval mode; device, where it runs; cached_images, how many images are remembered."""

    def __init__(self, model: FlowPokeTransformer, device: str | torch.device = "cpu", cached_images: int = 4):
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self.cached_images = cached_images
        self._images: OrderedDict[str, SeenImage] = OrderedDict()
        self._images_lock = threading.Lock()
        self._abandoned: Callable[[], bool] = _never
        for layer in (self.model.input_mlp, *self.model.transformer.layer_list()):
            layer.register_forward_pre_hook(self._check)

    def look(self, square: UInt8[np.ndarray, "S S 3"]) -> SeenImage:
        """Embed a square picture, or recall it: equal pictures have equal ids."""
        digest = hashlib.blake2b(repr(square.shape).encode() + square.tobytes(), digest_size=16).hexdigest()
        with contextlib.suppress(ImageGone):
            return self.image(digest)
        started = time.perf_counter()
        with torch.inference_mode():
            image = frame_to_image(square)[None].to(self.device)
            features = self.model.project_image(self.model.embed_image(image))
            features["feat"].sum().item()  # waits for the device
        seen = SeenImage(digest, _shown(square), features, time.perf_counter() - started)
        with self._images_lock:
            self._images[digest] = seen
            while len(self._images) > self.cached_images:
                self._images.popitem(last=False)
        return seen

    def image(self, name: str) -> SeenImage:
        """An image by its id. Raises: ImageGone."""
        with self._images_lock:
            if name not in self._images:
                raise ImageGone("the image is no longer in memory; load it again")
            self._images.move_to_end(name)
            return self._images[name]

    def field(
        self, question: Question, side: int, information: bool, abandoned: Callable[[], bool] | None = None
    ) -> FieldPrediction:
        """Mean motion on a grid of side x side points, and what the pokes say about each."""
        with self._abandonable(abandoned):
            seen = self.image(question.image)
            mixture, timing = self._ask(seen, question, grid_points(side))
            nats = None
            if information:
                free = self._unconditional(seen, question.camera_static, side) if question.pokes else mixture
                generator = torch.Generator().manual_seed(0)
                nats = mixture.kl_divergence(free, DIVERGENCE_POINTS, generator).clamp_min(0).view(side, side).numpy()
            return FieldPrediction(mixture.mean.view(side, side, 2).numpy(), nats, timing)

    def point(
        self, question: Question, point: tuple[float, float], abandoned: Callable[[], bool] | None = None
    ) -> PointPrediction:
        """The whole distribution at one point."""
        with self._abandonable(abandoned):
            mixture, timing = self._ask(self.image(question.image), question, torch.tensor([point]))
            one = mixture[0]
            dx, dy = one.mean.tolist()
            sx, sy = one.variance.sqrt().tolist()
            entropy = float(one.entropy(generator=torch.Generator().manual_seed(0)))
            return PointPrediction((dx, dy), (sx, sy), entropy, density_of(one), timing)

    def samples(
        self,
        question: Question,
        side: int,
        num_samples: int,
        joint: bool,
        seed: int,
        abandoned: Callable[[], bool] | None = None,
    ) -> SampledMotion:
        """Random motions of side x side points.

        Args: joint, whether the points of a sample are drawn one after another, each given those before, so that
            they fit together; otherwise each is drawn by itself.
        """
        with self._abandonable(abandoned):
            seen, points = self.image(question.image), grid_points(side)
            generator = torch.Generator().manual_seed(seed)
            if not joint:
                mixture, timing = self._ask(seen, question, points)
                return SampledMotion(points.numpy(), mixture.sample((num_samples,), generator).numpy(), timing)
            started = time.perf_counter()
            pokes = self._pokes(question).expand(num_samples, -1, -1)
            queries = points.to(self.device).expand(num_samples, -1, -1)
            with torch.inference_mode():
                flow = self.model.predict_autoregressive(
                    pokes[..., :2],
                    pokes[..., 2:],
                    queries,
                    question.camera_static,
                    seen.features,
                    randomize_order=True,
                    generator=generator,
                ).cpu()
            _check_finite(flow)
            timing = Timing(time.perf_counter() - started, num_samples * len(points))
            return SampledMotion(points.numpy(), flow.double().numpy(), timing)

    def _ask(self, seen: SeenImage, question: Question, points: Float[Tensor, "Q 2"]) -> tuple[GaussianMixture, Timing]:
        """Mixtures [Q] on the CPU."""
        started = time.perf_counter()
        pokes = self._pokes(question)
        with torch.inference_mode():
            mixture = self.model.predict_parallel(
                pokes[..., :2], pokes[..., 2:], points.to(self.device)[None], question.camera_static, seen.features
            )[0].to("cpu")
        _check_finite(mixture.loc, mixture.scale_tril)
        return mixture, Timing(time.perf_counter() - started, len(points))

    def _unconditional(self, seen: SeenImage, camera_static: bool, side: int) -> GaussianMixture:
        key = (side, camera_static)
        if key not in seen.unconditional:
            nothing = Question(seen.id, (), camera_static)
            seen.unconditional[key] = self._ask(seen, nothing, grid_points(side))[0]
            if len(seen.unconditional) > _UNCONDITIONAL_KEPT:
                seen.unconditional.popitem(last=False)
        return seen.unconditional[key]

    def _pokes(self, question: Question) -> Float[Tensor, "1 P 4"]:
        return torch.tensor(question.pokes, dtype=torch.float32, device=self.device).view(1, -1, 4)

    @contextlib.contextmanager
    def _abandonable(self, abandoned: Callable[[], bool] | None) -> Iterator[None]:
        """Meanwhile, every layer asks first whether the prediction is still wanted."""
        self._abandoned = abandoned or _never
        try:
            yield
        finally:
            self._abandoned = _never

    def _check(self, *_: object) -> None:
        if self._abandoned():
            raise Abandoned


def grid_points(side: int) -> Float[Tensor, "Q 2"]:
    """Centres (x, y) of side x side cells, rows first."""
    ticks = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def _check_finite(*tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NotFinite("the model predicts numbers that are not finite; its weights are damaged or it has diverged")


def _shown(square: UInt8[np.ndarray, "S S 3"]) -> UInt8[np.ndarray, "s s 3"]:
    import cv2

    if len(square) <= SHOWN_PX:
        return square
    return cv2.resize(square, (SHOWN_PX, SHOWN_PX), interpolation=cv2.INTER_AREA)


def _never() -> bool:
    return False
