"""CogVideoX (image to video) under the motion adapter.

Source: Ressler-Antal et al., arXiv:2511.23428, section 3.3; Yang et al., CogVideoX, arXiv:2408.06072. The
transformer is diffusers' own (optional extra `transfer`); the adapter's keys are the published ones.

Shape legend: B batch, F latent frames, c channels, h w latent size, C condition width.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kinema.models.dismo.transfer.conditional_lora import adapt_linear_layers
from kinema.models.dismo.transfer.conditioning import MotionConditioning
from kinema.models.weights import check_keys

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
RANK = 128
ALPHA = 64.0
D_COND = 1024
EXTRACTOR = "motion_extractor."
"""Keys of the published file that are not the adapter's."""


class MotionVideoTransformer(nn.Module):
    """A video transformer that follows motion embeddings; only adapter and conditioning are trained.

    Args: transformer, diffusers' CogVideoXTransformer3DModel; it is changed in place.
    """

    def __init__(
        self,
        transformer: nn.Module,
        rank: int = RANK,
        alpha: float = ALPHA,
        d_motion: int = 128,
        d_cond: int = D_COND,
    ):
        super().__init__()
        self.transformer = transformer
        self.state = adapt_linear_layers(transformer, TARGETS, rank, alpha, d_cond)
        conditioning = MotionConditioning(d_motion, d_cond)
        self.init_gru_state = conditioning.init_gru_state
        self.final_latent_cond_padding = conditioning.final_latent_cond_padding
        self.gru = conditioning.gru
        self.mapping = conditioning.mapping
        # Its parameters stand directly in the published state dict; the module itself is kept out of it.
        object.__setattr__(self, "conditioning", conditioning)
        self.adapter_names = frozenset(name for name, value in self.named_parameters() if value.requires_grad)

    def adapter_state(self) -> dict[str, Tensor]:
        """What is trained, under the published keys."""
        return {name: value for name, value in self.state_dict().items() if name in self.adapter_names}

    def load_adapter(self, tensors: Mapping[str, Tensor], source: str = "") -> None:
        """Load a published adapter. What the frozen base holds may be missing, nothing else.

        Args: source, where the tensors are from, for messages.
        Raises: ValueError naming the keys that are missing, not known or of another shape.
        """
        found = {name: value for name, value in tensors.items() if not name.startswith(EXTRACTOR)}
        check_keys(self.adapter_state(), found, source, "the adapter", also=self.state_dict().keys())
        self.load_state_dict(found, strict=False)

    def keep_only_block_inputs(self) -> None:
        """Make the blocks' activations again in the backward pass: less memory, about a third more time."""
        transformer: Any = self.transformer
        transformer.enable_gradient_checkpointing(self._recompute)

    def _recompute(self, block: nn.Module, *inputs: Any) -> Any:
        # The second run comes when `following` has ended: it follows what the first one did.
        condition, num_text_tokens = self.state.condition, self.state.num_text_tokens

        def run(*again: Any) -> Any:
            with self.state.following(condition, num_text_tokens):
                return block(*again)

        return checkpoint(run, *inputs, use_reentrant=False)

    def forward(
        self,
        latents: Float[Tensor, "B F c h w"],
        text: Float[Tensor, "B L E"],
        timestep: Int[Tensor, "B"],
        condition: Float[Tensor, "B F C"] | None,
        rotary: Any = None,
    ) -> Float[Tensor, "B F o h w"]:
        """Velocity; without a condition that of the base transformer.

        Args: latents, noisy video and condition picture along the channels; condition, from `conditioning`; rotary, the
            (cos, sin) tables of diffusers.
        """
        with self.state.following(condition, text.shape[1]):
            return self.transformer(
                hidden_states=latents,
                encoder_hidden_states=text,
                timestep=timestep,
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
