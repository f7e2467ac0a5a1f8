"""SMURF: RAFT trained without labels (Stone et al., CVPR 2021)."""

from kinema.models.flow.smurf.network import SMURF, smurf

__all__ = ["SMURF", "smurf"]
