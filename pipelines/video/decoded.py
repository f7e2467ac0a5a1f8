"""One decoded frame with what the stages need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

import av

from kinema.pipelines.video.look import Look


@dataclass(frozen=True)
class Decoded:
    """A frame, how it is to be read, and where it stands."""

    frame: av.VideoFrame
    """Not turned; `pts` is never None."""
    look: Look
    """Before any conversion."""
    interlaced: bool = False
    """Whether the source's frame is made of two fields, even if they were merged since."""
    restarted: bool = False
    """Whether the clock starts anew here."""
