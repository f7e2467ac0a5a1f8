"""SEA-RAFT S, M and L (Wang, Lipson and Deng, arXiv:2405.14793)."""

from kinema.models.flow.sea_raft.network import SEARAFT, sea_raft, sea_raft_l, sea_raft_m, sea_raft_s

__all__ = ["SEARAFT", "sea_raft", "sea_raft_l", "sea_raft_m", "sea_raft_s"]
