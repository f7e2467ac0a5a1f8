"""Why a source cannot be used. Each class name is an `error_class` of the quarantine table."""

from __future__ import annotations


class SourceError(Exception):
    """A source that has to be quarantined; the message says why, for the owner of the file."""


class Empty(SourceError):
    """The file has no bytes, or the folder no pictures."""


class Missing(SourceError):
    """A listed file does not exist or cannot be read."""


class NoVideoStream(SourceError):
    """The file holds sound, subtitles or a cover picture, but no video."""


class Undecodable(SourceError):
    """The file does not open, or no frame comes out of it."""


class Truncated(SourceError):
    """The file ends before its header says it should."""


class Corrupt(SourceError):
    """Some packets do not decode, or frames come out damaged or out of order."""


class TooShort(SourceError):
    """No shot has enough frames for a clip."""


class Unencodable(SourceError):
    """The pictures are healthy, but the codec of the clips does not take pictures of their size."""


class TooMuchMemory(SourceError):
    """Decoding asks for more memory than a source may have."""
