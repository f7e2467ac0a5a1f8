"""Operations that the models lean on, each with a plain reference and a dispatching front."""

from kinema.kernels.convex_upsampling import convex_upsample
from kinema.kernels.correlation_lookup import correlation_lookup
from kinema.kernels.cosine_attention import cosine_attention
from kinema.kernels.local_correlation import local_correlation

__all__ = ["convex_upsample", "correlation_lookup", "cosine_attention", "local_correlation"]
