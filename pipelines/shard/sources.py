"""Find the sources behind `videos=`: files, frame folders, tars, manifests, lists; here, on a share or in a bucket."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa

from kinema.pipelines.artifacts import read_parquet
from kinema.pipelines.shard.media import Source, is_remote, local_path, open_bytes, read_all

VIDEO_EXTENSIONS = frozenset(
    "mp4 m4v mov qt mkv webm avi mpg mpeg mpe m1v m2v mpv ts m2ts mts vob flv f4v wmv asf ogv ogm 3gp 3g2 mxf gif "
    "y4m ivf nut dv divx h264 264 h265 hevc 265 rm rmvb amv mjpeg mjpg".split()
)
PICTURE_EXTENSIONS = frozenset("jpg jpeg png bmp webp tif tiff".split())
LABEL_EXTENSIONS = frozenset("json txt cls".split())
PATH_COLUMNS = ("path", "video", "file", "filename", "file_name", "filepath", "video_path", "url", "video_url")
_PICTURES, _MASKS = "JPEGImages", "Annotations"
LAYOUTS = ("auto", "videos", "frames", "webdataset", "manifest", "list")


@dataclass
class Found:
    """What `videos=` holds."""

    sources: list[Source] = field(default_factory=list)
    """Sorted by id; ids are unique."""
    missing: dict[str, str] = field(default_factory=dict)
    """Id of a listed file that cannot be used -> why."""
    ignored_files: int = 0
    """Files that are neither videos nor belong to one."""


def find_sources(videos: str, layout: str = "auto", exclude: str = "") -> Found:
    """Look at `videos` and list its sources.

    Args:
        videos: folder, file, glob, list (.txt), manifest (.csv, .tsv, .parquet), tar, or a URL of one of these.
        layout: what it holds; `auto` looks.
        exclude: a folder inside it to leave alone (the stage's own output).

    Raises: ValueError when there is nothing usable, with what was found instead.
    """
    if not videos:
        raise ValueError("videos= is empty; give a folder, a file, a glob or a URL, for example videos=my_videos/")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout} is not known; use one of {', '.join(LAYOUTS)}")
    if exclude and not is_remote(videos) and not is_remote(exclude) and local_path(videos) == local_path(exclude):
        raise ValueError(f"out={exclude} is the folder of the videos; choose another out=")
    place = _place(videos, exclude)
    extension = _extension(videos)
    if place.kind == "folder":
        found = _from_folder(place, layout)
    elif place.kind == "glob":
        found = _from_files(place.glob(), place, layout)
    elif layout == "manifest" or (layout == "auto" and extension in ("csv", "tsv", "parquet")):
        found = _from_manifest(place)
    elif layout == "list" or (layout == "auto" and extension == "txt"):
        found = _from_list(place)
    else:
        found = _from_files([posixpath.basename(place.root)], place.parent(), layout)
    if not found.sources and not found.missing:
        raise ValueError(f"no video found in videos={videos} ({_what_is_there(place, found)}); {_hint(layout)}")
    found.sources = _unique(found.sources)
    return found


def _place(videos: str, exclude: str) -> _Place:
    """Raises: ValueError for a URL that cannot be looked at."""
    if not is_remote(videos):
        return _Place(videos, exclude)
    try:
        fsspec.get_filesystem_class(videos.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise ValueError(f"videos={videos} cannot be opened: {error}; give a folder or the URL of a bucket") from None
    try:
        return _Place(videos, exclude)
    except OSError as error:
        raise ValueError(f"videos={videos} cannot be opened: {error}; check the address and the network") from None


class _Place:
    """A root folder or file, local or remote, and names relative to it."""

    def __init__(self, videos: str, exclude: str = ""):
        self.given = videos
        self.remote = is_remote(videos)
        if self.remote:
            self.filesystem, path = fsspec.core.url_to_fs(videos)
            self.protocol = videos.partition("://")[0]
            self.root = path.rstrip("/")
        else:
            self.root = local_path(videos).replace(os.sep, "/")
        self.exclude = "" if is_remote(exclude) or not exclude else local_path(exclude)
        self.pattern = ""
        self.kind = self._kind()
        self.seen: list[str] = []

    def _kind(self) -> str:
        if self.filesystem.isdir(self.root) if self.remote else os.path.isdir(self.root):
            return "folder"
        if self.filesystem.isfile(self.root) if self.remote else os.path.isfile(self.root):
            return "file"
        if any(c in self.root for c in "*?["):
            parts = self.root.split("/")
            fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
            self.pattern = "/".join(parts[fixed:])
            self.root = "/".join(parts[:fixed]) or "/"
            return "glob"
        raise ValueError(f"videos={self.given} does not exist; check the path")

    def parent(self) -> _Place:
        """The folder of a file."""
        other = object.__new__(_Place)
        other.__dict__.update(self.__dict__)
        other.root, other.kind = posixpath.dirname(self.root), "folder"
        return other

    def url(self, name: str) -> str:
        """Absolute path or URL of a relative name."""
        path = posixpath.normpath(f"{self.root}/{name}")
        return f"{self.protocol}://{path.lstrip('/')}" if self.remote else path

    def exists(self, name: str) -> bool:
        """Whether a file of this relative name is there."""
        path = f"{self.root}/{name}"
        return self.filesystem.isfile(path) if self.remote else os.path.isfile(path)

    def files(self) -> list[str]:
        """Every file below, sorted relative names; hidden ones and the excluded folder are left out."""
        if self.remote:
            names = [posixpath.relpath(path, self.root) for path in self.filesystem.find(self.root)]
        else:
            names = list(self._walk())
        self.seen = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
        return self.seen

    def _walk(self) -> Iterable[str]:
        visited: set[str] = set()
        for folder, folders, files in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited or (self.exclude and real == os.path.realpath(self.exclude)):
                folders.clear()
                continue
            visited.add(real)
            for name in files:
                if not os.path.isfile(os.path.join(folder, name)):
                    continue  # pipes and devices would block whoever reads them; broken links have no bytes
                yield os.path.relpath(os.path.join(folder, name), self.root).replace(os.sep, "/")

    def glob(self) -> list[str]:
        """Files that match the pattern, and every file in folders that match it."""
        if self.remote:
            matches = self.filesystem.glob(f"{self.root}/{self.pattern}")
            matches = [posixpath.relpath(path, self.root) for path in matches]
        else:
            matches = glob.glob(self.pattern, root_dir=self.root, recursive=True)
        wanted = {name.replace(os.sep, "/").rstrip("/") for name in matches}
        return [name for name in self.files() if any(part in wanted for part in _with_parents(name))]


def _with_parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in posixpath.basename(name) else ""


def _from_folder(place: _Place, layout: str) -> Found:
    names = place.files()
    if layout in ("list", "manifest"):
        raise ValueError(f"layout={layout} needs a file, videos={place.given} is a folder")
    has_dataset = any(f"/{_PICTURES}/" in f"/{name}" for name in names)
    has_files = any(_extension(name) in VIDEO_EXTENSIONS or _extension(name) == "tar" for name in names)
    if layout == "frames" or (layout == "auto" and (has_dataset or not has_files)):
        return _from_frames(names, place)
    return _from_files(names, place, layout)


def _from_files(names: list[str], place: _Place, layout: str) -> Found:
    found = Found()
    for name in names:
        extension = _extension(name)
        shown = name.encode("utf-8", "backslashreplace").decode()
        if shown != name and extension in VIDEO_EXTENSIONS | {"tar"}:
            found.missing[shown] = "the file's name is not UTF-8; rename it"
        elif layout in ("auto", "videos") and extension in VIDEO_EXTENSIONS:
            found.sources.append(Source(name, place.url(name)))
        elif layout in ("auto", "webdataset") and extension == "tar":
            _add_tar(found, name, place.url(name))
        else:
            found.ignored_files += 1
    if layout == "frames" and not found.sources:
        return _from_frames(names, place)
    return found


def _natural(name: str) -> list[Any]:
    """Sort key under which frame10 comes after frame9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def _from_frames(names: list[str], place: _Place) -> Found:
    """Frame folders: below JPEGImages (masks below Annotations at the same place), or any folder of pictures."""
    folders: dict[str, list[str]] = {}
    for name in names:
        if _extension(name) in PICTURE_EXTENSIONS:
            folders.setdefault(posixpath.dirname(name), []).append(name)
    root_name = posixpath.basename(place.root)
    dataset = any(_PICTURES in folder.split("/") for folder in folders) or _PICTURES in place.root.split("/")
    found = Found()
    used = 0
    for folder, pictures in sorted(folders.items()):
        parts = place.root.split("/") + ([p for p in folder.split("/") if p])
        if dataset and _PICTURES not in parts:
            continue
        pictures = sorted(pictures, key=_natural)
        masks = _masks_of(pictures, names, place)
        used += len(pictures) + sum(mask is not None for mask in masks)
        urls = tuple(place.url(name) for name in pictures)
        found.sources.append(Source(folder or root_name, place.url(folder or "."), pictures=urls, masks=masks))
    found.ignored_files = len(names) - used
    return found


def _masks_of(pictures: list[str], names: list[str], place: _Place) -> tuple[str | None, ...]:
    """URL of each picture's mask; empty when the folder has none."""
    known = set(names)
    masks: list[str | None] = []
    for picture in pictures:
        parts = picture.split("/")
        if _PICTURES in parts:
            parts[parts.index(_PICTURES)] = _MASKS
            name = posixpath.splitext("/".join(parts))[0] + ".png"
            masks.append(place.url(name) if name in known else None)
        else:
            path = place.url(picture)
            head, found, tail = path.rpartition(f"/{_PICTURES}/")
            mask = f"{head}/{_MASKS}/{posixpath.splitext(tail)[0]}.png" if found else None
            masks.append(mask if mask and not place.remote and os.path.isfile(mask) else None)
    return tuple(masks) if any(masks) else ()


def _add_tar(found: Found, name: str, url: str) -> None:
    """Videos inside a tar, with the other members of their samples as labels."""
    try:
        with open_bytes(url) as file, tarfile.open(fileobj=file, mode="r:*" if is_remote(url) else "r:") as tar:
            members = [m for m in tar if m.isfile()]
            labels = {
                m.name: content.read()
                for m in members
                if _extension(m.name) in LABEL_EXTENSIONS and m.size < 1 << 20 and (content := tar.extractfile(m))
            }
    except (tarfile.TarError, OSError) as error:
        found.missing[name] = f"the tar does not open: {error}"
        return
    videos = [m for m in members if _extension(m.name) in VIDEO_EXTENSIONS]
    for member in videos:
        found.sources.append(
            Source(f"{name}/{member.name}", url, member.offset_data, member.size, _member_labels(member.name, labels))
        )
    if not videos:
        found.ignored_files += 1


def _member_labels(video: str, members: dict[str, bytes]) -> dict[str, Any] | None:
    """Labels of a video member: members with its name, or with its name up to the first dot (WebDataset's key)."""
    folder, base = posixpath.split(video)
    stem, key = base.rpartition(".")[0], base.partition(".")[0]
    labels: dict[str, Any] = {}
    for name in sorted(members):
        other = posixpath.split(name)
        if other[0] != folder or other[1].rpartition(".")[0] not in (stem, key):
            continue
        text = members[name].decode("utf-8", "replace").strip()
        extension = _extension(name)
        if extension == "json":
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            labels.update(value if isinstance(value, dict) else {"json": value})
        elif extension == "cls" and re.fullmatch(r"-?\d+", text):
            labels["cls"] = int(text)
        else:
            labels[extension] = text
    return _plain(labels) or None


def _from_manifest(place: _Place) -> Found:
    data = read_all(place.given)
    try:
        rows = _manifest_rows(data, _extension(place.root))
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"manifest {place.given} cannot be read: {error}") from None
    columns = list(rows[0]) if rows else []
    named = {c.lower(): c for c in reversed(columns)}
    column = next((named[name] for name in PATH_COLUMNS if name in named), None)
    if column is None:
        raise ValueError(
            f"manifest {place.given} has no path column (its columns: {', '.join(columns) or 'none'}); "
            f"name one of {', '.join(PATH_COLUMNS)}"
        )
    entries: list[tuple[str, dict[str, Any]]] = []
    for row in rows:
        path = str(row[column] or "").strip()
        if path:
            entries.append((path, {k: v for k, v in row.items() if k != column and v not in (None, "")}))
    return _from_entries(entries, place)


def _manifest_rows(data: bytes, extension: str) -> list[dict[str, Any]]:
    if extension == "parquet":
        rows = read_parquet(data).to_pylist()
        return [{k: _plain(v) for k, v in row.items()} for row in rows]
    text = data.decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if extension == "tsv" else ",")
    return [{k: v for k, v in row.items() if k is not None} for row in reader]


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; NaN becomes null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value != value:
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _from_list(place: _Place) -> Found:
    text = read_all(place.given).decode("utf-8-sig")
    lines = (line.strip() for line in text.splitlines())
    return _from_entries([(line, {}) for line in lines if line and not line.startswith("#")], place)


def _from_entries(entries: list[tuple[str, dict[str, Any]]], place: _Place) -> Found:
    """Files named in a list or manifest, relative to its folder, or absolute, or URLs.

    A file that is named several times with different labels gets them all, under `rows`.
    """
    base = place.parent()
    labels: dict[str, list[dict[str, Any]]] = {}
    for entry, row in entries:
        rows = labels.setdefault(_resolve(entry, base), [])
        if row and row not in rows:
            rows.append(row)
    found = Found()
    for url, name in _relative_names(list(labels), base).items():
        rows = labels[url]
        if _is_file(url):
            found.sources.append(Source(name, url, labels={"rows": rows} if len(rows) > 1 else next(iter(rows), None)))
        else:
            found.missing[name] = "listed, but there is no such file"
    return found


def _relative_names(urls: list[str], base: _Place) -> dict[str, str]:
    """Id of each file: relative to the list's folder; files outside of it relative to the folder they share."""
    root = base.url(".")
    inside = {url: url[len(root) :].lstrip("/") for url in urls if url.startswith(f"{root.rstrip('/')}/")}
    outside = [url for url in urls if url not in inside]
    bare = {url: url.partition("://")[2] if is_remote(url) else url.lstrip("/") for url in outside}
    common = posixpath.commonpath([posixpath.dirname(path) for path in bare.values()]) if bare else ""
    return {**inside, **{url: posixpath.relpath(path, common) if common else path for url, path in bare.items()}}


def _resolve(entry: str, base: _Place) -> str:
    if is_remote(entry):
        return entry
    if posixpath.isabs(entry) and not base.remote:
        return posixpath.normpath(entry)
    return base.url(entry)


def _is_file(url: str) -> bool:
    if not is_remote(url):
        return os.path.isfile(local_path(url))
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.isfile(path)


def _unique(sources: list[Source]) -> list[Source]:
    by_id: dict[str, Source] = {}
    for source in sources:
        if source.id in by_id:
            raise ValueError(f"two videos are called {source.id}; give one of them another name or folder")
        by_id[source.id] = source
    return [by_id[name] for name in sorted(by_id)]


def _what_is_there(place: _Place, found: Found) -> str:
    if place.kind == "file":
        return "one file of another kind"
    names = place.seen or place.files()
    kinds = Counter(f".{_extension(name)}" if _extension(name) else "no extension" for name in names)
    if not kinds:
        return "nothing matches the pattern" if place.kind == "glob" else "it is empty"
    most = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(4))
    return f"{len(names)} files: {most}" + (", none matches" if place.kind == "glob" else "")


def _hint(layout: str) -> str:
    if layout == "frames":
        return "frame folders hold pictures (.jpg, .png), one folder per video"
    if layout == "webdataset":
        return "tars need members with a video's extension"
    return "videos have an extension such as .mp4, .mov, .mkv, .webm, .avi"
