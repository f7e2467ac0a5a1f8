"""kinema: raw videos in, motion models out."""

__version__ = "0.1.0"
