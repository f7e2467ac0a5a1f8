"""Settings of `kinema register`."""

from __future__ import annotations

from dataclasses import dataclass

from kinema.configs.checks import require


@dataclass(frozen=True)
class RegisterConfig:
    """`kinema register`: a run, or a network with published weights, in; a registry version out."""

    model: str = ""
    """Run folder or checkpoint, or the name of a network that `kinema models` shows, such as raft."""
    weights: str = ""
    """For a name: its weights, a file or URL; empty or `published`: the published ones."""
    name: str = ""
    """Registered model name; empty: the one that `kinema models` shows, such as kinema-flowfeat."""
    metric: str = ""
    """Metric that decides about `champion`, for example davis_jf; empty: the first of the evaluation."""
    higher_is_better: bool = True
    """Direction of the metric."""

    def __post_init__(self) -> None:
        rule = "use a name without / and :, for example kinema-flowfeat"
        require(not set(self.name) & set("/:"), "name", self.name, rule)
