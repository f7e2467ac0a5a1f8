"""Convex upsampling in one pass over the logits, and its gradients in two, without atomics.

A program takes PIXELS coarse pixels of a row with all their fine pixels, SUB of each (f^2, padded to a power of two),
and all channels. Logits of one neighbour at a time go through a running softmax: nothing of the size of the logits is
written in the forward pass, which is bound by reading them.
"""

import triton
import triton.language as tl


@triton.jit
def _place(number, height, width, PIXELS: tl.constexpr):
    """(batch item, row, pixels [PIXELS]) of a program, counted along a row, then rows, then the batch."""
    per_row = (width + PIXELS - 1) // PIXELS
    batch = (number // (per_row * height)).to(tl.int64)
    return batch, number // per_row % height, number % per_row * PIXELS + tl.arange(0, PIXELS)


@triton.jit
def _row(map, batch, y, x):
    """Pointers to the first channel of pixels [P] of a row, which may lie outside."""
    return map.ptr + (batch * map.b + y.to(tl.int64) * map.y) + x.to(tl.int64) * map.x


@triton.jit
def _logits_of(k, pixels, stride_c, known, scale, FACTOR: tl.constexpr, SUB: tl.constexpr):
    """Scaled logits of neighbour k: [PIXELS, SUB]."""
    plane = pixels + tl.cast(k, tl.int64) * (FACTOR * FACTOR) * stride_c
    return tl.load(plane[:, None] + (tl.arange(0, SUB) * stride_c)[None, :], known, other=0.0).to(tl.float32) * scale


@triton.jit
def _neighbours(k, maps, batch, y, x, height, width, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    """Values of neighbour k of pixels, 0 outside the map: [PADDED, PIXELS, 1]."""
    # A row per pixel: the interpreter does not broadcast masks.
    row, column = tl.zeros_like(x) + (y + k // 3 - 1), x + k % 3 - 1
    c = tl.arange(0, PADDED)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    places = _row(maps, batch, row, column)[None, :] + (c.to(tl.int64) * maps.c)[:, None]
    values = tl.load(places, inside[None, :] & (c < CHANNELS)[:, None], other=0.0)
    return values.to(tl.float32)[:, :, None]


@triton.jit
def _fine(
    map, batch, y, x, known, FACTOR: tl.constexpr, SUB: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr
):
    """Pointers to the fine pixels of coarse ones in a fine map, and which exist: [PADDED, PIXELS, SUB]."""
    s, c = tl.arange(0, SUB), tl.arange(0, PADDED)
    fine_x = (x * FACTOR)[:, None] + (s % FACTOR)[None, :]
    rows = _row(map, batch, y * FACTOR, fine_x) + (s // FACTOR)[None, :].to(tl.int64) * map.y
    channels = (c.to(tl.int64) * map.c)[:, None, None]
    return rows[None, :, :] + channels, known[None, :, :] & (c < CHANNELS)[:, None, None]


@triton.jit
def _combine(
    maps,
    logit_pixels,
    stride_c,
    batch,
    y,
    x,
    height,
    width,
    known,
    scale,
    FACTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    SUB: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Softmax and combination in one pass: largest logit and sum of exponentials [PIXELS, SUB], values of all channels.

    Values are [PADDED, PIXELS, SUB].
    """
    most = tl.full((PIXELS, SUB), float("-inf"), tl.float32)
    total = tl.zeros((PIXELS, SUB), tl.float32)
    values = tl.zeros((PADDED, PIXELS, SUB), tl.float32)
    for k in range(0, 9):
        logit = _logits_of(k, logit_pixels, stride_c, known, scale, FACTOR, SUB)
        new_most = tl.maximum(most, logit)
        shrink, share = tl.exp(most - new_most), tl.exp(logit - new_most)
        total = total * shrink + share
        near = _neighbours(k, maps, batch, y, x, height, width, CHANNELS, PADDED)
        values = values * shrink[None, :, :] + share[None, :, :] * near
        most = new_most
    return most, total, values / total[None, :, :]


@triton.jit
def upsample_kernel(
    maps,  # Map [B, C, H, W]
    logits,  # Map [B, 9 f^2, H, W]
    out,  # Map [B, C, f H, f W], float32: written
    height,
    width,
    scale,
    FACTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    SUB: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Fine pixels of PIXELS coarse ones."""
    batch, y, x = _place(tl.program_id(0), height, width, PIXELS)
    known = (x < width)[:, None] & (tl.arange(0, SUB) < FACTOR * FACTOR)[None, :]
    pixels = _row(logits, batch, y, x)
    _, _, values = _combine(
        maps, pixels, logits.c, batch, y, x, height, width, known, scale, FACTOR, CHANNELS, PADDED, SUB, PIXELS
    )
    places, exist = _fine(out, batch, y, x, known, FACTOR, SUB, CHANNELS, PADDED)
    tl.store(places, values, exist)


@triton.jit
def gradients_kernel(
    grad,  # Map [B, C, f H, f W], float32
    maps,  # Map [B, C, H, W]
    logits,  # Map [B, 9 f^2, H, W]
    logits_grad,  # Map [B, 9 f^2, H, W]: written
    shares,  # Map [B, 9 C, H, W], float32, neighbours fastest: written, each neighbour's share of a pixel's gradient
    height,
    width,
    scale,
    FACTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    SUB: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Gradients of the logits, and of the values that each of PIXELS coarse pixels took from its neighbours."""
    batch, y, x = _place(tl.program_id(0), height, width, PIXELS)
    s, c = tl.arange(0, SUB), tl.arange(0, PADDED)
    known = (x < width)[:, None] & (s < FACTOR * FACTOR)[None, :]
    pixels = _row(logits, batch, y, x)
    most, total, values = _combine(
        maps, pixels, logits.c, batch, y, x, height, width, known, scale, FACTOR, CHANNELS, PADDED, SUB, PIXELS
    )
    places, exist = _fine(grad, batch, y, x, known, FACTOR, SUB, CHANNELS, PADDED)
    down = tl.load(places, exist, other=0.0)
    mean = tl.sum(down * values, axis=0)
    grad_pixels = _row(logits_grad, batch, y, x)
    share_pixels = _row(shares, batch, y, x)
    for k in range(0, 9):
        weight = tl.exp(_logits_of(k, pixels, logits.c, known, scale, FACTOR, SUB) - most) / total
        near = _neighbours(k, maps, batch, y, x, height, width, CHANNELS, PADDED)
        slope = weight * (tl.sum(down * near, axis=0) - mean) * scale
        plane = grad_pixels + tl.cast(k, tl.int64) * (FACTOR * FACTOR) * logits_grad.c
        tl.store(plane[:, None] + (s * logits_grad.c)[None, :], slope.to(logits_grad.ptr.dtype.element_ty), known)
        taken = tl.sum(down * weight[None, :, :], axis=2)
        channel_places = share_pixels[None, :] + ((c * 9 + k).to(tl.int64) * shares.c)[:, None]
        tl.store(channel_places, taken, (x < width)[None, :] & (c < CHANNELS)[:, None])
