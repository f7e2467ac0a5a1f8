"""FlowFeat's training step with stored flow against the published way: RAFT (20 iterations) inside every step.

The baseline is written out plainly, as published: RAFT with sampled correlations and a flow at full size after every
iteration; each crop through the encoder on its own, features of whole crops, a general least-squares solver. Both give
the same loss (last row).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from kinema.configs import FlowFeatConfig, LoaderConfig, TrainConfig
from kinema.models.backbones import training_conv
from kinema.models.flow.raft.network import raft
from kinema.models.flowfeat.model import encoder_maps
from kinema.models.flowfeat.training import FlowFeatTraining, edge_loss, sample_crop, standardise_flow
from kinema.pipelines.bench.paired import paired
from kinema.pipelines.bench.plain_raft import plain_predictions
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.loader.clip import Clip
from kinema.pipelines.loader.reader import Skip, stack
from kinema.pipelines.pictures.images import normalise_images
from kinema.pipelines.precision import autocast, cpu_multiplies_bf16
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.train.optimizer import make_optimizer
from kinema.pipelines.train.recipes.flowfeat import FlowFeatRecipe

RAFT_ITERS = 20
ROUNDS = 3


def run(variant: str = "dinov2_vits14_yt", crop: int = 224, batch_size: int = 2) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}: seconds a sample; baseline / ours."""
    torch.manual_seed(0)
    config = FlowFeatConfig(variant=variant, resize=2 * crop, crop=crop)
    recipe = FlowFeatRecipe(config)
    module = recipe.build()
    optimizer = make_optimizer(module, TrainConfig(batch_size=batch_size, loader=LoaderConfig(num_workers=0)))
    network = raft()
    with tempfile.TemporaryDirectory(prefix="kinema-bench-") as folder:
        index = _data(Path(folder), 2 * crop)

        def read() -> dict[str, Any]:
            clips = [index.clip(i) for i in range(batch_size)]
            return stack([_sample(recipe, clip, seed) for seed, clip in enumerate(clips)], [c.key for c in clips])

        batch = read()
        frames = torch.rand(batch_size, 2, 3, crop, crop)

        def teach(as_published: bool) -> None:
            first, second = frames[:, 0], frames[:, 1]
            with torch.no_grad():
                if as_published:
                    plain_predictions(network, first, second, RAFT_ITERS)
                else:
                    network(first, second, RAFT_ITERS)

        def step(loss: Callable[[FlowFeatTraining, dict[str, Any]], Tensor], precision: str = "fp32") -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with autocast(precision, torch.device("cpu")):
                value = loss(module, batch)
            value.backward()
            optimizer.step()
            module.update_ema()
            return value

        with torch.no_grad():
            difference = (stored_flow_loss(module, batch) - published_loss(module, batch)).abs().item()
        sides: dict[str, Callable[[], Any]] = {
            "read": read,
            "plain RAFT": lambda: teach(as_published=True),
            "RAFT": lambda: teach(as_published=False),
            "step": lambda: step(stored_flow_loss),
            "plain step": lambda: published_step(step),
        }
        if cpu_multiplies_bf16():
            sides["bf16 step"] = lambda: step(stored_flow_loss, "bf16")
        times = paired(sides, ROUNDS)
    ours = times.sum("read and step", {"read": 1, "step": 1})
    published = times.sum("plain RAFT and step", {"plain RAFT": 1, "plain step": 1})
    half = times.sum("RAFT and step", {"RAFT": 1, "step": 1})
    name = f"FlowFeat {variant} {crop}x{crop}"
    compared = {
        f"{name}, stored flow against RAFT inside": (ours, published),
        f"{name}, the same with our step and our RAFT inside": (ours, half),
        f"{name}, forward, backward, optimizer only": ("step", "plain step"),
        "teacher signal: read frame and flow against RAFT": ("read", "plain RAFT"),
    }
    if "bf16 step" in sides:  # what precision=auto chooses on such a processor
        in_bf16 = times.sum("read and bf16 step", {"read": 1, "bf16 step": 1})
        compared[f"{name}, stored flow and products in bf16 against RAFT inside in fp32"] = (in_bf16, published)
    return [
        *(times.row(title, *pair, "s/sample", 1 / batch_size) for title, pair in compared.items()),
        {
            "name": f"{name}, difference of the two losses",
            "value": difference,
            "baseline": 1e-5,
            "ratio": difference / 1e-5,
            "unit": "against the allowed 1e-5",
        },
    ]


def stored_flow_loss(module: FlowFeatTraining, batch: dict[str, Any]) -> Tensor:
    """The loss as `kinema train` computes it."""
    images = normalise_images(batch["image"].float() / 255)
    return module(images, batch["flow"], batch["crop1"], batch["crop2"]).total


def published_step(step: Callable[..., Tensor]) -> Tensor:
    """One with PyTorch's own convolutions, on maps with the channels last, as the published decoder's are."""
    with mock.patch.object(training_conv, "slow_with_channels_last", lambda: False):
        return step(published_loss)


def published_loss(module: FlowFeatTraining, batch: dict[str, Any]) -> Tensor:
    """The same loss, written as the paper's equations read."""
    config, size = module.loss_config, module.input_size
    images = normalise_images(batch["image"].float() / 255)
    flow = standardise_flow(batch["flow"])
    flows = [sample_crop(flow, batch[name], size) for name in ("crop1", "crop2")]
    with torch.no_grad():
        maps1, _ = encoder_maps(module.encoder, sample_crop(images, batch["crop1"], size))
        x = _with_ones(module.decoder_ema.ema_model(maps1, size))  # [B, P, F + 1]
        y = flows[0].flatten(2).transpose(1, 2)  # [B, P, 2]
        lhs = x.transpose(1, 2) @ x / x.shape[1] + config.ridge_alpha * torch.eye(x.shape[2])
        flow_map = torch.linalg.lstsq(lhs, x.transpose(1, 2) @ y / x.shape[1]).solution
        maps2, _ = encoder_maps(module.encoder, sample_crop(images, batch["crop2"], size))
    predicted = _with_ones(module.decoder(maps2, size)) @ flow_map
    predicted = predicted.transpose(1, 2).unflatten(2, size)
    edge, _ = edge_loss(predicted, flows[1], config.edge_sigma)
    return config.flow_weight * (predicted - flows[1]).abs().sum(1).mean() + config.edge_weight * edge.mean()


def _with_ones(features: Tensor) -> Tensor:
    pixels = features.flatten(2).transpose(1, 2)
    return torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=2)


def _data(folder: Path, side: int) -> ClipIndex:
    scenes = [Scene(seed, height=side, width=side * 5 // 4, num_frames=13) for seed in range(2)]
    clips = write_scene_clips(scenes, folder / "clips")
    write_scene_flow(scenes, clips, folder / "flow")
    return ClipIndex.open(folder / "clips", folder / "flow")


def _sample(recipe: FlowFeatRecipe, clip: Clip, seed: int) -> dict[str, Tensor]:
    sample = recipe.read_sample(clip, np.random.default_rng(seed))
    assert not isinstance(sample, Skip)  # the scenes' flow is neither missing nor constant
    return sample
