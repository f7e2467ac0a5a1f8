"""Reads a safetensors file with torch alone.

The format: 8 bytes of header size (little endian), a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of the file, on the CPU.

    Raises: ValueError if the file is not whole.
    """
    data = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > len(data):
        raise ValueError(f"{path} is no safetensors file, or its header is cut off")
    header = json.loads(data[8:start].decode())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        low, high = (start + offset for offset in entry["data_offsets"])
        if high > len(data):
            raise ValueError(f"{path} is cut off: {name} ends at byte {high} of {len(data)}")
        dtype = DTYPES[entry["dtype"]]
        count = (high - low) // dtype.itemsize
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=low) if count else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors
