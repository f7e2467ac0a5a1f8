"""The flow networks by name: the one list that teachers, evaluation and the command line read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kinema.models.flow.dis import DIS
from kinema.models.flow.raft.network import raft, raft_small
from kinema.models.flow.sea_raft.network import sea_raft_l, sea_raft_m, sea_raft_s
from kinema.models.flow.smurf.network import smurf


@dataclass(frozen=True)
class FlowNetwork:
    """How to build a network, and how it is used as a teacher."""

    build: Callable[..., nn.Module]
    """`build(pretrained=, weights=)`, in eval mode; sea_raft_* also take `scale=`."""
    teacher_iters: int = 0
    """Refinements when a teacher's config does not say; 0 is the preset of DIS."""
    takes_scale: bool = False
    """Whether the network can be run at another size than the frames'."""


FLOW_NETWORKS = {
    "dis": FlowNetwork(lambda pretrained=False, weights=None: DIS()),
    "raft": FlowNetwork(raft, 20),
    "raft_small": FlowNetwork(raft_small, 20),
    "sea_raft_s": FlowNetwork(sea_raft_s, 4, takes_scale=True),
    "sea_raft_m": FlowNetwork(sea_raft_m, 4, takes_scale=True),
    "sea_raft_l": FlowNetwork(sea_raft_l, 12, takes_scale=True),
    "smurf": FlowNetwork(smurf, 12),
}


def flow_network(name: str, pretrained: bool = False, weights: str | Path | None = None, scale: int = 0) -> nn.Module:
    """A flow network in eval mode, `model(image1, image2, iters=None) -> [B, 2, H, W]` px.

    Raises: ValueError for an unknown name, weights that do not fit, or a scale where there is none.
    """
    entry = FLOW_NETWORKS.get(name)
    if entry is None:
        raise ValueError(f"model={name} is no flow network; use one of {', '.join(FLOW_NETWORKS)}")
    options: dict[str, Any] = {}
    if entry.takes_scale:
        options["scale"] = scale
    elif scale:
        raise ValueError(f"scale={scale}: {name} runs at the size of the frames; use a sea_raft_* network or scale=0")
    return entry.build(pretrained=pretrained, weights=weights, **options)
