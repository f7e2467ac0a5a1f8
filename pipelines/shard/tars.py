"""Videos inside tars, with the other members of their WebDataset samples as labels.

Read once from front to back. What is whole is used: a tar that ends too early costs what is behind its last whole
member. Of members with one name the last counts, as when it is unpacked.
"""

from __future__ import annotations

import lzma
import posixpath
import re
import tarfile
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from kinema.configs.json_text import json_text
from kinema.pipelines.shard.labels import plain_labels, read_json
from kinema.pipelines.shard.media import Source, open_unpacked

LABEL_EXTENSIONS = frozenset("json txt cls".split())
_LARGEST_LABEL = 1 << 20
_PACKED = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz|tbz2|txz)$")


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a tar, compressed or not."""
    return bool(_PACKED.search(name.lower()))


@dataclass
class TarContent:
    """What a tar holds."""

    sources: list[Source] = field(default_factory=list)
    """Its whole videos."""
    problem: tuple[str, str] | None = None
    """(error class, message) of what is wrong with it."""


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int
    label: bytes | None = None


def read_tar(name: str, url: str, video_extensions: frozenset[str]) -> TarContent:
    """List a tar.

    Args: name, of the tar, which the ids of its videos begin with; url, where it lies.
    """
    content = TarContent()
    members: dict[str, _Member] = {}
    try:
        with open_unpacked(url) as (file, packing):
            content.problem = _read_members(file, members)
    except EOFError:  # a compressed tar that was cut
        content.problem = _cut(len(members))
    except (tarfile.TarError, OSError, zlib.error, lzma.LZMAError) as error:
        if not members:
            content.problem = "Missing", f"the tar does not open: {error}"
            return content
        content.problem = "Corrupt", f"the tar is damaged behind {len(members)} whole members: {error}"
    groups = _labels_by_key(members)
    stems = {member.rpartition(".")[0] for member in members if _extension(member) in video_extensions}
    stems |= {member for member in members if _extension(member) in video_extensions}
    for member, place in members.items():
        if _extension(member) in video_extensions:
            labels = _labels_of(member, groups, stems)
            content.sources.append(Source(f"{name}/{member}", url, place.offset, place.size, labels, packing=packing))
    return content


def _cut(num_members: int) -> tuple[str, str]:
    return "Truncated", f"the tar ends too early; its {num_members} whole members are used"


def _read_members(file, members: dict[str, _Member]) -> tuple[str, str] | None:
    """Fill `members`; returns what is wrong with the tar."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while True:
            try:
                info = tar.next()
            except (tarfile.TarError, EOFError, OSError) as error:
                if "unexpected end" in str(error) or isinstance(error, EOFError):
                    return _cut(len(members))
                return "Corrupt", f"the tar is damaged behind {len(members)} whole members: {error}"
            if info is None:
                file.seek(tar.offset)  # tarfile takes a damaged header for the end
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    return "Corrupt", f"the tar is damaged behind {len(members)} whole members"
                return None
            member = _resolve(info, members)
            if member is None:
                continue
            if not _is_whole(file, member):
                return _cut(len(members))
            if _extension(info.name) in LABEL_EXTENSIONS and member.size < _LARGEST_LABEL:
                file.seek(member.offset)
                member = _Member(member.offset, member.size, file.read(member.size))
            members.pop(info.name, None)  # the last one of a name counts, at its place
            members[info.name] = member
            tar.members = []  # type: ignore[attr-defined]  # not kept: tars may have millions


def _resolve(info: tarfile.TarInfo, members: dict[str, _Member]) -> _Member | None:
    """Where the bytes of a file lie; of a link those of what it names. None for other members."""
    if info.issparse():
        return None
    if info.isreg():
        return _Member(info.offset_data, info.size)
    if info.islnk():
        return members.get(info.linkname)
    if info.issym():
        return members.get(posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname)))
    return None


def _is_whole(file, member: _Member) -> bool:
    if member.size == 0:
        return True
    file.seek(member.offset + member.size - 1)
    return len(file.read(1)) == 1


def _extension(name: str) -> str:
    base = posixpath.basename(name)
    return base.rpartition(".")[2].lower() if "." in base else ""


def _key(name: str) -> str:
    """WebDataset's key: the name up to the first dot of its last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _labels_by_key(members: dict[str, _Member]) -> dict[str, list[tuple[str, bytes]]]:
    groups: dict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for name in sorted(members):
        label = members[name].label
        if label is not None:
            groups[_key(name)].append((name, label))
    return groups


def _labels_of(video: str, groups: dict[str, list[tuple[str, bytes]]], stems: set[str]) -> dict[str, Any] | None:
    """Labels of a video: the members of its sample, but those that carry another video's whole name.

    (`vid.001.json` belongs to `vid.001.mp4` where there is one, and to every video with the key `vid` otherwise.)
    """
    own = {video, video.rpartition(".")[0]}
    labels: dict[str, Any] = {}
    for name, data in groups.get(_key(video), []):
        stem = name.rpartition(".")[0]
        if stem in stems and stem not in own:
            continue
        middle = stem[len(_key(video)) + 1 :] if stem not in own else ""
        _add(labels, _extension(name), middle, data)
    return plain_labels(labels) or None


def _add(labels: dict[str, Any], extension: str, middle: str, data: bytes) -> None:
    text = data.decode("utf-8-sig", "replace").strip()
    if extension == "cls" and re.fullmatch(r"-?\d+", text):
        value: Any = int(text)
    else:
        value = read_json(text) if extension == "json" else text
    found = value if isinstance(value, dict) else {f"{middle}.{extension}" if middle else extension: value}
    for key, item in found.items():
        same = json_text(labels.get(key), default=str) == json_text(item, default=str)
        if key not in labels or same or not middle:
            labels[key] = item
        else:  # two members say different things: the second is kept under its own name
            labels.setdefault(middle, {})
            if isinstance(labels[middle], dict):
                labels[middle][key] = item
