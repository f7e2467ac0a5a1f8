"""RAFT and RAFT-small (Teed and Deng, arXiv:2003.12039)."""

from kinema.models.flow.raft.network import RAFT, raft, raft_small

__all__ = ["RAFT", "raft", "raft_small"]
