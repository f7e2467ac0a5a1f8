"""How FlowFeat learns: features whose linear map, fitted on one crop, predicts the flow of another.

Two square crops of a frame are encoded. On the first, ridge regression maps the averaged decoder's
features to the teacher's flow; that map, applied to the trained decoder's features of the second crop,
has to give the teacher's flow there. Only the trained features carry gradient.

Source: Araslanov, Sonnweber, Cremers, FlowFeat, NeurIPS 2025, section 3. Deviation: samples whose loss
would be 0/0 are left out of the mean and counted.

Shape legend: B batch, N = 2 B crops, H W image pixels, h w crop pixels, P pixels, F feature width,
G = F + 1 rows of a linear map (features, then the constant).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kinema.models.backbones.dpt import DPTDecoder
from kinema.models.ema import EMA
from kinema.models.flowfeat.model import FROM_SCRATCH, FlowFeat, build_decoder, build_encoder, encoder_maps

# Pixels whose features exist at a time. On a CPU a piece (2 MiB) stays in the cache from the convolution's
# output to the flow; an accelerator wants few large pieces.
PIXELS_PER_PIECE = {"cpu": 4096}
PIXELS_PER_PIECE_ELSEWHERE = 1 << 20


@dataclass(frozen=True)
class FlowFeatLossConfig:
    """Weights and constants of FlowFeat's training loss, with their published values."""

    ridge_alpha: float = 0.1
    """Ridge added to the normal equations: 0.1 for YouTube-VOS, 1.0 for Kinetics."""
    flow_weight: float = 0.1
    """Weight of the flow loss (L1)."""
    edge_weight: float = 1.0
    """Weight of the loss on flow edges."""
    edge_sigma: float = 0.1
    """Teacher edge strength, in standard deviations of the flow, at which edges begin to count."""
    fit_with: Literal["averaged", "trained"] = "averaged"
    """Which decoder's features the map is fitted on: the averaged one's, without gradient, as published; or the trained
    one's, with the gradient through the fit, from which an encoder learns from scratch."""

    def __post_init__(self) -> None:
        for name in ("ridge_alpha", "edge_sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive; use {getattr(type(self), name)}")


@dataclass
class TrainingLosses:
    """What one training step yields; losses are means over the valid samples."""

    total: Float[Tensor, ""]
    """Weighted sum; the only term with gradient a trainer needs. 0 if no sample is valid."""
    flow: Float[Tensor, ""]
    """L1 between student's and teacher's flow, u and v added, mean over pixels."""
    edge: Float[Tensor, ""]
    """Weighted difference of flow gradients, x and y added."""
    valid: Bool[Tensor, "B"]
    """Samples that entered the losses; the others' teacher flow is not finite or has no edges to weigh."""
    student_flow: Float[Tensor, "B 2 h w"]
    """Flow that the student predicts on the second crop, in standard deviations of the teacher's."""
    teacher_flow: Float[Tensor, "B 2 h w"]
    """Standardised teacher flow on the second crop."""

    @property
    def num_skipped(self) -> int:
        """Samples left out of the losses."""
        return int((~self.valid).sum())


def crop_matrix(
    size: tuple[int, int],
    dy: float,
    dx: float,
    scale: float,
    angle_deg: float = 0.0,
    flip: float = 1.0,
) -> Float[Tensor, "2 3"]:
    """Matrix for `affine_grid` that cuts a window out of an image.

    Args:
        size: (height, width) of the image in pixels.
        dy, dx: offset of the window's centre from the image's, in pixels.
        scale: image side over window side.
        angle_deg: rotation of the window.
        flip: -1 mirrors the columns.
    """
    height, width = size
    aspect = height / width
    cos, sin = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    turn = np.array([[flip * cos, -sin * aspect], [sin / aspect, cos]])
    # The published code divides by the whole number of pixels in half a side.
    centre = np.array([(cos * dx + sin * dy) / (width // 2), (cos * dy - sin * dx) / (height // 2)])
    matrix = np.concatenate([turn / scale, (turn @ centre)[:, None]], axis=1)
    return torch.from_numpy(matrix.astype(np.float32))


def random_crop_matrix(
    size: tuple[int, int], rng: np.random.Generator, scale_range: tuple[float, float] = (0.5, 0.75)
) -> Float[Tensor, "2 3"]:
    """Matrix of a random window with the image's proportions, whole inside the image.

    Args: scale_range bounds window side over image side, drawn uniformly.
    """
    height, width = size
    scale = rng.uniform(*scale_range)
    window_h, window_w = int(scale * height), int(scale * width)
    top = int(rng.integers(0, height - window_h + 1))
    left = int(rng.integers(0, width - window_w + 1))
    dy, dx = top + window_h / 2 - height / 2, left + window_w / 2 - width / 2
    return crop_matrix(size, dy, dx, scale=1 / scale)


def sample_crop(
    image: Float[Tensor, "B C H W"], matrix: Float[Tensor, "B 2 3"], size: tuple[int, int]
) -> Float[Tensor, "B C h w"]:
    """Bilinear crop of `size` = (h, w); 0 outside the image. Values (of a flow, say) are not rescaled."""
    grid = F.affine_grid(matrix, [*image.shape[:2], *size], align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def standardise_flow(flow: Float[Tensor, "B 2 H W"]) -> Float[Tensor, "B 2 H W"]:
    """Zero mean and unit (unbiased) standard deviation per image and channel."""
    mean = flow.mean(dim=(2, 3), keepdim=True)
    return (flow - mean) / (flow.std(dim=(2, 3), keepdim=True) + 1e-5)


class NormalEquations:
    """Ridge regression from features, and a constant, to flow, over pixels that come in pieces.

    The solution (X'X / P + alpha I)^-1 X'Y / P minimises squared error; X ends in a column of ones, which
    is regularised like the features and never built: its products are sums. Computed in float32.
    """

    def __init__(self) -> None:
        self.num_pixels = 0
        self.gram = torch.zeros(())  # [F, F] from the first pixels on
        self.sums = torch.zeros(())  # [F]
        self.products = torch.zeros(())  # [F + 1, 2]

    def add(self, features: Float[Tensor, "P F"], flow: Float[Tensor, "P 2"]) -> None:
        """Take in P more pixels."""
        gram, sums = features.T @ features, features.sum(dim=0)
        # Of two columns, so turned: a sixth of the time of features.T @ flow.
        products = torch.cat([(flow.T @ features).T, flow.sum(dim=0, keepdim=True)])
        if self.num_pixels:
            gram, sums, products = self.gram + gram, self.sums + sums, self.products + products
        self.gram, self.sums, self.products = gram, sums, products
        self.num_pixels += len(features)

    def solve(self, ridge_alpha: float) -> Float[Tensor, "G 2"]:
        """Linear map from [features, 1] to flow; not finite if the features are not."""
        width = len(self.sums)
        lhs = self.gram.new_full((width + 1, width + 1), self.num_pixels)
        lhs[:-1, :-1] = self.gram
        lhs[:-1, -1] = lhs[-1, :-1] = self.sums
        lhs = lhs / self.num_pixels
        lhs.diagonal().add_(ridge_alpha)
        # Symmetric with eigenvalues of at least alpha, so Cholesky agrees with least squares to rounding.
        # The variant that does not raise lets a diverged network show as a loss that is not finite.
        factor, _ = torch.linalg.cholesky_ex(lhs)
        return torch.cholesky_solve(self.products / self.num_pixels, factor)


def edge_loss(
    student: Float[Tensor, "B 2 h w"],
    teacher: Float[Tensor, "B 2 h w"],
    sigma: float,
    confidence: Float[Tensor, "B 1 h w"] | None = None,
) -> tuple[Float[Tensor, "B"], Bool[Tensor, "B"]]:
    """Difference of flow gradients, weighted towards the teacher's edges.

    Args: confidence, what each pixel counts, 0..1; an edge counts as the lesser of its two pixels.

    Returns: the loss of each sample (mean over channels, x and y added), and whether it is defined: a
    channel in which the teacher has no gradient at all in x or in y has no weights to share out. The
    loss of an undefined sample is a finite number without meaning.
    """
    loss = student.new_zeros(len(student))
    defined = torch.ones(len(student), dtype=torch.bool, device=student.device)
    for dim in (3, 2):
        student_edge = student.diff(dim=dim).abs()
        teacher_edge = teacher.diff(dim=dim).abs()
        weight = 1 - torch.exp(-teacher_edge / sigma)
        if confidence is not None:
            side = confidence.shape[dim] - 1
            weight = weight * torch.minimum(confidence.narrow(dim, 0, side), confidence.narrow(dim, 1, side))
        total = weight.sum(dim=(2, 3), keepdim=True)  # [B, 2, 1, 1]
        has_edges = total > 0
        weight = weight / torch.where(has_edges, total, 1.0)
        loss = loss + (weight * (student_edge - teacher_edge).abs()).sum(dim=(2, 3)).mean(dim=1)
        defined = defined & has_edges.flatten(1).all(dim=1)
    return loss, defined


class FlowFeatTraining(nn.Module):
    """Frozen encoder, trained decoder and averaged decoder, with the state dict of published training runs.

    Args:
        backbone: a key of `vision_transformer.CONFIGS`, which stays as it is, or of `convolutional.PYRAMIDS`, which is
            trained too.
        loss: constants of the loss.
        input_size: (h, w) of the crops the encoder sees.
        ema_beta, ema_every: decay limit of the averaged decoder, and the steps between its moves.
    """

    def __init__(
        self,
        backbone: str,
        loss: FlowFeatLossConfig | None = None,
        input_size: tuple[int, int] = (224, 224),
        ema_beta: float = 0.999,
        ema_every: int = 5,
    ):
        super().__init__()
        self.backbone = backbone
        self.loss_config = loss or FlowFeatLossConfig()
        self.input_size = input_size
        self.trains_encoder = backbone in FROM_SCRATCH
        self.encoder = build_encoder(backbone, input_size).requires_grad_(self.trains_encoder)
        self.decoder = build_decoder(backbone)
        # The coarsest fusion has no finer map to add, so its first unit never runs. Data-parallel training
        # would wait for its gradient.
        self.decoder.scratch.refinenet4.resConfUnit1.requires_grad_(False)
        self.decoder_ema = EMA(self.decoder, beta=ema_beta, update_every=ema_every)

    @property
    def averaged_decoder(self) -> DPTDecoder:
        """The decoder whose features the flow is fitted on, and which is published."""
        decoder = self.decoder_ema.ema_model
        assert isinstance(decoder, DPTDecoder)
        return decoder

    def forward(
        self,
        frame: Tensor,
        teacher_flow: Tensor,
        params1: Tensor,
        params2: Tensor,
        confidence: Tensor | None = None,
    ) -> TrainingLosses:
        """Same as `training_losses`; the name that data-parallel wrappers call."""
        return self.training_losses(frame, teacher_flow, params1, params2, confidence)

    def training_losses(
        self,
        frame: Float[Tensor, "B 3 H W"],
        teacher_flow: Float[Tensor, "B 2 Ht Wt"],
        params1: Float[Tensor, "B 2 3"],
        params2: Float[Tensor, "B 2 3"],
        confidence: Float[Tensor, "B 1 Ht Wt"] | None = None,
    ) -> TrainingLosses:
        """Losses of a batch.

        Args:
            frame: images, normalised with ImageNet's mean and standard deviation, any size.
            teacher_flow: the teacher's flow of the whole frame, at any size and in any unit (it is
                standardised).
            params1, params2: crop matrices (see `random_crop_matrix`) of averaged and trained decoder.
            confidence: what each pixel of the flow counts in the losses, 0..1; all alike by default, as published.
        """
        crops = self.sample_crops(frame, params1, params2)
        maps1, maps2 = self.encode(crops)
        flow1, flow2, usable = self.sample_flow(teacher_flow, params1, params2)
        flow_map = self.fit(maps1, flow1)
        student_flow = self.predict(maps2, flow_map)
        if confidence is not None:
            confidence = sample_crop(confidence.float(), params2, self.input_size)
        return self._losses(student_flow, flow2, usable, confidence)

    def sample_crops(self, frame: Tensor, params1: Tensor, params2: Tensor) -> Float[Tensor, "N 3 h w"]:
        """The first crops of all frames, then the second ones."""
        crops = [sample_crop(frame.float(), params, self.input_size) for params in (params1, params2)]
        return torch.cat(crops)

    def encode(self, crops: Float[Tensor, "N 3 h w"]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps of the first and of the second crops; both go through the encoder together."""
        with torch.set_grad_enabled(self.trains_encoder and torch.is_grad_enabled()):
            maps, _ = encoder_maps(self.encoder, crops)
        first, second = zip(*(m.chunk(2) for m in maps), strict=True)
        return list(first), list(second)

    def fit(self, maps: list[Tensor], flow: Float[Tensor, "B 2 h w"]) -> Float[Tensor, "B G 2"]:
        """Linear map from a decoder's features, and a constant, to the flow; see `FlowFeatLossConfig.fit_with`."""
        if self.loss_config.fit_with == "trained":
            return self._fit(self.decoder, maps, flow)
        with torch.no_grad():
            return self._fit(self.averaged_decoder, maps, flow)

    def _fit(self, decoder: DPTDecoder, maps: list[Tensor], flow: Float[Tensor, "B 2 h w"]) -> Float[Tensor, "B G 2"]:
        equations = [NormalEquations() for _ in flow]
        targets = _pixels(flow)
        for samples, pixels, hidden in _pieces(_pixels(decoder.hidden(maps, self.input_size))):
            features = decoder.head(hidden)
            with torch.autocast(hidden.device.type, enabled=False):
                for i, x in zip(range(samples.start, samples.stop), features.float(), strict=True):
                    equations[i].add(x, targets[i, pixels])
        return torch.stack([e.solve(self.loss_config.ridge_alpha) for e in equations])

    def predict(self, maps: list[Tensor], flow_map: Float[Tensor, "B G 2"]) -> Float[Tensor, "B 2 h w"]:
        """Flow that the trained decoder's features give through a linear map."""
        flows = []
        # Features at full size are the largest tensors of a step, and only two numbers a pixel are wanted
        # of them: they are made in pieces, and made again for the gradient.
        for samples, _, hidden in _pieces(_pixels(self.decoder.hidden(maps, self.input_size))):
            flow = checkpoint(self._flow, hidden, flow_map[samples], use_reentrant=False, preserve_rng_state=False)
            flows.append(rearrange(flow, "b p xy -> (b p) xy"))
        return rearrange(torch.cat(flows), "(b h w) xy -> b xy h w", b=len(flow_map), h=self.input_size[0])

    def _flow(self, hidden: Float[Tensor, "B P F"], matrix: Float[Tensor, "B G 2"]) -> Float[Tensor, "B P 2"]:
        features = self.decoder.head(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.baddbmm(matrix[:, -1:], features.float(), matrix[:, :-1])

    def sample_flow(
        self, teacher_flow: Tensor, params1: Tensor, params2: Tensor
    ) -> tuple[Float[Tensor, "B 2 h w"], Float[Tensor, "B 2 h w"], Bool[Tensor, "B"]]:
        """Standardised teacher flow on both crops, and which samples are usable.

        A sample whose flow is not finite, or the same everywhere in u or in v, is not; it becomes 0.
        """
        teacher_flow = teacher_flow.float()
        low, high = teacher_flow.amin(dim=(2, 3)), teacher_flow.amax(dim=(2, 3))
        # Asked of the flow itself: sampling a constant leaves rounding that looks like edges.
        usable = teacher_flow.isfinite().flatten(1).all(dim=1) & (high > low).all(dim=1)
        teacher_flow = torch.where(usable[:, None, None, None], teacher_flow, 0.0)
        flow = standardise_flow(teacher_flow)
        flow1, flow2 = (sample_crop(flow, params, self.input_size) for params in (params1, params2))
        return flow1, flow2, usable

    def update_ema(self) -> None:
        """To be called once after every optimiser step."""
        self.decoder_ema.update()

    def student(self, ema: bool = True) -> FlowFeat:
        """The model to use or publish: encoder and averaged (or trained) decoder, sharing these tensors."""
        with torch.device("meta"):  # its own tensors are replaced, so none need be drawn
            model = FlowFeat(self.backbone, image_size=self.input_size)
        model.encoder = self.encoder
        model.decoder = self.averaged_decoder if ema else self.decoder
        return model.eval()

    def train(self, mode: bool = True) -> "FlowFeatTraining":
        super().train(mode)
        self.encoder.train(mode and self.trains_encoder)
        return self

    def _losses(
        self, student_flow: Tensor, teacher_flow: Tensor, usable: Tensor, confidence: Tensor | None
    ) -> TrainingLosses:
        config = self.loss_config
        edge, defined = edge_loss(student_flow, teacher_flow, config.edge_sigma, confidence)
        distance = (student_flow - teacher_flow).abs().sum(dim=1)
        if confidence is None:
            flow = distance.mean(dim=(1, 2))
        else:
            sure = confidence[:, 0]
            flow = (sure * distance).sum(dim=(1, 2)) / sure.sum(dim=(1, 2)).clamp_min(1e-6)
        valid = usable & defined
        num_valid = valid.sum().clamp(min=1)
        flow = torch.where(valid, flow, 0.0).sum() / num_valid
        edge = torch.where(valid, edge, 0.0).sum() / num_valid
        total = config.flow_weight * flow + config.edge_weight * edge
        return TrainingLosses(total, flow.detach(), edge.detach(), valid, student_flow.detach(), teacher_flow)


def _pieces(hidden: Float[Tensor, "B P F"]) -> Iterator[tuple[slice, slice, Float[Tensor, "b p F"]]]:
    """Views of all pixels of some samples, or of some pixels of one, with the samples and pixels they show.

    Splitting, unlike indexing, gives the pieces' gradients back in one copy.
    """
    num_pixels = hidden.shape[1]
    budget = PIXELS_PER_PIECE.get(hidden.device.type, PIXELS_PER_PIECE_ELSEWHERE)
    if num_pixels <= budget:
        group, first = budget // num_pixels, 0
        for block in hidden.split(group):
            yield slice(first, first + len(block)), slice(0, num_pixels), block
            first += len(block)
        return
    starts = range(0, num_pixels, budget)
    sizes = [min(budget, num_pixels - start) for start in starts]
    pieces = iter(hidden.flatten(0, 1).split(sizes * len(hidden)))
    for sample in range(len(hidden)):
        for start, size in zip(starts, sizes, strict=True):
            yield slice(sample, sample + 1), slice(start, start + size), next(pieces)[None]


def _pixels(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P C"]:
    return rearrange(x, "b c h w -> b (h w) c")
