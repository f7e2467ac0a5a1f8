"""FlowFeat: pixel-dense motion features from a frozen vision transformer and a DPT decoder.

Source: Araslanov, Sonnweber, Cremers, FlowFeat: Pixel-Dense Embedding of Motion Profiles, NeurIPS 2025.
Deviations: patch grids with odd sides work; the MAE variant can be built by name.

Shape legend: B batch, C encoder width, h w patch grid, H W image pixels; 128 is the feature width.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.convolutional import PYRAMIDS, PyramidEncoder
from kinema.models.backbones.dpt import DPTDecoder, PyramidDecoder, tokens_to_map
from kinema.models.backbones.vision_transformer import CONFIGS, VisionTransformer
from kinema.models.weights import resolve_weights

TAPPED_BLOCKS = (2, 5, 8, 11)
FEATURE_WIDTH = 128

# Published variants: the name says encoder and training set (YouTube-VOS or Kinetics).
VARIANTS: dict[str, str] = {
    "dino_vits16_yt": "dino_vits16",
    "dino_vitb16_yt": "dino_vitb16",
    "dino_vitb16_kt": "dino_vitb16",
    "mae_vitb16_kt": "mae_vitb16",
    "dinov2_vits14_yt": "dinov2_vits14",
    "dinov2_vitb14_yt": "dinov2_vitb14",
    "dinov2_vitb14_kt": "dinov2_vitb14",
}


# Encoders without published weights: they learn together with the decoder.
FROM_SCRATCH: dict[str, str] = {name: name for name in PYRAMIDS}
NAMES = VARIANTS | FROM_SCRATCH

Encoder = VisionTransformer | PyramidEncoder


def build_encoder(backbone: str, image_size: tuple[int, int]) -> Encoder:
    """A vision transformer, or a pyramid of `convolutional.PYRAMIDS`."""
    if backbone in PYRAMIDS:
        return PyramidEncoder(PYRAMIDS[backbone], image_size)
    return VisionTransformer(CONFIGS[backbone], image_size=image_size)


def build_decoder(backbone: str) -> DPTDecoder:
    """The decoder that goes with a backbone."""
    if backbone in PYRAMIDS:
        return PyramidDecoder(PYRAMIDS[backbone].widths, PYRAMIDS[backbone].decoder_width)
    width = CONFIGS[backbone].width
    # The MAE variant was trained with maps that widen towards the coarse end, the others with equal ones.
    widths = (96, 192, 384, 768) if backbone == "mae_vitb16" else (width,) * 4
    return DPTDecoder(width, widths, FEATURE_WIDTH)


def encoder_maps(encoder: Encoder, x: Float[Tensor, "B 3 H W"]) -> tuple[list[Tensor], Tensor]:
    """What the decoder reads, [B, C, h, w] each, and that from which y_enc comes.

    Returns: maps of the tapped blocks, shallowest first; of a transformer the un-normed tokens [B, N, C] of the deepest
        block, prefix tokens included; of a pyramid its coarsest map.
    """
    if isinstance(encoder, PyramidEncoder):
        maps = encoder(x)
        return maps, maps[-1]
    grid = encoder.grid(*x.shape[-2:])
    taps = encoder.tokens(x, TAPPED_BLOCKS)
    return [tokens_to_map(tap, grid) for tap in taps], taps[-1]


class FlowFeat(nn.Module):
    """Motion features of an image. Input: RGB, normalised with ImageNet's mean and standard deviation.

    Args:
        backbone: a key of `vision_transformer.CONFIGS` with 12 blocks, or of `convolutional.PYRAMIDS`.
        image_size: (height, width); matters only to MAE, which takes a single size.
        freeze_encoder: run the encoder without gradients and keep it in eval mode.
    """

    def __init__(self, backbone: str, image_size: tuple[int, int] = (224, 224), freeze_encoder: bool = True):
        super().__init__()
        self.backbone = backbone
        self.encoder = build_encoder(backbone, image_size)
        self.decoder = build_decoder(backbone)
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            self.encoder.requires_grad_(False)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B F H W"]]:
        """(y_enc, y_dec): the encoder's final patch features, and the decoder's features at image size."""
        with torch.no_grad() if self.freeze_encoder else nullcontext():
            maps, last = encoder_maps(self.encoder, x)
            y_enc = last
            if isinstance(self.encoder, VisionTransformer):
                y_enc = tokens_to_map(self.encoder.norm(last), self.encoder.grid(*x.shape[-2:]))
        return y_enc, self.decoder(maps, tuple(x.shape[-2:]))

    def train(self, mode: bool = True) -> "FlowFeat":
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self


def flowfeat(
    name: str = "dinov2_vits14_yt",
    pretrained: bool = False,
    weights: str | Path | None = None,
    image_size: tuple[int, int] = (224, 224),
) -> FlowFeat:
    """A FlowFeat by name, in eval mode.

    Args:
        name: a key of `VARIANTS` (published) or `FROM_SCRATCH`.
        pretrained: download the published weights (once) and load them.
        weights: path or URL of a checkpoint to load instead.
        image_size: (height, width) in pixels; matters only to the MAE variant.
    Raises: ValueError for an unknown name or weights that do not fit.
    """
    if name not in NAMES:
        raise ValueError(f"FlowFeat variant {name!r} is not known; use one of {', '.join(NAMES)}")
    model = FlowFeat(NAMES[name], image_size=image_size)
    return resolve_weights(model, f"flowfeat/{name}", pretrained, weights).eval()
