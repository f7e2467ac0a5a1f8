"""Encode one clip as a small mp4: closed groups of pictures, faststart, the same bytes every time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction

import av

from kinema.configs import ClipConfig
from kinema.pipelines.video.errors import Unencodable
from kinema.pipelines.video.picture import PictureSpec

_NO_SCENE_CUTS, _ANY_RATE = "1000000000", "1000000000"
_MPEG4_TICKS = 65535  # the most in a second


def encoder_options(clip: ClipConfig) -> tuple[str, dict[str, str]]:
    """FFmpeg encoder and its options.

    One thread everywhere, since the number of threads changes the bytes; no keyframes at scene cuts, so they lie at
    0, gop, 2 gop, ...; no frame refers across a keyframe.
    """
    gop = str(clip.gop)
    x264 = {"g": gop, "keyint_min": gop, "sc_threshold": "0", "preset": clip.preset, "tune": "fastdecode"}
    # x264's macroblock tree reads memory that nobody wrote: the same pictures would give other bytes now and then.
    params = "open-gop=0:lookahead-threads=1:threads=1:mbtree=0"
    if clip.codec in ("h264", "copy"):  # what cannot be copied is encoded
        return "libx264", {**x264, "crf": str(clip.crf), "x264-params": params}
    if clip.codec == "h264_lossless":
        return "libx264rgb", {**x264, "qp": "0", "x264-params": params}
    if clip.codec == "hevc":
        x265 = f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:pools=none:frame-threads=1:wpp=0:log-level=error"
        options = {"crf": str(clip.crf), "preset": clip.preset, "tune": "fastdecode"}
        return "libx265", {**options, "x265-params": x265}
    if clip.codec == "av1":
        os.environ.setdefault("SVT_LOG", "1")  # errors only; FFmpeg has no option for it
        svt = f"keyint={gop}:irefresh-type=2:scd=0:lp=1:fast-decode=1"
        return "libsvtav1", {"crf": str(clip.crf), "preset": "8", "svtav1-params": svt, "g": gop}
    if clip.codec == "mpeg4":
        search = {"mbd": "rd", "trellis": "2", "cmp": "satd", "subcmp": "satd"}
        fixed = _fixed_quantiser(2 ** ((clip.crf - 7) / 6))
        return "mpeg4", {"g": gop, "sc_threshold": _NO_SCENE_CUTS, **fixed, **search}
    return "mjpeg", _fixed_quantiser(2 + clip.crf / 6)


def _fixed_quantiser(quantiser: float) -> dict[str, str]:
    """Of FFmpeg's own encoders; `global_quality` alone moves nothing."""
    rounded = str(min(31, max(1, round(quantiser))))
    return {"qmin": rounded, "qmax": rounded, "b": _ANY_RATE}


class ClipEncoder:
    """Encodes frames as they come; holds the encoded bytes of one clip and the encoder's few frames.

    Use as a context manager: a clip left without `finish()` leaves nothing behind.
    """

    def __init__(self, clip: ClipConfig, spec: PictureSpec, fps: Fraction):
        self._clip, self._spec = clip, spec
        self._stack = ExitStack()
        self._path = self._stack.enter_context(ScratchFile())
        self._container = self._stack.enter_context(
            av.open(
                self._path.name,
                "w",
                format="mp4",
                options={"movflags": "+faststart", "fflags": "+bitexact", "use_editlist": "1"},
            )
        )
        self._stream = _add_stream(self._container, clip, spec, fps)
        self._time_base = 1 / fps
        self._clock = self._stream.codec_context.time_base
        self.num_frames = 0

    def __enter__(self) -> ClipEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, picture: av.VideoFrame) -> None:
        """Append a picture made by PictureMaker for the same spec.

        Raises: Unencodable if the codec takes no pictures of this size.
        """
        before = picture.pts, picture.time_base, picture.pict_type
        picture.pts, picture.time_base = self.num_frames, self._clock
        picture.pict_type = 0  # the source's picture types must not steer the encoder
        self.num_frames += 1
        self._encode(picture)
        picture.pts, _, picture.pict_type = before  # it may be the decoder's own frame
        if before[1] is not None:
            picture.time_base = before[1]

    def finish(self) -> bytes:
        """Flush and return the whole mp4."""
        self._encode(None)
        self._container.close()
        return self._path.read()

    def _encode(self, picture: av.VideoFrame | None) -> None:
        try:
            with _own_scheduling(self._clip):
                packets = self._stream.encode(picture)
        except av.FFmpegError:
            if picture is None or self.num_frames > 1 or not _takes_small_pictures(self._clip, self._spec):
                raise
            raise Unencodable(
                f"pictures of {self._spec.width} x {self._spec.height} are larger or smaller than clip.codec="
                f"{self._clip.codec} encodes; set another clip.codec, or clip.short_side if they are too large"
            ) from None
        for packet in packets:
            packet.time_base = self._time_base
        self._container.mux(packets)


def _takes_small_pictures(clip: ClipConfig, spec: PictureSpec) -> bool:
    """Whether the same settings would do for 256 x 256."""
    name, options = encoder_options(clip)
    encoder = av.CodecContext.create(name, "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = 256, 256, spec.pix_fmt
    encoder.time_base, encoder.options = Fraction(1, 25), options
    try:
        with _own_scheduling(clip):
            encoder.open()
    except av.FFmpegError:
        return False
    return True


@contextlib.contextmanager
def _own_scheduling(clip: ClipConfig) -> Iterator[None]:
    """libsvtav1 gives the thread that opens it real-time priority where it may (as root), and leaves it there."""
    if clip.codec != "av1" or not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, parameters)


def _add_stream(container, clip: ClipConfig, spec: PictureSpec, fps: Fraction):
    name, options = encoder_options(clip)
    stream = container.add_stream(name, rate=fps, options=options)
    stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, spec.pix_fmt
    context = stream.codec_context
    context.time_base = 1 / fps
    if clip.codec == "mpeg4":  # its own clock may have to be rounded; the file has the exact one
        context.time_base = max((1 / fps).limit_denominator(_MPEG4_TICKS), Fraction(1, _MPEG4_TICKS))
        stream.time_base = 1 / fps
    context.thread_count = 1
    context.gop_size = clip.gop
    context.flags |= int(av.codec.context.Flags.bitexact)
    context.color_range = spec.color_range
    context.colorspace = spec.matrix
    context.color_primaries = spec.primaries
    context.color_trc = spec.transfer
    if spec.pixel_aspect != (1, 1):
        context.sample_aspect_ratio = Fraction(*spec.pixel_aspect)
    if clip.codec == "hevc":
        context.codec_tag = "hvc1"  # parameter sets in the header only, as players expect
    return stream


class ScratchFile:
    """A file with a name FFmpeg can open twice (faststart reads back) that no kill can leave behind.

    An anonymous file in memory where the system has them; elsewhere a temporary file.
    """

    def __enter__(self) -> ScratchFile:
        self._folder: tempfile.TemporaryDirectory | None = None
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("kinema-clip")
            self.name = f"/proc/self/fd/{self._fd}"
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="kinema-clip-")
            self.name = os.path.join(self._folder.name, "clip.mp4")
            self._fd = os.open(self.name, os.O_RDWR | os.O_CREAT)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if self._folder is not None:
            self._folder.cleanup()

    def read(self) -> bytes:
        with open(self.name, "rb") as file:
            return file.read()
