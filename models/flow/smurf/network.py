"""SMURF: RAFT trained without labels.

The network is RAFT with instance norm in both encoders, and with the rows of the lookup window as its
outer axis. Its state dict has the names of the PyTorch port, which are kept at the border: inside
(`named_parameters`) the modules have RAFT's names.

Images are float in 0..1, any size; flow is (x, y) in pixels of those images.

Source: Stone et al., "SMURF: Self-Teaching Multi-Frame Unsupervised RAFT with Full-Image Warping", CVPR
2021, arXiv:2105.07014; names and numbers of the port ChristophReich1996/SMURF. Deviation: sizes that are
no multiple of 8 or below 128 are padded as by RAFT, where the port refuses them.
"""

import re
from pathlib import Path
from typing import Any

from torch import nn

from kinema.models.flow.raft.layers import Encoder, ResidualBlock
from kinema.models.flow.raft.network import RAFT
from kinema.models.weights import resolve_weights

# RAFT's name, the port's name; applied in this order to every key. Exact in both directions.
_NAMES = (
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"_encoder\.conv1\.", "_encoder.convnormrelu.0."),
    (r"_encoder\.conv2\.", "_encoder.conv."),
    (r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"^update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"^update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"^update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"^update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
)


class SMURF(RAFT):
    """`model(image1, image2)` gives the flow from image1 to image2; calls and arguments are those of `RAFT`."""

    window_order = "y_major"

    def __init__(self, padding: str = "sintel", lookup: str = "auto") -> None:
        super().__init__("large", padding, lookup)
        self.cnet = Encoder(ResidualBlock, (64, 96, 128), 256, "instance")
        self.raft_names = {_published(name): name for name in self.state_dict()}
        """Name of every tensor inside the module, by its name in the state dict."""
        self.register_state_dict_post_hook(_to_published)
        self.register_load_state_dict_pre_hook(_from_published)

    @property
    def arguments(self) -> dict[str, str]:
        """What the constructor is called with to make this network again."""
        return {"padding": self.padding}


def smurf(pretrained: bool = False, weights: str | Path | None = None) -> SMURF:
    """SMURF; `weights` is a file or URL of the port's state dict. There are no published weights to download."""
    return resolve_weights(SMURF(), "smurf", pretrained, weights).eval()


def _published(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _to_published(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(model, SMURF)
    for published, name in model.raft_names.items():
        state[prefix + published] = state.pop(prefix + name)


def _from_published(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(model, SMURF)
    for published, name in model.raft_names.items():
        if prefix + published in state:
            state[prefix + name] = state.pop(prefix + published)
