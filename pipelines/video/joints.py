"""Decoding recordings that were joined without care: transport and program streams put together byte by byte.

Behind a joint the decoder knows nothing of the frames that packets up to the next keyframe refer to. Left alone it
would take those of the recording before and show pictures that nobody filmed.
"""

from __future__ import annotations

from fractions import Fraction

import av

_BACK = 4  # usual steps by which decoding times go back at a joint; less is a muxer's carelessness
_AHEAD_S = 12 * 3600  # FFmpeg takes a clock that goes far back for one that ran over at 2^33 ticks


class JointDecoder:
    """Decodes packets in turn and starts anew where their clock jumps.

    Args: usual_step, ticks between frames; watches, whether there can be joints.
    """

    def __init__(self, context: av.VideoCodecContext, time_base: Fraction, usual_step: int, watches: bool):
        self._context, self._watches = context, watches
        self._back, self._ahead = _BACK * usual_step, round(_AHEAD_S / time_base)
        self._last: int | None = None
        self._waits = False
        self._part = 0
        self.num_lost = 0
        """Packets that lacked what they refer to."""

    def decode(self, packet: av.Packet | None) -> list[tuple[int, av.VideoFrame]]:
        """(number of the recording, frame) for all that come out; None flushes. Raises: av.FFmpegError."""
        frames = []
        if packet is not None and self._watches and self._jumps(packet):
            frames = [(self._part, frame) for frame in self._context.decode(None)]
            self._context.flush_buffers()
            self._waits, self._part = True, self._part + 1
        if self._waits and packet is not None:
            if not packet.is_keyframe:
                self.num_lost += 1
                return frames
            self._waits = False
        return frames + [(self._part, frame) for frame in self._context.decode(packet)]

    def _jumps(self, packet: av.Packet) -> bool:
        now, last = packet.dts, self._last
        if now is None:
            return False
        self._last = now
        return last is not None and (now < last - self._back or now > last + self._ahead)
