"""Low-rank adapter whose code is scaled and shifted by a condition, one per latent frame.

Source: Ressler-Antal et al., arXiv:2511.23428, section 3.3; Hu et al., LoRA, arXiv:2106.09685; Perez et al., FiLM,
arXiv:1709.07871. State-dict keys are those of the published adapter.

Shape legend: B batch, L tokens (text, then video by frame and cell), F latent frames, C condition width, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

ADAPTER = "default"


@dataclass
class AdapterState:
    """What all adapted layers of a network follow; set around a call by `following`."""

    condition: Float[Tensor, "B F C"] | None = None
    """None switches the adapter off: the base network answers."""
    num_text_tokens: int = 0
    """Tokens at the front that the condition does not touch."""

    @contextmanager
    def following(self, condition: Float[Tensor, "B F C"] | None, num_text_tokens: int) -> Iterator[None]:
        """The adapted layers follow this condition inside the block."""
        before = (self.condition, self.num_text_tokens)
        self.condition, self.num_text_tokens = condition, num_text_tokens
        try:
            yield
        finally:
            self.condition, self.num_text_tokens = before


class ConditionalLoRA(nn.Module):
    """A linear layer W x + (alpha / r) B ((1 + gamma c) A x + beta c), c the condition of a token's latent frame.

    Text tokens have neither gamma nor beta. A new adapter changes nothing: B, gamma and beta start at zero.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, cond_width: int, state: AdapterState):
        super().__init__()
        self.base_layer = base_layer
        self.scaling = alpha / rank
        self.state = state
        like: dict[str, Any] = {"bias": False, "device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        down, up = nn.Linear(base_layer.in_features, rank, **like), nn.Linear(rank, base_layer.out_features, **like)
        gamma, beta = (nn.Linear(cond_width, rank, **like) for _ in range(2))
        for closed in (up, gamma, beta):
            nn.init.zeros_(closed.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({ADAPTER: down}), nn.ModuleDict({ADAPTER: up})
        self.lora_emb_gamma, self.lora_emb_beta = nn.ModuleDict({ADAPTER: gamma}), nn.ModuleDict({ADAPTER: beta})

    def forward(self, x: Float[Tensor, "B L _"]) -> Float[Tensor, "B L _"]:
        """The adapted layer's output, or the base layer's where there is no condition.

        Raises: ValueError if the video tokens cannot be shared out over the condition's frames.
        """
        result = self.base_layer(x)
        condition = self.state.condition
        if condition is None:
            return result
        code = self.lora_A[ADAPTER](x)
        text, video = code.split([self.state.num_text_tokens, x.shape[1] - self.state.num_text_tokens], dim=1)
        frames = condition.shape[1]
        if video.shape[1] % frames:
            raise ValueError(f"{video.shape[1]} video tokens cannot be shared out over a condition of {frames} frames")
        gamma, beta = (
            rearrange(layer[ADAPTER](condition.to(x.dtype)), "b f r -> b f 1 r")
            for layer in (self.lora_emb_gamma, self.lora_emb_beta)
        )
        cells = rearrange(video, "b (f n) r -> b f n r", f=frames)
        video = rearrange((1 + gamma) * cells + beta, "b f n r -> b (f n) r")
        return result + self.scaling * self.lora_B[ADAPTER](torch.cat([text, video], dim=1))


def adapt_linear_layers(
    network: nn.Module, names: tuple[str, ...], rank: int, alpha: float, cond_width: int
) -> AdapterState:
    """Put an adapter around every linear layer whose name ends in one of `names`; all follow the state returned.

    The network's own parameters are frozen.
    Raises: ValueError if there is no such layer.
    """
    state = AdapterState()
    network.requires_grad_(False)
    chosen = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(name == end or name.endswith(f".{end}") for end in names)
    ]
    if not chosen:
        raise ValueError(f"the network has no linear layers named {', '.join(names)}")
    for name in chosen:
        parent, _, last = name.rpartition(".")
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        adapted = ConditionalLoRA(layer, rank, alpha, cond_width, state)
        network.get_submodule(parent).register_module(last, adapted)
    return state
