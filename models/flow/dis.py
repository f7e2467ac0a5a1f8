"""Dense Inverse Search flow (OpenCV) behind the call of the flow networks; needs no weights.

Source: Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016, arXiv:1603.03590;
OpenCV's DISOpticalFlow. The result depends on the images and settings alone, not on the thread count.
"""

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from kinema.models.flow.padding import padding_for

_OPENCV_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
# OpenCV reads outside its buffers when a side is smaller than a patch at its coarsest scale.
_MINIMUM_SIDE = 32


class DIS(nn.Module):
    """`model(image1, image2)` gives the flow from image1 to image2, computed on the CPU.

    Args:
        preset: OpenCV's settings, from "ultrafast" (no variational refinement) to "medium".
    """

    def __init__(self, preset: str = "medium") -> None:
        super().__init__()
        if preset not in _OPENCV_PRESETS:
            raise ValueError(f"preset={preset!r} is not one of {', '.join(map(repr, _OPENCV_PRESETS))}")
        self.preset = preset

    def forward(
        self,
        image1: Float[Tensor, "_ _ _ _"],
        image2: Float[Tensor, "_ _ _ _"],
        iters: int | None = None,
        flow_init: Tensor | None = None,
    ) -> Float[Tensor, "B 2 H W"]:
        """Flow from image1 to image2.

        Args:
            image1, image2: [B, 3, H, W] float in 0..1, RGB; compared as 8-bit grey pictures.
            iters: variational refinement iterations; the preset's number by default.
            flow_init: not supported.

        Returns: [B, 2, H, W] float32, (x, y) in pixels, on the images' device.
        Raises: ValueError for images of the wrong or different shapes, iters < 0, or a flow_init.
        """
        if image1.shape != image2.shape or image1.ndim != 4 or image1.shape[1] != 3:
            raise ValueError(
                f"image1 is {list(image1.shape)} and image2 is {list(image2.shape)}: "
                "both must be [B, 3, H, W] of one size"
            )
        if flow_init is not None:
            raise ValueError("dis takes no flow_init: only the RAFT family starts from a given flow")
        if iters is not None and iters < 0:
            raise ValueError(f"iters={iters} must not be negative")
        padding = padding_for(image1.shape[-2], image1.shape[-1], multiple=1, minimum=_MINIMUM_SIDE)
        grey1, grey2 = _grey(padding.pad(image1.float())), _grey(padding.pad(image2.float()))
        flows = [self._pair(a, b, iters) for a, b in zip(grey1, grey2, strict=True)]
        flow = torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2)  # [B, 2, Hp, Wp]
        return padding.unpad(flow).contiguous().to(image1.device)

    def _pair(self, grey1: np.ndarray, grey2: np.ndarray, iters: int | None) -> np.ndarray:
        # A fresh solver each time: it keeps buffers of the last size, and the module stays picklable.
        solver = cv2.DISOpticalFlow.create(_OPENCV_PRESETS[self.preset])
        if iters is not None:
            solver.setVariationalRefinementIterations(iters)
        return np.asarray(solver.calc(grey1, grey2, None))  # type: ignore[call-overload]  # stubs omit None


def _grey(images: Float[Tensor, "B 3 H W"]) -> UInt8[np.ndarray, "B H W"]:
    rgb = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return np.stack([cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY) for image in rgb])
