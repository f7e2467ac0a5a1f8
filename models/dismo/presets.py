"""DisMo in three sizes: the paper's, and two that train on a CPU."""

from collections.abc import Mapping
from typing import Any

_TINY_ENCODER = {"model_version": "tiny_vit8", "image_size": 32, "gradient_last_blocks": None}
_MICRO_ENCODER = _TINY_ENCODER | {"model_version": "micro_conv4"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dismo_large": {
        "motion_extractor_params": {"frame_encoder_params": {"model_version": "dinov2_vitl14_reg"}},
        "frame_generator_params": {"source_encoder_params": {"model_version": "dinov2_vitl14_reg"}},
    },
    "dismo_tiny": {
        "motion_extractor_params": {
            "width": 128,
            "depth": 2,
            "d_head": 32,
            "d_motion": 32,
            "frame_encoder_params": _TINY_ENCODER,
            "train_resolution": (8, 32, 32),
        },
        "frame_generator_params": {
            "width": 128,
            "depth": 3,
            "d_head": 32,
            "d_motion": 32,
            "source_encoder_params": _TINY_ENCODER,
            "mapping_width": 128,
            "latent_channels": 3,
        },
    },
    "dismo_nano": {
        "motion_extractor_params": {
            "width": 64,
            "depth": 1,
            "d_head": 16,
            "d_motion": 16,
            "frame_encoder_params": _MICRO_ENCODER,
            "train_resolution": (8, 32, 32),
            "temporal_stem": True,
            "spread": True,
        },
        "frame_generator_params": {
            "width": 64,
            "depth": 2,
            "d_head": 16,
            "d_motion": 16,
            "source_encoder_params": _MICRO_ENCODER,
            "patch_size": (1, 1),
            "mapping_width": 64,
            "latent_channels": 3,
            "token_bias": True,
        },
    },
}
"""Arguments of `DisMo` by name."""
