"""DinoFlow: optical flow in one pass from a frozen DINOv3 and a light head on their correlations."""

from kinema.models.dinoflow.model import FlowModel, FlowModelConfig, dinoflow_vits16

__all__ = ["FlowModel", "FlowModelConfig", "dinoflow_vits16"]
