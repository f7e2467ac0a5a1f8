"""A folder of pictures as a video, with masks where the data set has them (YouTube-VOS, DAVIS)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import cv2
import numpy as np
from jaxtyping import UInt8

from kinema.pipelines.video.decoded import Decoded
from kinema.pipelines.video.errors import Corrupt, Missing
from kinema.pipelines.video.look import look_of


class FrameFolder:
    """Pictures in the order given, one tick each. Same interface as VideoFile.

    Args:
        pictures: paths or URLs of JPEG or PNG files.
        fps: frames per second, which the folder does not say.
        read: reads all bytes of one path.
    """

    format_name, stream_index, seeks, invented_pts, num_dropped = "frames", 0, True, False, 0

    def __init__(self, pictures: Sequence[str], fps: float, read):
        self._pictures, self._read = list(pictures), read
        rate = Fraction(fps).limit_denominator(100_000)
        self.time_base, self.start, self.rates = 1 / rate, 0, (rate,)

    def __enter__(self) -> FrameFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""

    @property
    def codec_name(self) -> str:
        """The pictures' extension."""
        return self._pictures[0].rpartition(".")[2].lower()

    def pictures(self, from_pts: int | None = None) -> Iterator[Decoded]:
        """Frames in order with their look; pictures may differ in size. Raises: Corrupt, Missing."""
        return (Decoded(frame, look_of(frame)) for frame in self.frames(from_pts))

    def frames(self, from_pts: int | None = None) -> Iterator[av.VideoFrame]:
        """Frames in order; pts is the picture's number. Raises: Corrupt, Missing."""
        for index in range(from_pts or 0, len(self._pictures)):
            frame = av.VideoFrame.from_ndarray(self._picture(index), format="bgr24")
            frame.pts, frame.time_base = index, self.time_base
            frame.duration = 1
            yield frame

    def _picture(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        path = self._pictures[index]
        name = path.rpartition("/")[2]
        try:
            data = self._read(path)
        except OSError as error:
            raise Missing(f"picture {name} cannot be read: {error}") from None
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
        if picture is None:
            raise Corrupt(f"picture {name} (frame {index}) does not decode")
        return np.ascontiguousarray(picture)
