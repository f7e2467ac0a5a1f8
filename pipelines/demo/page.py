"""The demo's page: it is there after the first stage, and grows with every further one and while training goes on."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from kinema.configs import WorkflowConfig
from kinema.pipelines import tracking
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.demo.measures import Explained, run_config
from kinema.pipelines.registry import registered_name
from kinema.pipelines.report import Page, sections
from kinema.pipelines.report.learned import add_learned
from kinema.pipelines.train import ClipLoader, load_model
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.workflow import WorkflowSummary

REFRESH_S = 10.0
LEARNED_SIDE = 160
_DOING = {
    "shard": "cutting and packing videos",
    "teach": "computing the teacher's flow",
    "track": "tracking points",
    "train": "training",
    "evaluate": "evaluating",
    "register": "registering",
    "embed": "computing features of every clip",
}


class GrowingPage:
    """Parts of the page by name, made once each; `follow` is what a workflow calls around its stages."""

    def __init__(self, config: WorkflowConfig, path: Path):
        self.config, self.path = config, path
        self.parts: dict[str, Page] = {}
        self.result: WorkflowSummary | None = None
        self.doing = "starting"
        self.explained: Explained | None = None
        self.known: dict[str, float] = {}
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._training = threading.Event()
        self._watcher: threading.Thread | None = None

    def follow(self, stage: str, event: str, so_far: WorkflowSummary) -> None:
        """A stage begins or has ended."""
        self._stop_watching()
        self.result = so_far
        self.doing = f"{_DOING[stage]} ..." if event == "begins" else f"{stage} done"
        if event == "ended":
            self._add_part(stage)
        self.write()
        if stage == "train" and event == "begins" and so_far.outputs.get("train"):
            self._watch(Path(so_far.outputs["train"]))

    def finish(self, explained: Explained | None, known: dict[str, float]) -> Path:
        """The whole page, as a plain file."""
        self._stop_watching()
        self.explained, self.known, self.doing = explained, known, ""
        return self.write()

    def write(self) -> Path:
        """Write what there is."""
        with self._lock:
            page = Page(
                "What your videos taught" if "train" in self.parts else "Demo at work", self._lead(), self.doing
            )
            self._figures(page)
            order = ("learned", "quarantine", "known", "train", "teach", "track", "shard", "evaluate")
            if self.known:
                self._add_known()
            for name in order:
                if name in self.parts:
                    page.extend(self.parts[name])
            if not self.doing:
                self._end(page)
            return page.write(self.path)

    def _lead(self) -> str:
        seconds = time.monotonic() - self._started
        return f"{self.config.shard.videos}: clips, {self.config.teach.teacher} flow, FlowFeat. {seconds:.0f} s so far."

    def _figures(self, page: Page) -> None:
        found = self.result.summaries if self.result else {}
        shard, teach, train = (found.get(stage, {}) for stage in ("shard", "teach", "train"))
        cards: dict[str, Any] = {"videos": shard.get("sources"), "clips": shard.get("clips")}
        cards |= {"flow pairs": teach.get("pairs"), "training steps": train.get("step")}
        if self.explained is not None:
            cards["variance explained, held-out frames"] = f"{100 * self.explained.r2:.0f} %"
            cards["before training"] = f"{100 * self.explained.r2_step_0:.0f} %"
            cards["best constant flow"] = "0 %"
        page.numbers({label: value for label, value in cards.items() if value is not None})
        if self.explained is not None:
            page.text(
                f"Judged on {self.explained.frames} frames of {self.explained.sources} videos from clips that training "
                "did not see: a linear map from features to flow is fitted on one crop of a frame and has to give the "
                "teacher's flow in another. Every frame counts the same."
            )
        for notice in train.get("notices", ()):
            page.text(f"Note: {notice}.")

    def _add_part(self, stage: str) -> None:
        assert self.result is not None
        outputs = self.result.outputs
        part = self.parts[stage] = Page("")
        if stage == "shard":
            part.section("Clips", "First, middle and last frame of clips that look different.")
            sections.add_clips(part, outputs["shard"], max_clips=9)
        elif stage == "teach":
            part.section(f"The teacher's flow ({self.config.teach.teacher})")
            sections.add_flow(part, outputs["teach"], outputs.get("shard"))
        elif stage == "train":
            part.section("Training", "Columns: input crop, teacher's flow, predicted flow, components of the features.")
            sections.add_run(part, outputs["train"])
            self._add_learned(outputs["train"])
        self._add_quarantine(outputs)

    def _add_quarantine(self, outputs: dict[str, str]) -> None:
        part = self.parts["quarantine"] = Page("")
        artifacts = [Artifact.read(outputs[stage]) for stage in ("shard", "teach") if self._has(stage)]
        sections.add_quarantine(part, artifacts)

    def _has(self, stage: str) -> bool:
        return self.result is not None and stage in self.result.stages

    def _add_learned(self, run: str) -> None:
        config = run_config(run)
        part = self.parts["learned"] = Page("")
        part.section("What was learned", "Move the slider: the same moments in every column, on different videos.")
        loader = ClipLoader(config, make_recipe(config))
        index: Any = loader.held_out()
        if len(set(index.table["source"].to_pylist())) < 6:
            index = loader.all_clips()
        add_learned(part, load_model(run), index, side=LEARNED_SIDE, ridge_alpha=config.settings.ridge_alpha)

    def _add_known(self) -> None:
        part = self.parts["known"] = Page("")
        part.section("Against known motion", "These scenes were rendered, so their exact motion is known.")
        part.table([{"measure": KNOWN[name], "value": value} for name, value in self.known.items()])

    def _end(self, page: Page) -> None:
        assert self.result is not None
        page.section("Time")
        rows = [(stage, found.get("seconds")) for stage, found in self.result.summaries.items()]
        page.table([{"stage": stage, "seconds": s, "now": self.result.stages[stage]} for stage, s in rows])
        page.section("Use it")
        name = registered_name(self.config.register, self.config.train.model)
        page.code(
            "import mlflow\n"
            f'mlflow.set_tracking_uri("{tracking.tracking_uri()}")\n'
            f'model = mlflow.pyfunc.load_model("models:/{name}@champion")\n'
            "features = model.predict(images)  # uint8 [B, H, W, 3]"
        )

    def _watch(self, run: Path) -> None:
        """Show the loss curve while training goes on."""
        self._training.clear()
        self._watcher = threading.Thread(target=self._refresh, args=(run,), name="kinema-demo-curve", daemon=True)
        self._watcher.start()

    def _refresh(self, run: Path) -> None:
        while not self._training.wait(REFRESH_S):
            try:
                part = Page("")
                part.section("Training")
                sections.add_run(part, run)
                self.parts["train"] = part
                self.write()
            except (OSError, ValueError) as error:  # a file that is being replaced; the next look finds it
                sys.stderr.write(f"demo: the page was not refreshed: {error}\n")

    def _stop_watching(self) -> None:
        if self._watcher is not None:
            self._training.set()
            self._watcher.join()
            self._watcher = None


KNOWN = {
    "teacher_epe_px": "end-point error of the teacher's flow, training clips, px",
    "student_epe_px_step_0": "of flow read from features, held-out scenes, before training, px",
    "student_epe_px": "of flow read from features, held-out scenes, after training, px",
    "constant_epe_px": "of the fitted crop's mean flow, held-out scenes, px",
    "student_r2_step_0": "variance explained on held-out scenes, before training",
    "student_r2": "variance explained on held-out scenes, after training",
}
