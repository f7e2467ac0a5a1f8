"""Which H.264 pictures nothing refers to, read from the headers of their packets."""

from __future__ import annotations

_SLICE_TYPES = range(1, 6)  # coded slices and their partitions (ITU-T H.264, table 7-1)


def length_size(extradata: bytes) -> int:
    """Bytes of the length before each NAL unit, from an avcC record; 0 when the stream has start codes instead."""
    is_avcc = len(extradata) > 4 and extradata[0] == 1
    return (extradata[4] & 3) + 1 if is_avcc else 0


def is_unreferenced(packet: bytes, length_bytes: int) -> bool:
    """Whether every slice of the picture has nal_ref_idc 0: leaving it out changes no other picture.

    False for packets whose structure is not as expected; decoding them does no harm.
    """
    place, num_slices = 0, 0
    while place + length_bytes < len(packet):
        size = int.from_bytes(packet[place : place + length_bytes], "big")
        header = packet[place + length_bytes]
        if header & 31 in _SLICE_TYPES:
            num_slices += 1
            if header >> 5 & 3:
                return False
        place += length_bytes + size
    return num_slices > 0 and place == len(packet)
