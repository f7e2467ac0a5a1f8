"""float32 for 16-bit matrix units: two float16 parts of values that are divided by a power of two."""

import triton
import triton.language as tl


@triton.jit
def halves(values, axis: tl.constexpr):
    """Values [M, N] float32 along an axis as (high, low, scale): (high + low) scale, the scale without that axis.

    The scale is the power of two that brings the largest to [1, 2). Both parts hold 22 of float32's 24 bits, or what
    is above 2^-25 of the largest; the high one alone as many as TF32, or what is above 2^-25 of the largest.
    """
    exponent = tl.max(tl.abs(values), axis=axis).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    values = values * tl.expand_dims(((254 - exponent) << 23).to(tl.float32, bitcast=True), axis)
    high = values.to(tl.float16)
    low = (values - high.to(tl.float32)).to(tl.float16)
    return high, low, (exponent << 23).to(tl.float32, bitcast=True)
