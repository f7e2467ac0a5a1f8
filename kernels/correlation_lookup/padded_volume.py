"""The all-pairs volume with zero margins: lookups without gradient copy whole rows.

`volume_lookup` gathers each lattice point and masks those outside the map. Here every row of every level has
zeros behind it, so that a row of a window is K consecutive numbers wherever it lies, copied at once, and
nothing is masked. The zeros behind a row also stand before the next. Measured on one core of an AMD EPYC,
56x56 maps, 256 channels, r 4: filling takes 40 ms and a lookup 3.5 ms, not 80 and 9.

Shapes: N = H W query pixels, L levels, K = 2 radius + 2 lattice points per axis, h w a level of the target.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.correlation_lookup.planner import VolumeCosts
from kinema.kernels.correlation_lookup.volume import NUM_LEVELS, feature_pyramid
from kinema.kernels.correlation_lookup.window import WindowOrder, check_maps, check_window, pixel_rows

PADDED = VolumeCosts(per_product=0.015, per_entry=2.0, per_point=3.0)
"""For `plan_lookup`; measured as those of the other volume."""
FILL_BYTES = 4 * 2**20
"""Products formed at once: they are copied to their places while they are still in the cache."""


class PaddedVolume:
    """Memory for the volume of one pair of maps, filled for one pair after another; float32, CPU.

    Args:
        height, width: of the maps.
        radius: windows are 2 radius + 1 wide at each level.

    The windows come flattened from K-1 rows of K entries: the last entry of each row means nothing, and that
    of the last row is left out. `arrange` gives a 1x1 convolution's weight the same columns, with zeros for those.
    """

    def __init__(self, height: int, width: int, radius: int, num_levels: int = NUM_LEVELS) -> None:
        check_window(radius, "x_major")
        self.height, self.width, self.radius = height, width, radius
        self.sizes = [(height >> level, width >> level) for level in range(num_levels)]
        K = self.side = 2 * radius + 2
        self.offsets, end = [], K
        for h, w in self.sizes:
            self.offsets.append(end)
            end += h * (w + K)
        self.length = end
        """Entries per query: K zeros, then the levels."""
        self.entries = torch.zeros(height * width, end)
        # Every run of K consecutive entries, as overlapping rows of one matrix.
        self._runs = self.entries.view(-1).as_strided((self.entries.numel() - K + 1, K), (1, 1))
        levels = torch.tensor(self.sizes)  # [L, (h, w)]
        self._h, self._stride = levels[:, :1], levels[:, 1:] + K  # [L, 1]
        self._last = levels.flip(1).float()  # [L, (w, h)]
        self._scale = 0.5 ** torch.arange(num_levels).view(-1, 1)
        self._offset = torch.tensor(self.offsets).view(-1, 1)
        self._query = torch.arange(height * width).view(-1, 1, 1) * end

    def fill(
        self,
        fmap1: Float[Tensor, "1 C H W"],
        fmap2: Float[Tensor, "1 C H W"],
        linear: Callable[[Tensor, Tensor, None], Tensor] = F.linear,
    ) -> None:
        """Products of every pixel of fmap1 with every pixel of fmap2 at every level, divided by sqrt(C).

        Args: linear multiplies rows with rows; `models.backbones.inference_linear.linear` does it faster on some CPUs.
        Raises: ValueError for maps that do not fit each other or this volume.
        """
        check_maps(fmap1, [fmap2])
        for name, fmap in (("fmap1", fmap1), ("fmap2", fmap2)):
            if fmap.shape[0] != 1 or tuple(fmap.shape[-2:]) != self.sizes[0] or fmap.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {fmap.dtype} {list(fmap.shape)}; this volume takes float32 maps "
                    f"[1, C, {self.height}, {self.width}], one pair at a time"
                )
        queries = pixel_rows(fmap1, torch.float32)[0] * (1.0 / math.sqrt(fmap1.shape[1]))
        targets = torch.cat([pixel_rows(level, torch.float32)[0] for level in feature_pyramid(fmap2, len(self.sizes))])
        at_once = max(1, FILL_BYTES // (4 * len(targets)))
        for first in range(0, len(queries), at_once):
            self._place(linear(queries[first : first + at_once], targets, None), first)

    def _place(self, products: Float[Tensor, "n M"], first_query: int) -> None:
        queries = self.entries[first_query : first_query + len(products)]
        parts = products.split([h * w for h, w in self.sizes], dim=1)
        for (h, w), offset, part in zip(self.sizes, self.offsets, parts, strict=True):
            place = queries[:, offset : offset + h * (w + self.side)].unflatten(1, (h, w + self.side))
            place[:, :, :w].copy_(part.unflatten(1, (h, w)))

    def lookup(self, coords: Float[Tensor, "1 2 H W"]) -> Float[Tensor, "1 P H W"]:
        """Windows around `coords`, bilinear, 0 outside the target map, nan where coords are not finite.

        Returns: [1, L (K (K-1) - 1), H, W], channels-last in memory; the channels as the class says.
        """
        points = coords[0].flatten(1).t().unsqueeze(1) * self._scale  # [N, L, (x, y)]
        lower = points.floor()
        fraction = points - lower
        # Windows wholly outside stop at the margin. Clamped before the cast: an integer would not hold it.
        first = torch.minimum((lower - self.radius).clamp_min(-self.side), self._last).nan_to_num(0.0).long()
        y = first[..., 1:] + torch.arange(self.side)  # [N, L, K]
        runs = y * self._stride + (first[..., :1] + self._offset)
        runs.masked_fill_((y < 0) | (y >= self._h), 0)  # the K zeros before all levels
        lattice = self._runs.index_select(0, (runs + self._query).flatten())
        lattice = lattice.view(len(points), len(self.sizes), -1)  # [N, L, K K]
        # Neighbours in y are K entries apart, neighbours in x one: long runs, no short rows.
        blended = torch.lerp(lattice[..., : -self.side], lattice[..., self.side :], fraction[..., 1:])
        blended = torch.lerp(blended[..., :-1], blended[..., 1:], fraction[..., :1])
        return blended.view(1, self.height, self.width, -1).permute(0, 3, 1, 2)

    def arrange(
        self, weight: Float[Tensor, "D Q 1 1"], window_order: WindowOrder = "x_major"
    ) -> Float[Tensor, "D P 1 1"]:
        """The weight of a 1x1 convolution over `volume_lookup`'s windows, for those of `lookup`."""
        check_window(self.radius, window_order)
        square = weight.view(len(weight), len(self.sizes), self.side - 1, self.side - 1)
        rows = square.transpose(2, 3) if window_order == "x_major" else square
        columns = F.pad(rows, (0, 1)).flatten(2)[..., :-1].flatten(1)
        return columns[:, :, None, None].contiguous(memory_format=torch.channels_last)
