"""Training of the flow networks: RAFT, SEA-RAFT and WAFT on stored flow, SMURF on frames alone.

Stored flow may be ground truth, or a better teacher's. The module is the network itself, so a checkpoint's
model.safetensors has the published keys and is what `kinema teach weights=` takes.

Sources: Teed and Deng, arXiv:2003.12039, appendix B; Wang, Lipson and Deng, arXiv:2405.14793, section 4; Stone et al.,
CVPR 2021, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kinema.configs import FlowNetworkConfig, TrainConfig
from kinema.configs.models.table import MODELS
from kinema.models.flow.networks import flow_network
from kinema.models.flow.raft.loss import MAX_MOTION_PX, flow_errors, sequence_loss
from kinema.models.flow.sea_raft.loss import mixture_sequence_loss
from kinema.models.flow.sea_raft.network import SEARAFT
from kinema.models.flow.smurf.loss import SmurfLossWeights, self_supervision_loss, unsupervised_sequence_loss
from kinema.models.flow.smurf.network import SMURF
from kinema.models.flow.waft.network import MAX_MOTION_PX as WAFT_MAX_MOTION_PX
from kinema.models.flow.waft.network import WAFT
from kinema.models.weights import LEDGER, load_weights
from kinema.pipelines.loader import Clip, Skip
from kinema.pipelines.train.checkpoint import weights_file
from kinema.pipelines.train.flow_augmentation import KnownPair, augment
from kinema.pipelines.train.flow_augmentation.spatial import mirrored
from kinema.pipelines.train.flow_pairs import NOTHING_KNOWN, as_tensors, flow_pictures, stored_pair
from kinema.pipelines.train.recipes.protocol import Batch, ExportedModel, Loss, as_count


@dataclass(frozen=True)
class FlowRecipe:
    """See `protocol.Recipe`. `network` is a name of `models.flow.networks` with weights to learn."""

    network: str
    config: FlowNetworkConfig
    weights: str = ""

    @classmethod
    def of(cls, config: TrainConfig) -> FlowRecipe:
        """From a training's config."""
        return cls(config.model, config.settings, config.weights)

    @property
    def needs(self) -> tuple[str, ...]:
        """SMURF learns from frames alone."""
        return MODELS[self.network].needs

    def check(self) -> None:
        """Refuse, before anything starts, weights that do not fit (ValueError)."""
        self.build()

    def build(self) -> nn.Module:
        """The network, from its initialisation or from `weights`: a file, a URL or another run."""
        network = flow_network(self.network)
        if self.weights:
            load_weights(network, weights_file(self.weights), self.network)
        if isinstance(network, WAFT):
            for parameter in network.unused_parameters():  # several ranks wait for the gradient of whatever wants one
                parameter.requires_grad_(False)
        return network.train()

    def read_sample(self, clip: Clip, rng: np.random.Generator) -> dict[str, Tensor] | Skip:
        """Two frames, with stored flow at its size and with the flow between them, cropped alike and varied.

        Returns: image1, image2 uint8 [3, h, w]; with stored flow also flow_px float32 [2, h, w] and valid [h, w].
        """
        config = self.config
        if self.needs:
            pair = stored_pair(clip, rng, config.gap, config.visible_only, "flow_network")
        else:
            pair = self._frames(clip, rng)
        if isinstance(pair, Skip):
            return pair
        if config.augment == "off" and (pair.size[0] < config.crop[0] or pair.size[1] < config.crop[1]):
            return Skip(f"frames smaller than flow_network.crop=[{config.crop[0]},{config.crop[1]}]: lower it")
        pair = augment(pair, config.augment, config.augmentation, config.crop, rng)
        if config.augment == "off":
            pair = mirrored(pair, horizontal=bool(rng.random() < config.flip), vertical=False)
        if not self.needs:
            return {name: value for name, value in as_tensors(pair).items() if name.startswith("image")}
        return as_tensors(pair) if pair.valid.any() else NOTHING_KNOWN

    def loss(self, module: nn.Module, batch: Batch) -> Loss:
        """The network's own sequence loss; every sample of a batch counts."""
        if self.config.freeze_batch_norm:
            for layer in module.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        images = [batch[name].float() / 255 for name in ("image1", "image2")]
        recolour = self.config.augment == "off" and self.config.jitter and module.training
        shown = _jitter(images, self.config.jitter) if recolour else images
        num_samples = as_count(len(images[0]), images[0])
        if isinstance(module, SMURF):
            return self._unsupervised(module, images, shown, num_samples)
        flow_px, valid, iters = batch["flow_px"], batch["valid"], self.config.iters
        if isinstance(module, SEARAFT | WAFT):
            predictions = module.predictions(shown[0], shown[1], iters=iters)
            longest_px = WAFT_MAX_MOTION_PX if isinstance(module, WAFT) else MAX_MOTION_PX
            value = mixture_sequence_loss(predictions, flow_px, valid, self.config.gamma, longest_px)
            last = predictions[-1].flow
        else:
            flows = module.predictions(shown[0], shown[1], iters=iters)  # type: ignore[operator]
            value, last = sequence_loss(flows, flow_px, valid, self.config.gamma, MAX_MOTION_PX), flows[-1]
        errors = flow_errors(last.detach(), flow_px, valid)
        return Loss(value, num_samples, {name: value.new_tensor(error) for name, error in errors.items()})

    def after_step(self, module: nn.Module, step: int) -> None:
        """Nothing follows the weights."""

    def pictures(self, module: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Rows of frame, known flow (where there is one) and predicted flow."""
        return flow_pictures(module, batch, self.config.iters)

    def published_model(self, tensors: Mapping[str, Tensor], ema: bool = True) -> nn.Module:
        """The network with a checkpoint's tensors."""
        network = flow_network(self.network)
        network.load_state_dict(tensors)
        return network.eval()

    def export(self, model: nn.Module) -> ExportedModel:
        """Constructor arguments and tensors under the published keys."""
        row = MODELS[self.network]
        licences = {"weights": LEDGER[row.weights].licence} if self.weights == "published" and row.weights else {}
        arguments = cast(dict[str, Any], model.arguments)
        return ExportedModel(self.network, arguments, dict(model.state_dict()), licences=licences)

    def _frames(self, clip: Clip, rng: np.random.Generator) -> KnownPair | Skip:
        """Two frames whose flow nobody knows."""
        if clip.num_frames < 2:
            return Skip("a single frame")
        gap = int(rng.integers(1, min(self.config.gap, clip.num_frames - 1) + 1))
        t = int(rng.integers(clip.num_frames - gap))
        first, second = clip.frames([t, t + gap])
        return KnownPair.of(first, second, np.full((2, *first.shape[:2]), np.nan, np.float32))

    def _unsupervised(self, module: SMURF, images: list[Tensor], shown: list[Tensor], count: Tensor) -> Loss:
        config = self.config
        forward = module.predictions(shown[0], shown[1], iters=config.iters)
        backward = module.predictions(shown[1], shown[0], iters=config.iters)
        weights = SmurfLossWeights(decay=config.gamma, smooth2=config.smoothness, edge_constant=config.edge_constant)
        terms = unsupervised_sequence_loss(images[0], images[1], forward, backward, weights)
        value = terms.pop("total")
        if config.self_supervision:
            border = config.self_supervision_crop
            inner = [image[..., border:-border, border:-border] for image in shown]
            students = [module(a, b, iters=config.iters) for a, b in (inner, inner[::-1])]
            terms["self_supervision"] = config.self_supervision * self_supervision_loss(
                forward[-1].detach(), backward[-1].detach(), students[0], students[1], border
            )
            value = value + terms["self_supervision"]
        return Loss(value, count, {name: term.detach() for name, term in terms.items()})


def _jitter(images: list[Tensor], strength: float) -> list[Tensor]:
    """Brightness and contrast of each sample changed by up to +-strength, alike in both frames. Seeded by the loop."""
    shape = (len(images[0]), 1, 1, 1)
    factors = [1 + strength * (2 * torch.rand(shape) - 1).to(images[0].device) for _ in range(2)]
    means = images[0].mean(dim=(1, 2, 3), keepdim=True)
    return [((image - means) * factors[0] + means * factors[1]).clamp(0, 1) for image in images]
