"""Perceptual signatures: clips that look alike have similar ones, whatever their codec, size or rate.

A frame's signature is the 8x8 low-frequency corner of the DCT of its 32x32 grey picture (the classic pHash before
its bits are taken). A clip's is that of five frames spread over it.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float32, Int8, UInt8

NUM_FRAMES = 5
"""Frames of a clip that its signature holds."""
_SIDE, _CORNER = 32, 8
_SCALE = 8.0  # int8 steps are 8 grey levels x 1/32: DCT coefficients of real pictures fit, small ones survive
_FLAT = 1.5  # mean magnitude of AC steps below which a picture is too flat to be recognised
_STILL = 0.6  # mean change in steps below which a clip counts as still
_ALIKE_CHANGE = 0.7  # correlation of the changes over time that copies of a moving clip reach


def frame_signature(picture_bgr: UInt8[np.ndarray, "H W 3"]) -> Int8[np.ndarray, "64"]:
    """DCT signature of one picture; the mean brightness (first entry) is 0."""
    grey = cv2.cvtColor(picture_bgr, cv2.COLOR_BGR2GRAY).astype(np.float32)
    corner = cv2.dct(cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA))[:_CORNER, :_CORNER].ravel()
    corner[0] = 0
    return np.clip(np.rint(corner / _SCALE), -127, 127).astype(np.int8)


def clip_signature(signatures: Int8[np.ndarray, "T 64"]) -> Int8[np.ndarray, "5 64"]:
    """Signature of a clip from those of its frames."""
    return signatures[np.rint(np.linspace(0, len(signatures) - 1, NUM_FRAMES)).astype(int)]


def hash_bits(signature: Float32[np.ndarray, "64"] | Int8[np.ndarray, "64"]) -> np.ndarray:
    """bool [64]: entries above the median, as in pHash."""
    return signature > np.median(signature)


def perceptual_hash(signature: Int8[np.ndarray, "5 64"]) -> int:
    """64-bit hash of a clip: the bits of its mean signature."""
    return int.from_bytes(np.packbits(hash_bits(signature.astype(np.float32).mean(0))).tobytes(), "big")


def is_flat(signature: Int8[np.ndarray, "5 64"]) -> bool:
    """Whether the clip is too featureless to be told from others (black, plain colours)."""
    return float(np.abs(signature.astype(np.float32)).mean()) < _FLAT


def looks_alike(a: Int8[np.ndarray, "5 64"], b: Int8[np.ndarray, "5 64"], bits: int) -> bool:
    """Whether two clips show the same footage.

    The frames' hashes differ in at most `bits` of 64 on average, and the pictures change over time in the same way:
    two stretches of one steady camera have like hashes, but their changes differ.
    """
    distance = np.mean([np.count_nonzero(hash_bits(x) != hash_bits(y)) for x, y in zip(a, b, strict=True)])
    if distance > bits:
        return False
    change_a, change_b = (x.astype(np.float32) - x.astype(np.float32).mean(0) for x in (a, b))
    still_a, still_b = (float(np.abs(change).mean()) < _STILL for change in (change_a, change_b))
    if still_a or still_b:
        return still_a and still_b
    correlation = float((change_a * change_b).sum() / np.linalg.norm(change_a) / np.linalg.norm(change_b))
    return correlation >= _ALIKE_CHANGE
