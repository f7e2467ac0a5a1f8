"""DinoFlow: optical flow in one pass, from a frozen vision transformer and a head on local correlations.

Images are float in 0..1, any size; flow is (x, y) in pixels of those images, frame 1 to frame 2. Inside, images are
padded to whole patches, and motion is looked for within 4 patches (64 pixels for patches of 16).

For a video, `encode` once per frame and `flow_from_features` per pair; the numbers equal those of a direct call.

Source: model card of blanchon/dinoflow-model; Simeoni et al. (DINOv3), arXiv:2508.10104; AnyDepth, arXiv:2601.02760.
See `head` for what the card leaves open. Deviation: other backbones and widths can be chosen.

Shape legend: B batch, C token width, F fusion width, h w patch grid, H W image.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.convolutional import CellConfig, CellEncoder
from kinema.models.backbones.dpt import tokens_to_map
from kinema.models.backbones.vision_transformer import CONFIGS, VisionTransformer, ViTConfig
from kinema.models.dinoflow.head import FlowHead
from kinema.models.flow.geometry import resize_flow
from kinema.models.flow.padding import Padding, padding_for
from kinema.models.flow.pair_network import check_image_pair, check_images
from kinema.models.flow.raft.family import check_feature_pair
from kinema.models.weights import LEDGER, download, load_weights, published_file, read_state_dict, resolve_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_TAPS = 4

NANO_ENCODER = ViTConfig(patch_size=8, width=64, depth=4, num_heads=2, positions="rotary", floor_grid=False)
"""An encoder that trains from scratch on a CPU within minutes; train it with freeze_encoder=False."""
BACKBONES: dict[str, ViTConfig | CellConfig] = {
    **CONFIGS,
    "vits16": CONFIGS["dinov3_vits16"],
    "nano_vit8": NANO_ENCODER,
    "nano_conv4": CellConfig(width=48),
}
"""Backbones by name; "vits16" is what the published page calls DINOv3 ViT-S/16."""


class UntrainedEncoderWarning(UserWarning):
    """A model was built on an encoder without trained weights."""


@dataclass(frozen=True)
class FlowModelConfig:
    """What a DinoFlow is made of."""

    backbone: str = "vits16"
    """A key of `BACKBONES`."""
    width: int = 256
    """Fusion width of the head, a multiple of 4."""
    reading: str = "B"
    """Front end of the head; see `kinema.models.dinoflow.head`."""
    use_cls_token: bool = True
    """Whether the fusion mixes each patch with the class token."""
    normed_taps: bool = True
    """Whether taps pass through the encoder's last norm, as DINOv3's own call for inner layers does."""
    freeze_encoder: bool = True
    """Run the encoder without gradient and keep it in eval mode."""
    image_size: tuple[int, int] = (224, 224)
    """(height, width) of the padded images; matters only to MAE, which takes a single size."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone={self.backbone!r} is not one of {', '.join(BACKBONES)}")
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width={self.width} is not a positive multiple of 4, the groups of the upsampling")


@dataclass(frozen=True)
class DinoFlowFeatures:
    """Fused features of frames; one row per frame. Indexing by rows cuts pairs out of one batch."""

    fused: Float[Tensor, "B F h w"]
    """At the patch grid of the padded image."""
    size: tuple[int, int]
    """Height and width of the images as given."""
    padding: Padding
    """Margins that were added."""

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "DinoFlowFeatures":
        return replace(self, fused=self.fused[rows])

    def __len__(self) -> int:
        return self.fused.shape[0]

    @staticmethod
    def stack(frames: Sequence["DinoFlowFeatures"]) -> "DinoFlowFeatures":
        """The rows of several frames of one size as one batch."""
        return replace(frames[0], fused=torch.cat([frame.fused for frame in frames]))


class FlowModel(nn.Module):
    """`model(image1, image2)` gives the flow from image1 to image2; see `forward`.

    `encoder` is the vision transformer, `head` everything that the published file holds.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: FlowModelConfig | Mapping[str, Any] | None = None):
        super().__init__()
        if isinstance(config, Mapping):  # as a registered model's description holds it
            config = FlowModelConfig(**{**config, "image_size": tuple(config["image_size"])})
        self.config = config = config or FlowModelConfig()
        encoder = BACKBONES[config.backbone]
        self.encoder = make_encoder(encoder, config.image_size)
        self.encoder_is_trained = False
        self.taps = _taps(encoder.depth)
        self.head = FlowHead(
            [encoder.width] * NUM_TAPS,
            config.width,
            config.use_cls_token,
            _factors(encoder.patch_size),
            config.reading,
        )
        if isinstance(encoder, CellConfig):  # learned from scratch: what cells have in common shows from the start
            self.head.weighted_fusion.keep_angles()
            self.head.motion.read_waves()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        if config.freeze_encoder:
            self.encoder.requires_grad_(False)
            self.encoder.eval()
        elif encoder.mask_token:
            self.encoder.mask_token.requires_grad_(False)  # of the pre-training; nothing here reads it

    @classmethod
    def from_pretrained(
        cls, config: FlowModelConfig | None = None, backbone_weights: str | Path | None = None
    ) -> "FlowModel":
        """A model with a trained encoder and a head still to be loaded, in eval mode.

        Args: backbone_weights, file or URL of the encoder's checkpoint; by default the published one.
        Raises: ValueError for weights that do not fit or cannot be had.
        Warns: `UntrainedEncoderWarning` where the published weights are gated and no file is given.
        """
        model = cls(config)
        name = published_name(model.config.backbone)
        source = backbone_weights
        if source is None and name in LEDGER and not LEDGER[name].gated:
            source = published_file(name)
        load_weights(model.encoder, source, name)
        model.encoder_is_trained = source is not None
        if source is None:
            model.warn_of_untrained_encoder()
        return model.eval()

    def forward(
        self,
        image1: Float[Tensor, "_ _ _ _"],
        image2: Float[Tensor, "_ _ _ _"],
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Float[Tensor, "B 2 H W"]:
        """Flow from image1 to image2.

        Args:
            image1, image2: [B, 3, H, W] float in 0..1.
            iters: taken for the sake of the flow networks' common call; there is one pass, whatever it says.
            flow_init: not supported.

        Returns: [B, 2, H, W] float32, (x, y) in pixels.
        Raises: ValueError for images of the wrong or different shapes, iters < 0, or a flow_init.
        """
        check_image_pair(image1, image2, "DinoFlow")
        both = self.encode(torch.cat([image1, image2]))
        return self.flow_from_features(both[: len(image1)], both[len(image1) :], iters, flow_init)

    def encode(self, images: Float[Tensor, "_ _ _ _"]) -> DinoFlowFeatures:
        """Features of frames [B, 3, H, W] in 0..1, for `flow_from_features`."""
        check_images(images, "DinoFlow")
        height, width = images.shape[-2:]
        patch = self.encoder.patch_size
        padding = padding_for(height, width, multiple=patch, minimum=patch)
        x = padding.pad((images.float() - self.mean) / self.std)
        grid = self.encoder.grid(*x.shape[-2:])
        with torch.no_grad() if self.config.freeze_encoder else nullcontext():
            taps = self.encoder.tokens(x, self.taps)
            if self.config.normed_taps:
                taps = [self.encoder.norm(tap) for tap in taps]
        maps = [tokens_to_map(tap, grid) for tap in taps]
        cls = [tap[:, 0] for tap in taps] if self.config.use_cls_token else None
        return DinoFlowFeatures(self.head.fuse(maps, cls), (height, width), padding)

    def flow_from_features(
        self,
        features1: DinoFlowFeatures,
        features2: DinoFlowFeatures,
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Float[Tensor, "B 2 H W"]:
        """Flow from the frames of features1 to those of features2, row by row; equals `forward`.

        Raises: ValueError if they differ in number or image size.
        """
        if flow_init is not None:
            raise ValueError("dinoflow takes no flow_init: only the RAFT family starts from a given flow")
        if iters is not None and iters < 0:
            raise ValueError(f"iters={iters} must not be negative")
        check_feature_pair(features1, features2)
        flow = self.head.flow(features1.fused, features2.fused)
        grid, patch = features1.fused.shape[-2:], self.encoder.patch_size
        if self.head.scale != patch:  # the head upsamples by powers of 2; patches of 14 pixels are none
            flow = resize_flow(flow, grid[0] * patch, grid[1] * patch)
        return features1.padding.unpad(flow).contiguous()

    def train(self, mode: bool = True) -> "FlowModel":
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        return self

    def adapt_state_dict(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Accept the published file, which holds the head alone: the encoder keeps the weights it has."""
        if any(key.startswith((f"{prefix}encoder.", f"{prefix}head.")) for key in state):
            self.encoder_is_trained = True
            return
        if not self.encoder_is_trained:
            self.warn_of_untrained_encoder()
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}head.{key.removeprefix(prefix)}"] = state.pop(key)
        state.update({f"{prefix}encoder.{key}": value for key, value in self.encoder.state_dict().items()})

    def warn_of_untrained_encoder(self) -> None:
        """Says aloud that the head stands on random features, and what to give."""
        name = published_name(self.config.backbone)
        reason = f"gated, see {LEDGER[name].url}" if name in LEDGER and LEDGER[name].gated else "not given"
        warnings.warn(
            f"the encoder {name} is untrained: its weights are {reason}; give backbone_weights=FILE",
            UntrainedEncoderWarning,
            stacklevel=3,
        )


def published_name(backbone: str) -> str:
    """The ledger's name of a key of `BACKBONES`."""
    return "dinov3_vits16" if backbone == "vits16" else backbone


def dinoflow_vits16(
    pretrained: bool = False,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    reading: str = "B",
) -> FlowModel:
    """DinoFlow on DINOv3 ViT-S/16, in eval mode.

    Args:
        pretrained: download the published head (once) and load it; the encoder's weights are gated.
        weights: path or URL of a checkpoint to load instead: a whole model, or a head alone.
        backbone_weights: the encoder's checkpoint, for a head alone.
        reading: of the head's front end, for a model without weights; a checkpoint's shapes say it otherwise.
    Raises: ValueError for weights that do not fit or cannot be had.
    Warns: `UntrainedEncoderWarning` where a head is loaded beside an encoder without weights.
    """
    model = FlowModel(FlowModelConfig(reading=reading))
    load_weights(model.encoder, backbone_weights, "dinov3_vits16")
    model.encoder_is_trained = backbone_weights is not None
    return resolve_weights(model, "dinoflow_vits16", pretrained, weights).eval()


def dinoflow(pretrained: bool = False, weights: str | Path | None = None) -> FlowModel:
    """A DinoFlow that gives flow as it is, in eval mode: in the configuration that the shapes of a whole model's file
    tell, or, without one, the published configuration with random weights.

    Args: weights, path or URL of a whole model: a trained run's, or a head and its encoder put together by `join`.
    Raises: ValueError for a head alone (`pretrained` is one), a file that is no DinoFlow, or one that does not load.
    """
    if weights is None and not pretrained:
        return FlowModel().eval()
    source = str(weights or published_file("dinoflow_vits16"))
    path = download(source) if "://" in source else Path(source).expanduser()
    model = FlowModel(configuration_of(read_state_dict(path), source))
    return load_weights(model, path, "dinoflow_vits16").eval()


def configuration_of(state: Mapping[str, Tensor], source: str = "the checkpoint") -> FlowModelConfig:
    """The configuration that a whole model's state dict was made for, as far as tensors show it.

    Raises: ValueError if `state` is a head alone, is of no DinoFlow, or its encoder could be one of several.
    """
    encoder = {key.removeprefix("encoder."): value.shape for key, value in state.items() if key.startswith("encoder.")}
    norm = state.get("head.detail_enhancer.norm.weight", state.get("detail_enhancer.norm.weight"))
    if norm is None:
        raise ValueError(f"weights={source} do not fit dinoflow: no head in the file")
    if not encoder:
        raise ValueError(
            f"weights={source} hold DinoFlow's head alone; put the encoder's to them: "
            f"python -m kinema.models.dinoflow.join {source} ENCODER OUT.safetensors, and give weights=OUT.safetensors"
        )
    backbones = [name for name in BACKBONES if name != "vits16" and _shapes(BACKBONES[name]) == encoder]
    if len(backbones) != 1:
        found = " or ".join(backbones) or "none that is known"
        raise ValueError(f"weights={source}: the encoder in the file is {found}; use a run of `kinema train`")
    return FlowModelConfig(
        backbones[0],
        len(norm),
        use_cls_token=any(".readout_projects." in key for key in state),
    )


def make_encoder(
    config: ViTConfig | CellConfig, image_size: tuple[int, int] = (224, 224)
) -> VisionTransformer | CellEncoder:
    """The encoder of an entry of `BACKBONES`."""
    if isinstance(config, CellConfig):
        return CellEncoder(config, image_size)
    return VisionTransformer(config, image_size=image_size)


def _shapes(config: ViTConfig | CellConfig) -> dict[str, torch.Size]:
    """Names and shapes of an encoder's state dict."""
    with torch.device("meta"):
        return {key: value.shape for key, value in make_encoder(config).state_dict().items()}


def _taps(depth: int) -> tuple[int, ...]:
    """Blocks that are read: the last of every quarter; 2, 5, 8, 11 of twelve."""
    return tuple(depth * (i + 1) // NUM_TAPS - 1 for i in range(NUM_TAPS))


def _factors(patch_size: int) -> tuple[int, int]:
    """Factors of the head's two stages: from the patch grid to image size, or just above."""
    if patch_size > 8:
        return 4, 4
    return (4, 2) if patch_size > 4 else (2, 2)
