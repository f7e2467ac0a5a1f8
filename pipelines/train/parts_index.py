"""The index of a sharded checkpoint, which is a pickle, read with the few names that an index holds."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata

_STORED = "Metadata TensorStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex StorageMeta"
_ADMITTED = {("torch.distributed.checkpoint.metadata", name) for name in _STORED.split()} | {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}
_TORCH_NAMES = frozenset({"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"})


class _IndexNames(pickle.Unpickler):
    """Unpickler for which no names exist but those of an index."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED and not (module == "torch" and name in _TORCH_NAMES):
            raise pickle.UnpicklingError(f"holds {module}.{name}")
        return super().find_class(module, name)


class PartsReader(dcp.FileSystemReader):
    """Reads the index, which is a pickle, without running what else a pickle may hold."""

    def __init__(self, folder: Path, index_file: str):
        super().__init__(str(folder))
        self.index_path = folder / index_file

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index. Raises: ValueError."""
        path = self.index_path
        try:
            with path.open("rb") as file:
                found = _IndexNames(file).load()
            entries = list(found.state_dict_metadata.values())
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not an index of parts ({error}); take another checkpoint") from None
        if not all(isinstance(entry, metadata.TensorStorageMetadata) for entry in entries):
            raise ValueError(f"{path} is not an index of parts (of other things than tensors); take another checkpoint")
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found
