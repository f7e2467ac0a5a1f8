"""Flow Poke Transformer: the distribution of motion at any point of an image, given the motion of a few points.

Source: Baumann, Stracke, Phan, Ommer, "What If: Understanding Motion Through Sparse Interactions", ICCV 2025,
arXiv:2510.12777. Same numbers and state-dict keys as the published network. Deviations: autoregressive sampling takes
any batch size, keeps its cache in the dtype of the model and projects the image once; attention patterns are named
instead of drawn as masks; constants and norms stay in float32 under bfloat16.

Positions are (x, y) in 0..1 from image edge to image edge, flow is in the same units, images are in -1..1.

Shape legend: B batch, P pokes, Q queries, n queries per poke, L tokens, h w the image's feature grid, K components.
"""

import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from kinema.kernels.cosine_attention.patterns import AttentionPattern, PatternLike, as_pattern
from kinema.models.backbones.inference_linear import multiplying_in_bf16, with_fp16_weights
from kinema.models.backbones.rotary_layers import at_least_float32, cell_centres
from kinema.models.backbones.vision_transformer import ENCODERS
from kinema.models.fpt.layers import HeadMlp, ImageEncoder, Rotation, TokenInput, Transformer
from kinema.models.fpt.mixture import GaussianMixture
from kinema.models.weights import resolve_weights

NUM_COMPONENTS = 4
SMALLEST_SCALE = 1e-4
NUMBERS_PER_COMPONENT = 6  # a logit, two means, three entries of the Cholesky factor

PRESETS: dict[str, dict[str, int | str]] = {
    "fpt_base": {
        "width": 768,
        "depth": 12,
        "head_dim": 64,
        "image_encoder": "dinov2_vitb14_reg",
        "image_size": 448,
    },
    "fpt_tiny": {"width": 192, "depth": 4, "head_dim": 64, "image_encoder": "tiny_vit8", "image_size": 96},
    "fpt_nano": {"width": 96, "depth": 3, "head_dim": 32, "image_encoder": "tiny_vit8", "image_size": 48},
}
"""Constructor arguments by name: the published model, and two that train on a CPU, in hours and in minutes."""

_PROJECTED = WeakTensorKeyDictionary()
"""By an image's features: the model that projected them last, the state of what went into it, and the result."""
NUM_REMEMBERED = 2
"""Images; the projection of one takes 25 times its features, 75 MB of fpt_base."""


class FlowPokeTransformer(nn.Module):
    """Predicts a mixture of `NUM_COMPONENTS` normals over the flow at every query.

    Args:
        width: token width, a multiple of `head_dim`.
        depth: number of layers.
        head_dim: width of an attention head, a multiple of 4.
        image_encoder: a key of `ENCODERS`; trained along with the rest.
        image_size: side in pixels of the square that the encoder sees.
    """

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        head_dim: int = 64,
        image_encoder: str = "dinov2_vitb14_reg",
        image_size: int = 448,
    ):
        super().__init__()
        _check_sizes(width, head_dim, image_encoder)
        encoder = ENCODERS[image_encoder]
        self.image_embedder = ImageEncoder(encoder, image_size)
        self.cond_emb = nn.Embedding(2, width)
        self.input_mlp = TokenInput(width, encoder.width)
        self.transformer = Transformer(width, depth, encoder.width, head_dim)
        self.out_mlp = HeadMlp(width, NUM_COMPONENTS * NUMBERS_PER_COMPONENT)

    def unused_parameters(self) -> list[Tensor]:
        """Parameters that the checkpoint holds but that never get a gradient; frozen before distributed training."""
        unused: list[Tensor] = [layer.cross_out.weight for layer in self.transformer.layer_list()]
        if self.image_embedder.model.config.mask_token:
            unused.append(self.image_embedder.model.mask_token)
        return unused

    def embed_image(self, img: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """What the other methods need to know of images in -1..1: to be computed once per image.

        Returns: "feat" [B, E, h, w], features of the central square, and "pos" [B, h, w, 2], their positions.
        """
        features = self.image_embedder(img)
        pos = cell_centres(features.shape[2], features.shape[3], device=features.device)
        return {"feat": features, "pos": pos.expand(len(img), -1, -1, -1)}

    def project_image(self, d_img: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`d_img` with "keys_values" added, which saves every later prediction from projecting the image again."""
        return {**d_img, "keys_values": self.transformer.image_keys_values(d_img["feat"], d_img["pos"])}

    def in_bf16(self) -> "FlowPokeTransformer":
        """A copy for predictions whose matrix products are in bf16, on the device where the model is.

        Norms, the residual stream, positions and the head stay in float32. It shares the weights of everything but the
        products, has no state dict of its own, and does not follow what becomes of the model. Numbers are not the
        published ones: `python -m kinema.pipelines.bench fpt_sampling` prints how far they are off.
        """
        twin = multiplying_in_bf16(self)
        twin.out_mlp = self.out_mlp
        return twin

    def with_fp16_weights(self) -> "FlowPokeTransformer":
        """A copy for predictions on an x86 CPU that keeps the weights of its matrix products in fp16.

        Drawing samples one query at a time mostly reads weights, which takes half as long so. All sums are float32, and
        so is everything else; predictions differ by less than in bf16 (the same benchmark prints both). Shares weights
        and is frozen as the copy of `in_bf16` is.

        Raises: ValueError off a CPU, on one without FBGEMM, or for weights beyond 65504.
        """
        twin = with_fp16_weights(self)
        twin.out_mlp = self.out_mlp
        return twin

    def forward(
        self,
        pos: Float[Tensor, "B L 2"],
        flow: Float[Tensor, "B L 2"],
        is_query: Bool[Tensor, "B L"],
        camera_static: Bool[Tensor, "B"] | bool,
        mask: PatternLike | Tensor | None,
        d_img: Mapping[str, Tensor],
    ) -> GaussianMixture:
        """Mixtures [B, L] over the flow at every token; those of pokes mean nothing.

        Args:
            flow: ignored where `is_query`.
            camera_static: whether the camera stands still.
            mask: who sees whom: "causal", ("query-causal", P) for training, ("query-inference", P) for prediction,
                "full" or None. A dense boolean mask is accepted if it is one of these.
            d_img: from `embed_image`, for B images or for one that all share.
        Raises: ValueError for shapes that disagree, or a mask that is none of the patterns.
        """
        pattern = pattern_of(mask, is_query)
        return self._distribution(self._tokens(pos, flow, is_query, camera_static, pattern, d_img))

    def predict_parallel(
        self,
        poke_pos: Float[Tensor, "B P 2"],
        poke_flow: Float[Tensor, "B P 2"],
        query_pos: Float[Tensor, "B Q 2"],
        camera_static: Bool[Tensor, "B"] | bool,
        d_img: Mapping[str, Tensor],
    ) -> GaussianMixture:
        """Mixtures [B, Q] over the flow at each query given all pokes, every query by itself. P may be 0."""
        num_pokes = poke_pos.shape[1]
        pattern = AttentionPattern("query_inference", num_pokes)
        tokens = self._tokens(*_sequence(poke_pos, poke_flow, query_pos), camera_static, pattern, d_img)
        return self._distribution(tokens[:, num_pokes:])

    def predict_prefixes(
        self,
        poke_pos: Float[Tensor, "B P 2"],
        poke_flow: Float[Tensor, "B P 2"],
        query_pos: Float[Tensor, "B groups n 2"],
        camera_static: Bool[Tensor, "B"] | bool,
        d_img: Mapping[str, Tensor],
    ) -> GaussianMixture:
        """Mixtures [B, P, n]: the queries of group g are predicted from the g first pokes, as in training."""
        groups = query_pos.shape[1:3]
        if groups[0] != poke_pos.shape[1]:
            raise ValueError(f"query_pos has {groups[0]} groups and there are {poke_pos.shape[1]} pokes; give one each")
        pattern = AttentionPattern("query_causal", groups[0])
        sequence = _sequence(poke_pos, poke_flow, rearrange(query_pos, "b groups n xy -> b (groups n) xy"))
        tokens = self._tokens(*sequence, camera_static, pattern, d_img)
        mixture = self._distribution(tokens[:, groups[0] :])
        parts = (
            rearrange(part, "b (p n) ... -> b p n ...", p=groups[0])
            for part in (mixture.logits, mixture.loc, mixture.scale_tril)
        )
        return GaussianMixture(*parts)

    def negative_log_likelihood(
        self,
        poke_pos: Float[Tensor, "B P 2"],
        poke_flow: Float[Tensor, "B P 2"],
        query_pos: Float[Tensor, "B P n 2"],
        query_flow: Float[Tensor, "B P n 2"],
        camera_static: Bool[Tensor, "B"],
        image: Float[Tensor, "B 3 H W"],
    ) -> Float[Tensor, "B P n"]:
        """-log p(query_flow) in nats, float64, by number of known pokes; its mean is the training loss."""
        mixture = self.predict_prefixes(poke_pos, poke_flow, query_pos, camera_static, self.embed_image(image))
        return -mixture.log_prob(query_flow.double())

    @torch.no_grad()
    def predict_autoregressive(
        self,
        poke_pos: Float[Tensor, "B P 2"],
        poke_flow: Float[Tensor, "B P 2"],
        query_pos: Float[Tensor, "B Q 2"],
        camera_static: Bool[Tensor, "B"] | bool,
        d_img: Mapping[str, Tensor],
        randomize_order: bool = False,
        verbose: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B Q 2"]:
        """One joint sample of the flow at all queries: each is drawn given the pokes and the queries drawn before.

        Args:
            randomize_order: visit the queries of each batch element in a random order, for queries on a grid, whose
                regular order the model never saw in training; the result keeps the order of `query_pos`.
            verbose: write progress to stderr.
            generator: source of the order and the samples, for reproducible results.
        """
        if randomize_order:
            device = "cpu" if generator is None else generator.device
            noise = torch.rand(query_pos.shape[:2], generator=generator, device=device).to(query_pos.device)
            order = noise.argsort(dim=1)[..., None].expand_as(query_pos)
            query_pos = query_pos.gather(1, order)
        flow = self._sample_in_order(poke_pos, poke_flow, query_pos, camera_static, d_img, verbose, generator)
        return torch.empty_like(flow).scatter_(1, order, flow) if randomize_order else flow

    def _sample_in_order(
        self,
        poke_pos: Tensor,
        poke_flow: Tensor,
        query_pos: Tensor,
        camera_static: Tensor | bool,
        d_img: Mapping[str, Tensor],
        verbose: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Samples for queries in the given order.

        Every step adds two tokens to the cache: the last query with its sampled flow, now a poke, and the next query,
        whose place the following step overwrites.
        """
        (batch, num_queries), num_pokes = query_pos.shape[:2], poke_pos.shape[1]
        pos, flow, _ = _sequence(poke_pos, poke_flow, query_pos)
        features, feature_pos = _shared_image(d_img, batch)
        cond = self._condition(camera_static, batch)
        keys_values = self._keys_values(d_img)
        if keys_values is None:
            keys_values = self.transformer.image_keys_values(d_img["feat"], feature_pos)
        layers = self.transformer.layer_list()
        caches = [
            layer.new_cache(kv, cond, num_pokes + num_queries) for layer, kv in zip(layers, keys_values, strict=True)
        ]
        rotation = Rotation.by(self.transformer.pos_emb(pos))
        start = 0
        for step in range(num_queries):
            end = num_pokes + step + 1
            visible = None
            if start:
                visible = torch.ones(end - start, end, dtype=torch.bool, device=pos.device)
                visible[0, -1] = False
            new = slice(start, end)
            asks = (torch.arange(start, end, device=pos.device) == end - 1).expand(batch, -1)
            x = at_least_float32(self.input_mlp(pos[:, new], flow[:, new], asks, features))
            turn = rotation.tokens(new)
            for layer, cache in zip(layers, caches, strict=True):
                x = layer.step(x, cache, start, turn, visible, only_last=layer is layers[-1])
            sampled = self._distribution(x).sample(generator=generator)
            flow[:, end - 1] = sampled.reshape(batch, 2).to(flow.dtype)
            start = end - 1
            if verbose:
                print(f"\rsampled {step + 1} of {num_queries} queries", end="", file=sys.stderr, flush=True)
        if verbose:
            print(file=sys.stderr)
        return flow[:, num_pokes:]

    def _tokens(
        self,
        pos: Tensor,
        flow: Tensor,
        is_query: Tensor,
        camera_static: Tensor | bool,
        pattern: AttentionPattern,
        d_img: Mapping[str, Tensor],
    ) -> Float[Tensor, "B L D"]:
        features, feature_pos = _shared_image(d_img, len(pos))
        x = self.input_mlp(pos, flow, is_query, features)
        cond = self._condition(camera_static, len(pos))
        return self.transformer(x, pos, d_img["feat"], feature_pos, self._keys_values(d_img), cond, pattern)

    def _keys_values(self, d_img: Mapping[str, Tensor]) -> Float[Tensor, "layers 2 I H M e"] | None:
        """The image projected: given, or remembered from an earlier call; None where each layer is to do it anew.

        The last `NUM_REMEMBERED` single images are remembered, for as long as their features live and while no gradient
        is asked for. Weights changed through `.data` are not noticed.
        """
        if "keys_values" in d_img:
            return d_img["keys_values"]
        features = d_img["feat"]
        watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if watched or len(features) != 1:
            return None
        state = _state_of((features, *self.transformer.image_weights()))
        known = _PROJECTED.get(features)
        if known is None or known[0]() is not self or known[1] != state:
            projected = self.transformer.image_keys_values(features, d_img["pos"])
            known = _PROJECTED[features] = (weakref.ref(self), state, projected)
            for forgotten in list(_PROJECTED)[:-NUM_REMEMBERED]:
                _PROJECTED.pop(forgotten, None)
        return known[2]

    def _condition(self, camera_static: Tensor | bool, batch: int) -> Float[Tensor, "B D"]:
        flag = torch.as_tensor(camera_static, device=self.cond_emb.weight.device)
        return self.cond_emb(flag.expand(batch).long())

    def _distribution(self, tokens: Float[Tensor, "B L D"]) -> GaussianMixture:
        """The mixtures that tokens stand for, float64."""
        raw = self.out_mlp(tokens).double()
        logits, means, entries = raw.split([NUM_COMPONENTS, 2 * NUM_COMPONENTS, 3 * NUM_COMPONENTS], dim=-1)
        first, below, second = rearrange(entries, "b l (k three) -> three b l k", three=3)
        upper_row = torch.stack([_positive(first), torch.zeros_like(below)], dim=-1)
        lower_row = torch.stack([below, _positive(second)], dim=-1)
        scale_tril = torch.stack([upper_row, lower_row], dim=-2)
        return GaussianMixture(logits, rearrange(means, "b l (k xy) -> b l k xy", xy=2), scale_tril)


def _positive(x: Tensor) -> Tensor:
    """The squareplus function (Barron, arXiv:2112.11687), kept away from 0."""
    return (x + (x.square() + 4).sqrt()) / 2 + SMALLEST_SCALE


def _sequence(poke_pos: Tensor, poke_flow: Tensor, query_pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, flow and is_query of pokes followed by queries."""
    if poke_pos.shape != poke_flow.shape or poke_pos.shape[0] != query_pos.shape[0]:
        raise ValueError(
            f"poke_pos {list(poke_pos.shape)}, poke_flow {list(poke_flow.shape)}, query_pos {list(query_pos.shape)}: "
            "pokes need a position and a flow each, and all the same batch size"
        )
    if query_pos.shape[1] == 0:
        raise ValueError(f"query_pos {list(query_pos.shape)} has no query; ask for at least one point")
    pos = torch.cat([poke_pos, query_pos.to(poke_pos.dtype)], dim=1)
    flow = torch.cat([poke_flow, poke_flow.new_zeros(query_pos.shape)], dim=1)
    is_query = torch.arange(pos.shape[1], device=pos.device) >= poke_pos.shape[1]
    return pos, flow, is_query.expand(len(pos), -1)


def _state_of(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What changes when one of the tensors, or the precision of matrix products, does."""
    kinds = {tensor.device.type for tensor in tensors}
    precision = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds))
    # Tensors of inference mode count no changes.
    return precision, *((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors)


def _shared_image(d_img: Mapping[str, Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """Features and positions, features of a single image repeated for the batch."""
    features, pos = d_img["feat"], d_img["pos"]
    if features.shape[0] not in (1, batch):
        raise ValueError(
            f"d_img holds {features.shape[0]} images for a batch of {batch}; give one for each, or one for all"
        )
    return features.expand(batch, -1, -1, -1), pos[: features.shape[0]]


def pattern_of(mask: PatternLike | Tensor | None, is_query: Bool[Tensor, "B L"]) -> AttentionPattern:
    """The attention pattern that `forward`'s `mask` stands for.

    Args: mask is a pattern, None for full attention, or a boolean [..., L, L] whose rows say what each token sees.
    Raises: ValueError for a mask that is none of the patterns.
    """
    if mask is None:
        return AttentionPattern("full")
    if isinstance(mask, str | tuple | AttentionPattern):
        return as_pattern(mask)
    if not isinstance(mask, Tensor):
        raise ValueError(f'mask is a {type(mask).__name__}; name a pattern instead, such as ("query-causal", P)')
    length = is_query.shape[1]
    if mask.dtype != torch.bool or mask.shape[-2:] != (length, length):
        raise ValueError(
            f"mask is {mask.dtype} {list(mask.shape)}; a dense mask must be bool [..., {length}, {length}]"
        )
    mask = mask.reshape(-1, length, length)
    if mask.all():
        return AttentionPattern("full")
    num_pokes = length - int(is_query[0].sum())
    for pattern in _poke_patterns(num_pokes, length):
        if _shows(mask, _limits(pattern, length)):
            return pattern
    raise ValueError(
        f"this dense mask over {num_pokes} pokes and {length - num_pokes} queries is none of the patterns that can be "
        'computed; use "full", "causal", ("query-causal", P) or ("query-inference", P)'
    )


def _poke_patterns(num_pokes: int, length: int) -> list[AttentionPattern]:
    patterns = [AttentionPattern("causal"), AttentionPattern("query_inference", num_pokes)]
    if num_pokes and (length - num_pokes) % num_pokes == 0:
        patterns.append(AttentionPattern("query_causal", num_pokes))
    return patterns


def _limits(pattern: AttentionPattern, length: int) -> list[int]:
    """How many keys at the front each row sees, itself not counted."""
    pokes = pattern.num_pokes
    if pattern.kind == "causal":
        return list(range(length))
    if pattern.kind == "query_inference":
        return [min(row, pokes) for row in range(length)]
    group = pattern.queries_per_poke(length)
    return [row if row < pokes else (row - pokes) // group for row in range(length)]


def _shows(mask: Bool[Tensor, "N L L"], limits: list[int]) -> bool:
    """Whether every row sees exactly itself and its limit of keys at the front; works row by row, in linear memory."""
    counts = mask.sum(-1)
    if not (mask.diagonal(dim1=1, dim2=2).all() and (counts == counts.new_tensor(limits) + 1).all()):
        return False
    return bool(torch.stack([mask[:, row, :limit].all() for row, limit in enumerate(limits)]).all())


def _check_sizes(width: int, head_dim: int, image_encoder: str) -> None:
    if image_encoder not in ENCODERS:
        raise ValueError(f"image_encoder={image_encoder!r} is not known; use one of {', '.join(ENCODERS)}")
    if head_dim % 4 or width % head_dim:
        raise ValueError(f"width={width}, head_dim={head_dim}: head_dim must be a multiple of 4 and divide width")


def flow_poke_transformer(
    name: str = "fpt_base", pretrained: bool = False, weights: str | Path | None = None
) -> FlowPokeTransformer:
    """A Flow Poke Transformer by its name in `PRESETS`, in eval mode.

    Args:
        pretrained: download the published weights (once) and load them.
        weights: path or URL of a checkpoint to load instead.
    Raises: ValueError for an unknown name or weights that do not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"Flow Poke Transformer {name!r} is not known; use one of {', '.join(PRESETS)}")
    model = FlowPokeTransformer(**PRESETS[name])  # type: ignore[arg-type]
    return resolve_weights(model, name, pretrained, weights).eval()
