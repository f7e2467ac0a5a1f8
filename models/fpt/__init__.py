"""Flow Poke Transformer: the distribution of motion anywhere in an image, given a few pokes."""

from kinema.models.fpt.mixture import GaussianMixture
from kinema.models.fpt.model import PRESETS, FlowPokeTransformer, flow_poke_transformer

__all__ = ["PRESETS", "FlowPokeTransformer", "GaussianMixture", "flow_poke_transformer"]
