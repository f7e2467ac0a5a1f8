"""`backbone_weights=auto`: published weights where the network gives them, else an encoder that learns from scratch."""

from __future__ import annotations

import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

from kinema.models.weights import LEDGER, cached_path, file_sha256, published_file

BACKBONE, VARIANT = "dino_vits16", "dino_vits16_yt"
ANSWER_S = 5.0
KEY = "backbone_weights="
# What suits a frozen transformer in a short run; conv_small's settings are those of configs/demo.yaml.
_FROZEN = ("flow_weight=0.1", "edge_weight=1.0", "fit_with=averaged", "ema_decay=0.98", "resize=96", "crop=64")


def encoder_settings(overrides: Sequence[str]) -> list[str]:
    """The overrides with `backbone_weights=` settled: `auto` (also when not given), `scratch`, `published` or FILE.

    Says what it decides; with `auto`, size, licence and hash of the published weights before they are downloaded, or
    one line why they cannot be had. A variant that the user names is left alone.
    """
    given = [text for text in overrides if text.startswith(KEY)]
    rest = [text for text in overrides if not text.startswith(KEY)]
    if any(text.startswith(("train.flowfeat.variant=", "train.flowfeat.backbone_weights=")) for text in rest):
        return rest
    choice = given[-1].removeprefix(KEY) if given else "auto"
    if choice == "auto":
        choice = "published" if _fetched() else "scratch"
    if choice in ("scratch", ""):
        return rest
    settings = [f"variant={VARIANT}", f"backbone_weights={choice}", *_FROZEN]
    return [*(f"train.flowfeat.{text}" for text in settings), "train.lr=1e-3", *rest]


def _fetched() -> bool:
    """Whether the published weights are here now."""
    entry = LEDGER[BACKBONE]
    try:
        if not cached_path(entry.url).is_file():
            request = urllib.request.Request(entry.url, method="HEAD")
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                size = int(answer.headers.get("Content-Length") or 0)
            hash_ = f"sha256 {entry.sha256}" if entry.sha256 else "no published hash"
            _say(f"downloading {BACKBONE} ({size / 1e6:.0f} MB, {entry.licence}, {hash_}) from {entry.url}")
        path = published_file(BACKBONE)
        _say(f"encoder {BACKBONE}, frozen: {path} ({entry.licence}, sha256 {file_sha256(path)[:16]}...)")
        return True
    except (ValueError, OSError, urllib.error.URLError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())[:120]
        _say(f"published weights of {BACKBONE} cannot be had ({reason}): conv_small learns from scratch instead")
        return False


def _say(text: str) -> None:
    sys.stderr.write(f"demo: {text}\n")
