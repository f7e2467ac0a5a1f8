"""WAFT (Wang and Deng, arXiv:2506.21526)."""

from kinema.models.flow.waft.network import WAFT, waft

__all__ = ["WAFT", "waft"]
