"""`kinema transfer`: a new video that begins with a picture and moves as another video does."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kinema.configs import TransferConfig
from kinema.models.dismo.transfer.base import load_base, need_libraries
from kinema.models.dismo.transfer.model import MotionTransfer, assemble
from kinema.models.weights import NonCommercialWeightsWarning
from kinema.pipelines.pictures.motion import write_mp4
from kinema.pipelines.precision import choose
from kinema.pipelines.progress import Progress
from kinema.pipelines.single import read_image
from kinema.pipelines.transfer.adapter import find_adapter
from kinema.pipelines.transfer.extractor import load_extractor
from kinema.pipelines.transfer.inputs import read_motion

__all__ = ["TransferSummary", "run"]


@dataclass(frozen=True)
class TransferSummary:
    """What was made."""

    out: str
    """The video."""
    frames: int
    height: int
    """In pixels."""
    width: int
    fps: float
    """Frames a second."""
    steps: int
    """Diffusion steps."""
    guidance: float
    """By text; 1 where there was no prompt."""
    seed: int
    seconds: float
    """Wall time, loading included."""
    notices: tuple[str, ...] = ()
    """What a user must know of the weights."""
    exit_status: int = 0
    """Always 0."""


def run(config: TransferConfig, *, report: Callable[[dict[str, Any]], None] | None = None) -> TransferSummary:
    """Make the video. Small things are read first, so that a wrong picture does not cost the loading of a network.

    Args: report is called with {"stage", "step", "steps"} after every diffusion step.
    Raises: ValueError for settings, files or weights that cannot be used, or without the extra `transfer`.
    """
    started = time.monotonic()
    out = _check(config)
    motion, image = read_motion(config), read_image(config.image)
    need_libraries()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NonCommercialWeightsWarning)
        model = load(config)
    notices = tuple(str(w.message) for w in caught if issubclass(w.category, NonCommercialWeightsWarning))
    for notice in notices:
        sys.stderr.write(f"kinema transfer: {notice}\n")
    progress = Progress("transfer", config.steps, "steps")

    def on_step(step: int) -> None:
        progress.update(step)
        if report:
            report({"stage": "transfer", "step": step, "steps": config.steps})

    video = model.sample(
        prompts=[config.prompt] if config.prompt else None,
        images=[torch.from_numpy(image)],
        motion_videos=torch.from_numpy(motion)[None],
        width=config.width or None,
        height=config.height or None,
        text_guidance_scale=config.guidance,
        n_steps=config.steps,
        # A CPU's generator: the same noise on every device.
        generator=torch.Generator().manual_seed(config.seed),
        negative_prompt=config.negative_prompt or None,
        on_step=on_step,
    )[0]
    progress.close()
    write_mp4(out, video.numpy(), config.fps)
    frames, height, width = video.shape[:3]
    guidance = config.guidance if config.prompt else 1.0
    seconds = round(time.monotonic() - started, 3)
    return TransferSummary(
        str(out), frames, height, width, config.fps, config.steps, guidance, config.seed, seconds, notices
    )


def load(config: TransferConfig) -> MotionTransfer:
    """The model that a config asks for, on its device. Raises: ValueError."""
    device = _device(config)
    bf16 = choose(config.precision, device, None) == "bf16"
    base = load_base(config.base, torch.bfloat16 if bf16 else torch.float32)
    base.check_size(config.height or base.size[0], config.width or base.size[1])
    base.check_prompts([config.prompt, config.negative_prompt])
    adapter = find_adapter(config.weights)
    address = config.extractor or adapter.extractor
    extractor = load_extractor(address) if address else None
    model = assemble(base, adapter.tensors, adapter.source, extractor, config.slicing, config.tiling)
    model.offload = config.offload
    if config.offload == "none":
        return model.to(device)
    # What is offloaded comes to the device by itself; the rest is small.
    for part in (model.motion_extractor, model.conditioning):
        part.to(device)
    return model


def _check(config: TransferConfig) -> Path:
    for name in ("motion", "image", "out"):
        if not getattr(config, name):
            raise ValueError(f"{name} is empty; set {name}=")
    out = Path(config.out)
    if out.suffix != ".mp4":
        raise ValueError(f"out={config.out}: the video becomes an .mp4; name it so")
    if config.offload != "none" and _device(config).type == "cpu":
        raise ValueError(f"offload={config.offload} keeps weights away from a GPU, and none is used; use offload=none")
    return out


def _device(config: TransferConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but there is no GPU; use device=cpu")
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")
