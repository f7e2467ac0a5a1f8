"""Endless rendered pairs with exact flow: textured layers under known motion, made from (seed, index) alone.

In the spirit of FlyingChairs (Dosovitskiy et al., ICCV 2015), AutoFlow (Sun et al., CVPR 2021) and Kubric (Greff et
al., CVPR 2022): `RenderedShot(settings, seed, index)` has frames, flow, occlusion and tracks, as `scenes.Scene` has.
"""

from kinema.pipelines.scenes.rendered.settings import RenderSettings
from kinema.pipelines.scenes.rendered.shot import RenderedShot

__all__ = ["RenderSettings", "RenderedShot"]
