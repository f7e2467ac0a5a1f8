"""Side data of decoded frames, read without keeping the frames alive."""

from __future__ import annotations

from typing import Any, cast

import av
from av.sidedata.sidedata import SideDataContainer


def side_data(frame: av.VideoFrame) -> SideDataContainer:
    """Like `frame.side_data`, which ties frame and side data to each other until Python's collector finds them."""
    make = cast(Any, SideDataContainer)  # PyAV's stubs leave its argument out
    return cast(SideDataContainer, make(frame))
