"""Predictions of the Flow Poke Transformer written plainly, as published: the yardstick of the benchmarks.

A joint sample keeps keys and values of the tokens it has seen. Each step goes through two tokens, the query drawn last
and the next one, and through every norm's gain and the projection of the image again; one sample at a time, as the
published sampler takes no more. Many queries at once attend to the pokes through a boolean mask. Borrows our parameters
and the token input, head and rotary angles; layers are PyTorch's own.

Source: Baumann et al., arXiv:2510.12777, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kinema.models.backbones.rotary_layers import NORM_EPS
from kinema.models.fpt.layers import COSINE_EPS, TransformerLayer
from kinema.models.fpt.mixture import GaussianMixture
from kinema.models.fpt.model import FlowPokeTransformer

ImageData = Mapping[str, Tensor]
Cache = tuple[Tensor, Tensor]
"""Keys and values [1, H, C, e] of one layer."""


def plain_joint_sample(
    network: FlowPokeTransformer,
    poke_pos: Tensor,
    poke_flow: Tensor,
    query_pos: Tensor,
    d_img: ImageData,
    generator: torch.Generator,
) -> Tensor:
    """Flow [1, Q, 2] at queries [1, Q, 2], each drawn given pokes [1, P, 2] and the queries before it."""
    num_pokes, num_queries = poke_pos.shape[1], query_pos.shape[1]
    pos = torch.cat([poke_pos, query_pos], dim=1)
    flow = torch.cat([poke_flow, torch.zeros_like(query_pos)], dim=1)
    caches = [_empty_cache(layer, num_pokes + num_queries) for layer in network.transformer.layer_list()]
    start = 0
    for end in range(num_pokes + 1, num_pokes + num_queries + 1):
        rows, columns = torch.arange(start, end)[:, None], torch.arange(end)
        is_query = torch.arange(start, end)[None] == end - 1
        new = slice(start, end)
        tokens = _tokens(network, pos[:, new], flow[:, new], is_query, columns <= rows, d_img, caches, start)
        drawn = network._distribution(tokens[:, -1:]).sample(generator=generator)
        flow[:, end - 1] = drawn.reshape(1, 2).to(flow.dtype)
        start = end - 1
    return flow[:, num_pokes:]


def plain_parallel(
    network: FlowPokeTransformer, poke_pos: Tensor, poke_flow: Tensor, query_pos: Tensor, d_img: ImageData
) -> GaussianMixture:
    """Mixtures [1, Q] at queries [1, Q, 2], each by itself, given pokes [1, P, 2]."""
    num_pokes = poke_pos.shape[1]
    pos = torch.cat([poke_pos, query_pos], dim=1)
    flow = torch.cat([poke_flow, torch.zeros_like(query_pos)], dim=1)
    rows, columns = torch.arange(pos.shape[1])[:, None], torch.arange(pos.shape[1])
    mask = torch.where(rows < num_pokes, columns <= rows, (columns < num_pokes) | (columns == rows))
    tokens = _tokens(network, pos, flow, (rows >= num_pokes).T, mask, d_img)
    return network._distribution(tokens[:, num_pokes:])


def _empty_cache(layer: TransformerLayer, length: int) -> Cache:
    shape = (1, layer.num_heads, length, layer.head_dim)
    return torch.zeros(shape), torch.zeros(shape)


def _tokens(
    network: FlowPokeTransformer,
    pos: Tensor,
    flow: Tensor,
    is_query: Tensor,
    mask: Tensor,
    d_img: ImageData,
    caches: list[Cache] | None = None,
    start: int = 0,
) -> Tensor:
    """Tokens after all layers; with caches they continue a sequence at index `start`."""
    cond = network.cond_emb(torch.zeros(1, dtype=torch.long))
    image = rearrange(d_img["feat"], "b e h w -> b (h w) e")
    angles = network.transformer.pos_emb
    theta, image_theta = angles(pos), angles(rearrange(d_img["pos"], "b h w xy -> b (h w) xy"))
    x = network.input_mlp(pos, flow, is_query, d_img["feat"])
    for index, layer in enumerate(network.transformer.layer_list()):
        cache = None if caches is None else caches[index]
        x = _layer(layer, x, image, theta, image_theta, cond, mask, cache, start)
    return x


def _layer(
    layer: TransformerLayer,
    x: Tensor,
    image: Tensor,
    theta: Tensor,
    image_theta: Tensor,
    cond: Tensor,
    mask: Tensor,
    cache: Cache | None,
    start: int,
) -> Tensor:
    normed = _norm(x, layer.self_norm.linear.weight, cond)
    q, k, v = _heads(F.linear(normed, layer.self_qkv.weight), layer)
    q, k = _rotated(q, layer.self_scale, theta), _rotated(k, layer.self_scale, theta)
    if cache is not None:
        end = start + x.shape[1]
        cache[0][:, :, start:end], cache[1][:, :, start:end] = k, v
        k, v = (part[:, :, :end] for part in cache)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    x = x + F.linear(rearrange(attended, "b h l e -> b l (h e)"), layer.self_out.weight)
    normed = _norm(x, layer.cross_norm.linear.weight, cond)
    q = _rotated(_heads(F.linear(normed, layer.cross_q.weight), layer)[0], layer.cross_scale, theta)
    k, v = _heads(F.linear(image, layer.cross_kv.weight), layer)
    k = _rotated(k, layer.cross_scale, image_theta)
    x = x + rearrange(F.scaled_dot_product_attention(q, k, v, scale=1.0), "b h l e -> b l (h e)")
    up, gate = F.linear(_norm(x, layer.ffn_norm.linear.weight, cond), layer.ffn_up.weight).chunk(2, dim=-1)
    return x + F.linear(up * F.silu(gate), layer.ffn_down.weight)


def _norm(x: Tensor, weight: Tensor, cond: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None, NORM_EPS) * (1 + F.linear(cond, weight))[:, None]


def _heads(x: Tensor, layer: TransformerLayer) -> Tensor:
    return rearrange(x, "b l (n h e) -> n b h l e", h=layer.num_heads, e=layer.head_dim)


def _rotated(x: Tensor, scale: Tensor, theta: Tensor) -> Tensor:
    """Heads of length sqrt(scale), turned: the first half of a head against the second."""
    length = (scale.abs() + COSINE_EPS).sqrt()[:, None, None]
    x = x * (length * torch.rsqrt(x.square().sum(-1, keepdim=True) + COSINE_EPS))
    first, second = x.chunk(2, dim=-1)
    cos, sin = theta.cos(), theta.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
