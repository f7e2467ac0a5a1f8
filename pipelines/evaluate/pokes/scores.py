"""`evaluate` for the Flow Poke Transformer: how well motion is predicted, and known to be unknown, from n pokes.

Every sample has its queries, the same for all numbers of pokes, and its pokes in a fixed order of which the first n are
shown. The prediction that errors are measured of is the mean of the predicted distribution.
Source: Baumann et al., arXiv:2510.12777, section 4.

Shape legend: N samples, C numbers of pokes, Q queries, P pokes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinema.models.fpt.mixture import GaussianMixture
from kinema.pipelines.evaluate.pokes.measures import (
    CREDIBLE_PROBABILITIES,
    REMOVED_SHARES,
    area_to_oracle,
    calibration_error,
    correlations,
    observed_coverage,
    sparsification,
)


class PokeModel(Protocol):
    """What is evaluated; `FlowPokeTransformer` says what the arguments mean."""

    def embed_image(self, img: Tensor) -> dict[str, Tensor]: ...

    def project_image(self, d_img: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def predict_parallel(
        self,
        poke_pos: Tensor,
        poke_flow: Tensor,
        query_pos: Tensor,
        camera_static: Tensor | bool,
        d_img: Mapping[str, Tensor],
    ) -> GaussianMixture: ...


@dataclass(frozen=True)
class PokeSample:
    """An image, pokes and queries with what they really did; positions and flow in 0..1 of the central square."""

    key: str
    """What random draws of the measures depend on, besides the seed."""
    image: Float[Tensor, "3 S S"]
    """Central square in -1..1."""
    poke_pos: Float[Tensor, "P 2"]
    poke_flow: Float[Tensor, "P 2"]
    query_pos: Float[Tensor, "Q 2"]
    query_flow: Float[Tensor, "Q 2"]
    camera_static: bool


@dataclass(frozen=True)
class Predictions:
    """What the measures are made from, [N, C, Q]; errors and deviations in units of the square's side."""

    error: np.ndarray
    """Distance of the predicted mean from the truth."""
    nll_nats: np.ndarray
    """-log density of the truth, per unit of area of the square."""
    level: np.ndarray
    """Probability of the smallest credible region that holds the truth."""
    deviation: np.ndarray
    """Root of the predicted variance, both directions added."""
    entropy_nats: np.ndarray
    """Differential entropy of the prediction."""
    nearest_poke_error: np.ndarray
    """Error of a copy of the nearest poke's motion; nan for no poke."""
    still_error: np.ndarray
    """[N, Q], length of the true motion: the error of predicting that nothing moves."""


@dataclass(frozen=True)
class PokeScores:
    """Measures by number of pokes, and what curves are drawn from."""

    rows: list[dict[str, float]]
    """One row per number of pokes."""
    curves: dict[str, Any]
    """Coverage and sparsification curves by number of pokes, and the units of everything."""
    summary: dict[str, float]
    """Measures that are no function of the number of pokes, means over all numbers above 0."""

    def flat(self) -> dict[str, float]:
        """One number per measure: `10_epe_px` is that of 10 pokes."""
        named = {
            f"{row['pokes']:g}_{name}": value
            for row in self.rows
            for name, value in row.items()
            if name != "pokes" and (row["pokes"] or name != "nearest_poke_epe_px")
        }
        return {**self.summary, **named}


@torch.no_grad()
def predict_samples(
    model: PokeModel,
    samples: Iterable[PokeSample],
    counts: tuple[int, ...],
    *,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Ask a model about every query of every sample, given the first n pokes for every n of `counts`.

    An image is embedded and projected once. Random draws of the measures depend on `seed`, the sample's key and n only,
    not on the batch. progress is called with the number of samples done.

    Raises: ValueError if a sample has fewer pokes than asked for, numbers of queries differ, an answer is not
            finite, or there is no sample.
    """
    found: list[dict[str, np.ndarray]] = []
    for batch in _batches(samples, batch_size):
        for sample in batch:
            if len(sample.poke_pos) < counts[-1]:
                raise ValueError(f"sample {sample.key} has {len(sample.poke_pos)} pokes, {counts[-1]} are to be shown")
        d_img = model.project_image(model.embed_image(torch.stack([s.image for s in batch]).to(device)))
        pokes, flows, queries = (
            torch.stack([getattr(s, name) for s in batch]).float().to(device)
            for name in ("poke_pos", "poke_flow", "query_pos")
        )
        static = torch.tensor([s.camera_static for s in batch], device=device)
        given = [
            model.predict_parallel(pokes[:, :n], flows[:, :n], queries, static, d_img).to("cpu", torch.float64)
            for n in counts
        ]
        for number, sample in enumerate(batch):
            answers = [_judge(mixture[number], sample, n, seed) for mixture, n in zip(given, counts, strict=True)]
            found.append({name: np.stack([answer[name] for answer in answers]) for name in answers[0]})
        if progress is not None:
            progress(len(found))
    if not found:
        raise ValueError("no sample to evaluate")
    arrays = {name: np.stack([one[name] for one in found]) for name in found[0]}
    return Predictions(still_error=arrays.pop("still_error")[:, 0], **arrays)


def score(
    found: Predictions,
    counts: tuple[int, ...],
    *,
    pck_thresholds: tuple[float, ...] = (0.01, 0.05, 0.1),
    side_px: int = 512,
) -> PokeScores:
    """The measures of predictions; see `PokesConfig` for the settings."""
    rows, coverages, curves = [], {}, {}
    for index, count in enumerate(counts):
        error, deviation, entropy = found.error[:, index], found.deviation[:, index], found.entropy_nats[:, index]
        coverages[str(count)] = observed_coverage(found.level[:, index])
        curves[str(count)] = {
            "deviation": sparsification(error, deviation),
            "entropy": sparsification(error, entropy),
            "oracle": sparsification(error, error),
        }
        by_deviation, by_entropy = correlations(deviation, error), correlations(entropy, error)
        rows.append(
            {
                "pokes": count,
                "epe_px": float(error.mean()) * side_px,
                **{f"pck_{limit:g}": float((error <= limit).mean()) for limit in pck_thresholds},
                "nll_nats": float(found.nll_nats[:, index].mean()),
                "calibration_error": calibration_error(coverages[str(count)]),
                "deviation_px": float(deviation.mean()) * side_px,
                "spearman_deviation": by_deviation["spearman"],
                "pearson_deviation": by_deviation["pearson"],
                "spearman_entropy": by_entropy["spearman"],
                "sparsification_area_deviation": area_to_oracle(curves[str(count)], "deviation"),
                "sparsification_area_entropy": area_to_oracle(curves[str(count)], "entropy"),
                "nearest_poke_epe_px": float(found.nearest_poke_error[:, index].mean()) * side_px,
            }
        )
    named = (
        "calibration_error spearman_deviation pearson_deviation spearman_entropy "
        "sparsification_area_deviation sparsification_area_entropy"
    ).split()
    summary = {name: _mean([row[name] for row in rows if row["pokes"]]) for name in named}
    summary |= {
        "still_epe_px": float(found.still_error.mean()) * side_px,
        "samples": float(found.error.shape[0]),
        "queries": float(found.error.shape[2]),
    }
    shared = {"units": _units(side_px), "probabilities": CREDIBLE_PROBABILITIES, "removed_shares": REMOVED_SHARES}
    return PokeScores(rows, {**shared, "coverage": coverages, "sparsification": curves}, summary)


def stable_seed(*identity: object) -> int:
    """A seed that depends on nothing but what is named."""
    return int.from_bytes(hashlib.blake2b(repr(identity).encode(), digest_size=8).digest(), "little") >> 1


def _judge(mixture: GaussianMixture, sample: PokeSample, num_pokes: int, seed: int) -> dict[str, np.ndarray]:
    """The entries of `Predictions` for one sample and number of pokes, [Q] each."""
    truth = sample.query_flow.double()
    generator = torch.Generator().manual_seed(stable_seed(seed, sample.key, num_pokes))
    values = {
        "error": (mixture.mean - truth).norm(dim=-1),
        "nll_nats": -mixture.log_prob(truth),
        "level": mixture.credible_level(truth, generator=generator),
        "deviation": mixture.variance.sum(-1).sqrt(),
        "entropy_nats": mixture.entropy(generator=generator),
        "nearest_poke_error": (_nearest_poke(sample, num_pokes) - truth).norm(dim=-1),
        "still_error": truth.norm(dim=-1),
    }
    if not (values["error"].isfinite().all() and values["nll_nats"].isfinite().all()):
        raise ValueError(
            f"{sample.key}: the model's answer to {num_pokes} pokes is not finite; its weights are unusable"
        )
    return {name: value.numpy() for name, value in values.items()}


def _nearest_poke(sample: PokeSample, num_pokes: int) -> Tensor:
    """The flow of the nearest poke at every query [Q, 2], float64; nan without pokes."""
    if not num_pokes:
        return torch.full(sample.query_flow.shape, torch.nan, dtype=torch.float64)
    nearest = torch.cdist(sample.query_pos.double(), sample.poke_pos[:num_pokes].double()).argmin(dim=1)
    return sample.poke_flow[nearest].double()


def _batches(samples: Iterable[PokeSample], size: int) -> Iterator[list[PokeSample]]:
    rest = iter(samples)
    while batch := list(islice(rest, size)):
        yield batch


def _mean(values: list[float]) -> float:
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else float("nan")


def _units(side_px: int) -> dict[str, str]:
    square = f"the central square of the frame at {side_px} x {side_px} pixels"
    return {
        "epe_px": f"mean distance of the predicted mean from the true motion, pixels of {square}",
        "pck_T": f"share of queries whose error is at most T sides of the square (T x {side_px} pixels)",
        "nll_nats": "-log density of the true motion per unit of area, where the square's side is 1",
        "calibration_error": "mean distance of observed from expected coverage of credible regions, 5 % to 95 %",
        "deviation_px": f"mean root of the predicted variance, pixels of {square}",
        "spearman_*, pearson_*": "correlation of predicted deviation or entropy with the error",
        "sparsification_area_*": "area between the sparsification curve and that of the errors themselves; 0 is best",
        "nearest_poke_epe_px": f"the same error for a copy of the nearest poke's motion, pixels of {square}",
        "still_epe_px": f"the same error for no motion at all, pixels of {square}",
    }
