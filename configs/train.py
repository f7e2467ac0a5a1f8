"""Settings of `kinema train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kinema.configs.checks import require, require_choice
from kinema.configs.loader import LoaderConfig
from kinema.configs.models.table import MODELS
from kinema.configs.rendered import RenderedSourceConfig


@dataclass(frozen=True)
class TrainConfig:
    """`kinema train`: clips/ + sidecars in, a run out."""

    clips: str = ""
    """The clips artifact; or the word `rendered`: pairs with exact flow, rendered when they are needed (`rendered.*`),
    without clips and flow artifacts."""
    rendered: RenderedSourceConfig = field(default_factory=RenderedSourceConfig)
    """What `clips=rendered` renders."""
    flow: str = ""
    """The flow artifact of one teacher."""
    other_flow: tuple[str, ...] = ()
    """Flow artifacts of further teachers over the same clips; a clip is used when all have it."""
    flow_use: Literal["choose", "average"] = "choose"
    """With several teachers: draw one for every sample, or average their flow."""
    tracks: str = ""
    """The tracks artifact; `fpt` learns from it."""
    out: str = ""
    """Folder of the run: checkpoints and logs."""
    model: str = field(default="flowfeat", metadata={"choices": MODELS.trainable})
    """Which model trains."""
    weights: str = ""
    """Checkpoint to start the model from (file or URL); empty: from initialisation."""
    settings: Any = field(default=None, metadata={"sections": "model"})
    """Settings of that model's training, a dataclass of its row in the table of models; in files and on the command
    line they stand under the row's section, as in flowfeat.crop=224."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How samples are drawn."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 128
    """Samples per optimizer step over all ranks; divisible by num_workers * accumulate."""
    accumulate: int = 1
    """Backward passes per optimizer step."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decays."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    schedule: Literal["constant", "cosine", "poly", "linear"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of cosine, poly and linear schedules."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 means no clipping."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix products (weights stay fp32). auto: bf16 on GPUs that have instructions for it, and on such CPUs where
    the model was shown to learn as it does in fp32 (FlowFeat); fp32 elsewhere. The summary says which; a run goes on as
    it began."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the model's layers are compiled by torch.compile (fpt, dismo, transfer); weights and checkpoints are
    the same, results differ in the last bits. auto: on a GPU, for fpt and dismo."""
    copy_ahead: Literal["auto", "on", "off"] = "auto"
    """Whether the next batch is copied to the device while a step computes; auto: on a GPU. The samples, and what a
    checkpoint goes on with, are the same."""
    seed: int = 0
    """Seed of initialisation, order and every random choice."""
    num_workers: int = 1
    """Ray Train workers (ranks)."""
    min_workers: int = 0
    """Fewest ranks to go on with while nodes are missing: Ray Train then takes as many between this and num_workers as
    there is room for, and the global batch stays; 0: wait for all."""
    sharding: Literal["none", "full"] = "none"
    """Several ranks: each holds the whole model, or its share of weights, gradients and optimizer state (FSDP2)."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether each worker gets a GPU."""
    cpus_per_worker: float = 1.0
    """CPUs Ray reserves for each worker; threads follow it."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and at a stop signal."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 0
    """Checkpoints kept besides: those with the lowest mean loss since the one before them."""
    log_every: int = 10
    """Steps between metric points."""
    pictures_every: int = 500
    """Steps between pictures (input, teacher flow, predicted flow, feature PCA); 0 means only at the end."""
    measure_every: int = 0
    """Steps between measurements on clips that `loader.hold_out` keeps out of training, and one at the end (dismo:
    how well the nearest embeddings tell every label that the clips have); 0: none."""
    max_failures: int = 3
    """Lost workers that are replaced before the run fails."""
    experiment: str = ""
    """MLflow experiment; empty: the workflow's, else kinema."""
    run_name: str = ""
    """MLflow run name; empty: model and config hash."""

    def __post_init__(self) -> None:
        require_choice("model", self.model, MODELS.trainable())
        expected = MODELS[self.model].settings
        if self.settings is None and expected is not None:
            object.__setattr__(self, "settings", expected())
        if expected is not None and not isinstance(self.settings, expected):
            given = type(self.settings).__name__
            raise ValueError(f"settings is a {given}, but model={self.model} takes {expected.__name__}")
        require(self.steps >= 1, "steps", self.steps, "use 1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "use 1 or more")
        require(self.accumulate >= 1, "accumulate", self.accumulate, "use 1 or more")
        require(self.num_workers >= 1, "num_workers", self.num_workers, "use 1 or more ranks")
        require(self.lr > 0, "lr", self.lr, "use a positive rate")
        require(self.clip_norm >= 0, "clip_norm", self.clip_norm, "use a positive norm, or 0 for none")
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "use 1 or more steps")
        require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "use 1 or more")
        require(self.keep_best >= 0, "keep_best", self.keep_best, "use 0 or more")
        require(self.log_every >= 1, "log_every", self.log_every, "use 1 or more steps")
        rule = "it looks at clips that training does not see; set loader.hold_out=8, or measure_every=0"
        require(self.measure_every == 0 or self.loader.hold_out > 0, "measure_every", self.measure_every, rule)
        rule = "it takes several teachers; name the others' flow: other_flow=[DIR]"
        require(self.flow_use == "choose" or bool(self.other_flow), "flow_use", self.flow_use, rule)
        rule = f"use 1 to num_workers={self.num_workers}, or 0 to wait for all"
        require(0 <= self.min_workers <= self.num_workers, "min_workers", self.min_workers, rule)
        for ranks in range(self.min_workers or self.num_workers, self.num_workers):
            rule = f"batch_size={self.batch_size} does not divide among {ranks} ranks * accumulate={self.accumulate}"
            require(self.batch_size % (ranks * self.accumulate) == 0, "min_workers", self.min_workers, rule)
        world = self.num_workers * self.accumulate
        if self.batch_size % world:
            low, high = self.batch_size // world * world, -(-self.batch_size // world) * world
            sizes = f"{low} or {high}" if low else f"{high}"
            rule = f"is not divisible by num_workers * accumulate = {world}"
            raise ValueError(f"batch_size={self.batch_size} {rule}; use {sizes}")
