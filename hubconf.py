"""Models by name for `torch.hub.load(repo, name, pretrained=..., weights=...)`.

Every entry returns a model in eval mode. `pretrained=True` downloads the published weights once;
`weights` is a path or URL of a checkpoint to load instead. Files are read without running code from them.
"""

import importlib.machinery as _machinery
import importlib.util as _util
import sys as _sys
from functools import partial as _partial
from pathlib import Path as _Path

dependencies = ["torch", "numpy", "jaxtyping", "einops"]


def _expose_package(root):
    """Make `kinema` importable from this checkout, installed or not."""
    if "kinema" in _sys.modules:
        return
    if (root / "src" / "kinema" / "models").is_dir():
        _sys.path.insert(0, str(root / "src"))
        return
    # A repository unpacked from a zip archive has text files where the links of src/kinema were.
    package = _util.module_from_spec(_machinery.ModuleSpec("kinema", None, is_package=True))
    package.__path__ = [str(root)]
    _sys.modules["kinema"] = package


_expose_package(_Path(__file__).resolve().parent)


def _backbone(name, pretrained=False, weights=None, **options):
    from kinema.models.backbones.vision_transformer import vision_transformer

    return vision_transformer(name, pretrained=pretrained, weights=weights, **options)


def _entry(name, doc):
    entry = _partial(_backbone, name)
    entry.__doc__ = doc
    entry.__name__ = name
    return entry


dino_vits16 = _entry("dino_vits16", "DINO ViT-S/16: 384 channels, 12 blocks, any image of at least 16x16.")
dino_vitb16 = _entry("dino_vitb16", "DINO ViT-B/16: 768 channels, 12 blocks, any image of at least 16x16.")
dinov2_vits14 = _entry("dinov2_vits14", "DINOv2 ViT-S/14: 384 channels, 12 blocks, sides multiples of 14.")
dinov2_vitb14 = _entry("dinov2_vitb14", "DINOv2 ViT-B/14: 768 channels, 12 blocks, sides multiples of 14.")
dinov2_vitl14 = _entry("dinov2_vitl14", "DINOv2 ViT-L/14: 1024 channels, 24 blocks, sides multiples of 14.")
dinov2_vits14_reg = _entry("dinov2_vits14_reg", "DINOv2 ViT-S/14 with 4 registers, sides multiples of 14.")
dinov2_vitb14_reg = _entry("dinov2_vitb14_reg", "DINOv2 ViT-B/14 with 4 registers, sides multiples of 14.")
dinov2_vitl14_reg = _entry("dinov2_vitl14_reg", "DINOv2 ViT-L/14 with 4 registers, sides multiples of 14.")
dinov3_vits16 = _entry("dinov3_vits16", "DINOv3 ViT-S/16: 384 channels, 12 blocks, 4 registers; gated weights.")
mae_vitb16 = _entry("mae_vitb16", "MAE ViT-B/16 for one image_size=(height, width), 224x224 by default.")


def flowfeat(name="dinov2_vits14_yt", pretrained=False, weights=None, **options):
    """FlowFeat: `model(x) -> (y_enc, y_dec)` for ImageNet-normalised images x [B, 3, H, W].

    Names: dino_vits16_yt, dino_vitb16_yt, dino_vitb16_kt, mae_vitb16_kt, dinov2_vits14_yt,
    dinov2_vitb14_yt, dinov2_vitb14_kt.
    """
    from kinema.models.flowfeat.model import flowfeat as build

    return build(name, pretrained=pretrained, weights=weights, **options)


def raft(pretrained=False, weights=None):
    """RAFT: `model(image1, image2, iters=None, flow_init=None)` -> flow [B, 2, H, W] in pixels."""
    from kinema.models.flow.raft.network import raft as build

    return build(pretrained=pretrained, weights=weights)


def raft_small(pretrained=False, weights=None):
    """RAFT-small: `model(image1, image2, iters=None, flow_init=None)` -> flow [B, 2, H, W] in pixels."""
    from kinema.models.flow.raft.network import raft_small as build

    return build(pretrained=pretrained, weights=weights)


def sea_raft_s(pretrained=False, weights=None, scale=0):
    """SEA-RAFT S: `model(image1, image2, iters=None, flow_init=None)` -> flow [B, 2, H, W] in pixels.

    The network sees the images at 2^scale times their size; the published weights were made for scale=-1 on 1080p.
    """
    from kinema.models.flow.sea_raft.network import sea_raft_s as build

    return build(pretrained=pretrained, weights=weights, scale=scale)


def sea_raft_m(pretrained=False, weights=None, scale=0):
    """SEA-RAFT M: as sea_raft_s, with deeper encoders."""
    from kinema.models.flow.sea_raft.network import sea_raft_m as build

    return build(pretrained=pretrained, weights=weights, scale=scale)


def sea_raft_l(pretrained=False, weights=None, scale=0):
    """SEA-RAFT L: as sea_raft_m, with 12 refinements instead of 4."""
    from kinema.models.flow.sea_raft.network import sea_raft_l as build

    return build(pretrained=pretrained, weights=weights, scale=scale)


def smurf(pretrained=False, weights=None):
    """SMURF: `model(image1, image2, iters=None, flow_init=None)` -> flow [B, 2, H, W] in pixels.

    weights is a state dict of the PyTorch port; no converted weights are published.
    """
    from kinema.models.flow.smurf.network import smurf as build

    return build(pretrained=pretrained, weights=weights)


def dinoflow_vits16(pretrained=False, weights=None, backbone_weights=None, reading="B"):
    """DinoFlow on DINOv3 ViT-S/16: `model(image1, image2, iters=None, flow_init=None)` -> flow [B, 2, H, W] in pixels.

    weights is a whole model or a head alone; backbone_weights the encoder's file, which is gated, for a head alone.
    """
    from kinema.models.dinoflow.model import dinoflow_vits16 as build

    return build(pretrained=pretrained, weights=weights, backbone_weights=backbone_weights, reading=reading)


def waft(name="vits", pretrained=False, weights=None, scale=0):
    """WAFT: `model(image1, image2, iters=None)` -> flow [B, 2, H, W] in pixels; `with_info` adds the uncertainty.

    name is the size of the refinement transformer (vitt, vits, vitb, vitl); a checkpoint's shapes go before it.
    """
    from kinema.models.flow.waft.network import waft as build

    return build(name, pretrained=pretrained, weights=weights, scale=scale)


def cotracker3(pretrained=False, weights=None):
    """CoTracker3 offline: `model(video, queries, iters)` -> tracks in pixels, visibility, confidence.

    video is [B, T, 3, H, W] in 0..255, queries [B, N, 3] (t, x, y). Published weights are non-commercial.
    """
    from kinema.models.tracks.cotracker3.network import cotracker3 as build

    return build(pretrained=pretrained, weights=weights)


def alltracker(name="alltracker", pretrained=False, weights=None):
    """AllTracker, or alltracker_tiny: `model(video, iters=None)` -> dense tracks of frame 0.

    video is [B, T, 3, H, W] in 0..255; the result is flow [B, T, 2, H, W] in pixels from frame 0 and, of the same
    shape, the probabilities of seen and of confident. `model.sliding` keeps the first estimate of each frame.
    """
    from kinema.models.tracks.alltracker.network import alltracker as build

    return build(name, pretrained=pretrained, weights=weights)


def fpt_base(pretrained=False, weights=None):
    """Flow Poke Transformer: distribution of the flow at any point of an image, given the flow at a few points.

    `d_img = model.embed_image(image)` for images [B, 3, H, W] in -1..1, then `model.predict_parallel(poke_pos,
    poke_flow, query_pos, camera_static, d_img)` or `model.predict_autoregressive(...)` with positions (x, y) in 0..1
    and flow in the same units. Published weights are non-commercial.
    """
    from kinema.models.fpt.model import flow_poke_transformer as build

    return build("fpt_base", pretrained=pretrained, weights=weights)


def motion_extractor_large(pretrained=False, weights=None):
    """DisMo's motion extractor: `model(x)`, `model.forward_sliding(video)` -> embeddings [B, T - 4, 128].

    Videos are [B, T, H, W, 3], floating in -1..1 or uint8. Published weights are non-commercial.
    """
    from kinema.models.dismo.motion_extractor import motion_extractor as build

    return build("motion_extractor_large", pretrained=pretrained, weights=weights)


def cogvideox5b_i2v_large(
    pretrained=False, weights=None, base="THUDM/CogVideoX-5b-I2V", dtype=None, vae_slicing=True, vae_tiling=True
):
    """CogVideoX-5B-I2V under DisMo's motion adapter: `model.sample(motion_videos=, images=, prompts=)` -> uint8 videos.

    Motion videos are [B, T, H, W, 3] and pictures [H, W, 3], floating in -1..1 or uint8; base is a folder in diffusers'
    form or a name on the hub. Needs the extra `transfer`. Published adapter weights are non-commercial.
    """
    from kinema.models.dismo.transfer.model import cogvideox5b_i2v_large as build

    return build(pretrained, weights, base, dtype, vae_slicing, vae_tiling)


def frame_generator_large(pretrained=False, weights=None):
    """DisMo's frame generator: `model.sample(source_frames, motion, delta_times)` -> latents of later frames.

    Frames are [B, H, W, 3] in -1..1, latents [B, H/8, W/8, 4]. No weights are published.
    """
    from kinema.models.dismo.frame_generator import frame_generator_large as build

    return build(pretrained=pretrained, weights=weights)
