"""Which motion extractor an adapter follows, by what `extractor=` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.models.dismo.motion_extractor import motion_extractor

_WEIGHTS_FILES = (".pt", ".pth", ".safetensors")


def load_extractor(address: str) -> Any:
    """A motion extractor in eval mode.

    Args: address, `published`, a weights file or URL of the large one, a run, a checkpoint, or models:/NAME@ALIAS.
    Raises: ValueError if there is none.
    """
    if address == "published":
        return motion_extractor(pretrained=True)
    if Path(address).suffix in _WEIGHTS_FILES and not Path(address).is_dir():
        return motion_extractor(weights=address)
    from kinema.pipelines.model_address import load_address

    try:
        return load_address(address, kind="motion", user="kinema transfer").network
    except ValueError as error:
        raise ValueError(f"extractor={address}: {error}") from None
