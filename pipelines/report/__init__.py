"""Pages for people: HTML with pictures inside, one file, no server."""

from kinema.pipelines.report.page import Page

__all__ = ["Page"]
