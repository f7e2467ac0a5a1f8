"""Training of the motion adapter: a video model learns to follow the embeddings of its own videos.

Source: Ressler-Antal et al., DisMo, NeurIPS 2025, arXiv:2511.23428, section 3.3 and appendix; no training script is
published. Deviations: clips are chosen by time, every random choice is seeded by the sample or the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kinema.configs import TrainConfig, TransferTrainingConfig
from kinema.models.dismo.target_offset import clip_frames, frame_times
from kinema.models.dismo.transfer.base import load_base
from kinema.models.dismo.transfer.model import NAME, MotionTransfer, fit_frames
from kinema.models.weights import LEDGER, licence_notice
from kinema.pipelines.loader import Clip, Skip
from kinema.pipelines.pictures.images import panel
from kinema.pipelines.precision import choose
from kinema.pipelines.train.recipes.protocol import Batch, ExportedModel, Loss, as_count
from kinema.pipelines.train.recipes.transfer.module import AdapterTraining
from kinema.pipelines.transfer.adapter import find_adapter
from kinema.pipelines.transfer.extractor import load_extractor

TOO_SHORT = "too short, or fewer frames a second than transfer.fps"
NUM_BINS = 4
PICTURE_SAMPLES = 2
FRAMES_SHOWN = 4


@dataclass(frozen=True)
class TransferRecipe:
    """See `protocol.Recipe`. `weights` (a published adapter, or a run of this model) starts the adapter."""

    config: TransferTrainingConfig
    weights: str = ""
    bf16: bool = False
    """Whether the frozen base is kept in bfloat16; the adapter is float32."""
    needs: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: TrainConfig) -> TransferRecipe:
        """From a training's config; folders become absolute, since ranks work in another one."""
        settings = config.settings
        here = {name: getattr(settings, name) for name in ("base", "extractor")}
        moved = {name: str(Path(value).resolve()) for name, value in here.items() if value and Path(value).exists()}
        gpu = torch.cuda.is_available() and config.use_gpu != "no"
        bf16 = choose(config.precision, torch.device("cuda" if gpu else "cpu"), cls) == "bf16"
        return cls(dataclasses.replace(settings, **moved), config.weights, bf16)

    def check(self) -> None:
        """Refuse, before anything starts, a base, extractor or adapter that cannot be loaded (ValueError)."""
        self._new_model().base.check_size(self.config.height, self.config.width)

    def notices(self) -> tuple[str, ...]:
        """What a user must know of a model trained so."""
        extractor = licence_notice("motion_extractor_large") if self.config.extractor == "published" else ""
        adapter = licence_notice(NAME) if self.weights == "published" else ""
        return tuple(filter(None, (extractor, adapter)))

    def build(self) -> AdapterTraining:
        """The whole model; only the adapter asks for gradients."""
        model = self._new_model()
        for name, parameter in model.named_parameters():
            if name in model.adapter_names:
                # The base may be in bfloat16, in which small updates would be lost.
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        if self.config.checkpoint_layers:
            model.keep_only_block_inputs()
        return AdapterTraining(model).train()

    def compiled_units(self, module: nn.Module) -> list[nn.Module]:
        """The base's blocks."""
        assert isinstance(module, AdapterTraining)
        return list(module.model.base.transformer.transformer_blocks)

    def read_sample(self, clip: Clip, rng: np.random.Generator) -> dict[str, Any] | Skip:
        """frames uint8 [T, H, W, 3], nearest in time and of the base's size; prompt, the clip's caption or nothing."""
        config = self.config
        times = frame_times(clip.meta["pts"], clip.meta["time_base"])
        chosen = clip_frames(times, config.fps, config.num_frames, rng)
        if chosen is None:
            return Skip(TOO_SHORT)
        caption = str((clip.meta.get("labels") or {}).get(config.caption_column) or "")
        dropped = rng.random() < config.caption_dropout
        frames = torch.from_numpy(clip.frames(chosen.tolist())).float() / 127.5 - 1
        pixels = ((fit_frames(frames, config.height, config.width) + 1) * 127.5).round().to(torch.uint8)
        return {"frames": pixels, "prompt": "" if dropped else caption}

    def loss(self, module: nn.Module, batch: Batch) -> Loss:
        """Squared error of the clean latent, weighted by the step; every sample counts."""
        assert isinstance(module, AdapterTraining)
        frames = batch["frames"].float() / 127.5 - 1
        per_sample, steps = module.model.training_loss(frames, batch["prompt"])
        metrics = _by_step(per_sample.detach(), steps, len(module.model.base.signal_shares))
        return Loss(per_sample.mean(), as_count(len(frames), frames), metrics)

    def after_step(self, module: nn.Module, step: int) -> None:
        """Nothing moves with the adapter."""

    def pictures(self, module: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Frames of a clip above those of the video that is made of its first frame, caption and motion."""
        assert isinstance(module, AdapterTraining)
        count = min(PICTURE_SAMPLES, len(batch["frames"]))
        clips = batch["frames"][:count]
        made = module.model.sample(
            prompts=batch["prompt"][:count],
            images=clips[:, 0],
            motion_videos=clips,
            text_guidance_scale=self.config.guidance,
            n_steps=self.config.sample_steps,
            generator=torch.Generator().manual_seed(0),
        )
        shown = np.linspace(0, clips.shape[1] - 1, FRAMES_SHOWN).round().astype(int)
        rows = [video.cpu().numpy()[t] for pair in zip(clips, made, strict=True) for video in pair for t in shown]
        return {"clip_generated": panel(rows, columns=FRAMES_SHOWN)}

    def published_model(self, tensors: Mapping[str, Tensor], ema: bool = True) -> MotionTransfer:
        """The whole model with a checkpoint's adapter; there is no average."""
        model = self._new_model(start=False)
        model.load_adapter(tensors, "checkpoint")
        return model.requires_grad_(False).eval()

    def export(self, model: nn.Module) -> ExportedModel:
        """The adapter under the published keys, and the extractor that it follows; not the base."""
        assert isinstance(model, MotionTransfer)
        extractor = {f"motion_extractor.{k}": v for k, v in model.motion_extractor.state_dict().items()}
        return ExportedModel(
            architecture=NAME,
            config={"base": self.config.base},
            tensors={**model.adapter_state(), **extractor},
            inputs={"fps": self.config.fps},
            licences={"extractor": LEDGER[NAME].licence} if self.config.extractor == "published" else {},
        )

    def _new_model(self, start: bool = True) -> MotionTransfer:
        base = load_base(self.config.base, torch.bfloat16 if self.bf16 else torch.float32)
        model = MotionTransfer(base, load_extractor(self.config.extractor), self.config.rank, self.config.d_cond)
        if start and self.weights:
            adapter = find_adapter(self.weights)
            model.load_adapter(adapter.tensors, adapter.source)
        return model


def _by_step(loss: Tensor, steps: Tensor, num_steps: int) -> dict[str, Tensor]:
    """loss_s1 .. loss_s4: mean over the samples in each quarter of the diffusion steps, least noise first.

    Where a quarter has no sample, that of all.
    """
    metrics = {}
    for number in range(NUM_BINS):
        members = (steps * NUM_BINS // num_steps == number).float()
        count = members.sum()
        mean = (loss * members).sum() / count.clamp(min=1)
        metrics[f"loss_s{number + 1}"] = torch.where(count > 0, mean, loss.mean())
    return metrics
