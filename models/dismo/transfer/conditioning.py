"""From motion embeddings to one condition per latent frame of a video autoencoder.

Source: Ressler-Antal et al., arXiv:2511.23428, section 3.3. A latent frame stands for four frames (the first for
one): a recurrent cell folds their embeddings, each group from the same learnt state.

Shape legend: B batch, Q embeddings (1 + 4 n), F latent frames (n + 2), d motion width, C condition width.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.dismo.layers import MappingNetwork


class MotionConditioning(nn.Module):
    """Embeddings of the first 1 + 4 n frames in, conditions of n + 2 latent frames out.

    The last latent frame, whose frames have no embedding of their own, gets a learnt condition.
    """

    def __init__(self, d_motion: int = 128, d_cond: int = 1024, motions_per_latent: int = 4):
        super().__init__()
        self.motions_per_latent = motions_per_latent
        self.init_gru_state = nn.Parameter(torch.zeros(d_cond))
        self.final_latent_cond_padding = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, d_cond), std=0.02))
        self.gru = nn.GRUCell(d_motion, d_cond)
        self.mapping = MappingNetwork(d_cond, depth=1)

    def forward(self, motion: Float[Tensor, "B Q d"]) -> Float[Tensor, "B F C"]:
        """Raises: ValueError for a number of embeddings that is not 1 + 4 n."""
        per = self.motions_per_latent
        if motion.shape[1] % per != 1 % per:
            raise ValueError(
                f"{motion.shape[1]} motion embeddings cannot be grouped as 1 + {per} n; a motion video of "
                f"{per} m + 1 frames gives as many"
            )
        first = self.fold(motion[:, :1])
        groups = rearrange(motion[:, 1:], "b (n k) d -> (b n) k d", k=per)
        later = rearrange(self.fold(groups), "(b n) c -> b n c", b=len(motion))
        mapped = self.mapping(torch.cat([first[:, None], later], dim=1))
        return torch.cat([mapped, self.final_latent_cond_padding.to(mapped.dtype).expand(len(motion), -1, -1)], dim=1)

    def fold(self, group: Float[Tensor, "B k d"]) -> Float[Tensor, "B C"]:
        """The cell's state after a group of embeddings, from the learnt one."""
        state = self.init_gru_state.expand(len(group), -1)
        for embedding in group.unbind(dim=1):
            state = self.gru(embedding, state)
        return state
