"""FlowFeat: pixel-dense features distilled from flow (NeurIPS 2025)."""

from kinema.models.flowfeat.model import VARIANTS, FlowFeat, flowfeat
from kinema.models.flowfeat.probe import AttentionProbe
from kinema.models.flowfeat.training import FlowFeatLossConfig, FlowFeatTraining

__all__ = ["VARIANTS", "AttentionProbe", "FlowFeat", "FlowFeatLossConfig", "FlowFeatTraining", "flowfeat"]
