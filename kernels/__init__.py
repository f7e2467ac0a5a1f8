"""Operations that the models lean on, each with a plain reference and a dispatching front."""

from kinema.kernels.correlation_lookup import correlation_lookup

__all__ = ["correlation_lookup"]
