"""Find the sources behind `videos=`: files, frame folders, tars, manifests, lists; here, on a share or in a bucket."""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import fsspec

from kinema.pipelines.shard.labels import plain_labels
from kinema.pipelines.shard.lists import Entry, read_listing
from kinema.pipelines.shard.media import Source, ask, is_remote, local_path, read_all
from kinema.pipelines.shard.tars import is_tar, read_tar

VIDEO_EXTENSIONS = frozenset(
    "mp4 m4v mov qt mkv webm avi mpg mpeg mpe m1v m2v mpv ts m2ts mts vob flv f4v wmv asf ogv ogm 3gp 3g2 mxf gif "
    "y4m ivf nut dv apng divx h264 264 h265 hevc 265 rm rmvb amv mjpeg mjpg".split()
)
PICTURE_EXTENSIONS = frozenset("jpg jpeg png bmp webp tif tiff".split())
LIST_EXTENSIONS = frozenset("csv tsv parquet jsonl ndjson json txt list lst".split())
_PATHS_FIRST = frozenset("txt list lst".split())  # a line is a path unless there is no such file
_PICTURES, _MASKS = "JPEGImages", "Annotations"
LAYOUTS = ("auto", "videos", "frames", "webdataset", "manifest", "list")


@dataclass
class Found:
    """What `videos=` holds."""

    sources: list[Source] = field(default_factory=list)
    """Sorted by id; ids are unique."""
    missing: dict[str, str] = field(default_factory=dict)
    """Id of a listed file that cannot be used -> why."""
    classes: dict[str, str] = field(default_factory=dict)
    """Error class of those that are not simply missing."""
    ignored_files: int = 0
    """Files that are neither videos nor belong to one."""

    def refuse(self, name: str, error_class: str, why: str) -> None:
        """Something listed cannot be used; the others can."""
        self.missing[name] = why
        if error_class != "Missing":
            self.classes[name] = error_class


def find_sources(videos: str, layout: str = "auto", exclude: str = "", root: str = "") -> Found:
    """Look at `videos` and list its sources.

    Args:
        videos: folder, file, glob, list (.txt), manifest (.csv, .tsv, .parquet), tar, or a URL of one of these.
        layout: what it holds; `auto` looks.
        exclude: a folder inside it to leave alone (the stage's own output).
        root: folder that the paths of a list are relative to; empty: the list's own.

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
    elif layout in ("list", "manifest") or (layout == "auto" and extension in LIST_EXTENSIONS):
        found = _from_listing(place, root, layout == "list" or (layout == "auto" and extension in _PATHS_FIRST))
    else:
        found = _from_files([posixpath.basename(place.root)], place.parent(), layout)
    if not found.sources and not found.missing:
        raise ValueError(f"no video found in videos={videos} ({_what_is_there(place, found)}); {_hint(layout)}")
    _make_unique(found)
    for folder, why in place.unreadable.items():
        found.refuse(folder, "Missing", why)
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
            _, path = fsspec.core.url_to_fs(videos)
            self.protocol = videos.partition("://")[0]
            self.root = path.rstrip("/")
        else:
            self.root = local_path(videos).replace(os.sep, "/")
        self.exclude = "" if is_remote(exclude) or not exclude else local_path(exclude)
        self.pattern = ""
        self.kind = self._kind()
        self.seen: list[str] = []
        self.unreadable: dict[str, str] = {}

    def _kind(self) -> str:
        if self._ask("isdir", self.root) if self.remote else os.path.isdir(self.root):
            return "folder"
        if self._ask("isfile", self.root) if self.remote else os.path.isfile(self.root):
            return "file"
        if any(c in self.root for c in "*?["):
            parts = self.root.split("/")
            fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
            self.pattern = "/".join(parts[fixed:])
            self.root = "/".join(parts[:fixed]) or "/"
            return "glob"
        raise ValueError(f"videos={self.given} does not exist; check the path")

    def _ask(self, method: str, path: str) -> Any:
        """What a method of the store's file system says about a path of it."""
        return ask(self.given, lambda files, _: getattr(files, method)(path))

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
        return self._ask("isfile", path) if self.remote else os.path.isfile(path)

    def files(self) -> list[str]:
        """Every file below, sorted relative names; hidden ones and the excluded folder are left out."""
        if self.remote:
            names = [posixpath.relpath(path, self.root) for path in self._ask("find", self.root)]
        else:
            names = list(self._walk())
        self.seen = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
        return self.seen

    def _walk(self) -> Iterable[str]:
        visited: set[str] = set()
        for folder, folders, files in os.walk(self.root, onerror=self._note, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited or (self.exclude and real == os.path.realpath(self.exclude)):
                folders.clear()
                continue
            visited.add(real)
            for name in files:
                if not os.path.isfile(os.path.join(folder, name)):
                    continue  # pipes and devices would block whoever reads them; broken links have no bytes
                yield os.path.relpath(os.path.join(folder, name), self.root).replace(os.sep, "/")

    def _note(self, error: OSError) -> None:
        name = os.path.relpath(str(error.filename), self.root).replace(os.sep, "/")
        self.unreadable[name] = f"the folder cannot be listed: {error.strerror}"

    def glob(self) -> list[str]:
        """Files that match the pattern, and every file in folders that match it."""
        if self.remote:
            matches = self._ask("glob", f"{self.root}/{self.pattern}")
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
    has_files = any(_extension(name) in VIDEO_EXTENSIONS or is_tar(name) for name in names)
    if layout == "frames" or (layout == "auto" and (has_dataset or not has_files)):
        return _from_frames(names, place)
    return _from_files(names, place, layout)


def _from_files(names: list[str], place: _Place, layout: str) -> Found:
    found = Found()
    for name in names:
        extension = _extension(name)
        shown = name.encode("utf-8", "backslashreplace").decode()
        if shown != name and (extension in VIDEO_EXTENSIONS or is_tar(name)):
            found.missing[shown] = "the file's name is not UTF-8; rename it"
        elif layout in ("auto", "videos") and extension in VIDEO_EXTENSIONS:
            found.sources.append(Source(name, place.url(name)))
        elif layout in ("auto", "webdataset") and is_tar(name):
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
    """Videos inside a tar."""
    content = read_tar(name, url, VIDEO_EXTENSIONS)
    found.sources.extend(content.sources)
    if content.problem:
        found.refuse(name, *content.problem)
    elif not content.sources:
        found.ignored_files += 1


def _from_listing(place: _Place, root: str, is_list: bool) -> Found:
    """Files named in a list or manifest: relative to `root` or the list's folder, absolute, or URLs."""
    base = _place(root, "") if root else place.parent()
    listing = read_listing(
        read_all(place.given),
        place.given,
        _extension(place.root),
        is_list,
        lambda path: bool(path) and _is_file(_resolve(path, base)),
    )
    found = _from_entries(listing.entries, base)
    for name, why in listing.bad.items():
        found.refuse(name, "Missing", why)
    if listing.entries and not found.sources:
        raise ValueError(
            f"none of the {len(listing.entries)} files of {place.given} exists; it was read as {listing.form}; first "
            f"line: {listing.first_line[:200]!r}; paths are relative to {base.root} (set root= for another folder)"
        )
    return found


def _from_entries(entries: list[Entry], base: _Place) -> Found:
    """Sources of a list's lines.

    A file (or part of one) that is named several times with different labels gets them all, under `rows`.
    """
    labels: dict[tuple[str, tuple[float, float | None] | None], list[dict[str, Any]]] = {}
    for entry in entries:
        rows = labels.setdefault((_resolve(entry.path, base), entry.segment), [])
        if entry.labels and entry.labels not in rows:
            rows.append(entry.labels)
    found = Found()
    names = _relative_names(list(dict.fromkeys(url for url, _ in labels)), base)
    there = {url: _is_file(url) for url in names}
    for (url, segment), rows in labels.items():
        name = names[url] + _part_name(segment)
        if there[url]:
            own = {"rows": rows} if len(rows) > 1 else next(iter(rows), None)
            found.sources.append(Source(name, url, labels=plain_labels(own) if own else None, segment=segment))
        else:
            found.missing[name] = "listed, but there is no such file"
    return found


def _part_name(segment: tuple[float, float | None] | None) -> str:
    if segment is None:
        return ""
    start, end = segment
    return f"#{start:g}-{'' if end is None else format(end, 'g')}"


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
    url = base.url(entry)
    if "\\" in entry and not _is_file(url):
        return base.url(entry.replace("\\", "/"))  # written on Windows
    return url


def _is_file(url: str) -> bool:
    """False, too, where it cannot be found out: one strange line does not refuse the others."""
    try:
        if not is_remote(url):
            return os.path.isfile(local_path(url))
        return ask(url, lambda files, path: files.isfile(path))
    except (OSError, ValueError, ImportError):
        return False


def _make_unique(found: Found) -> None:
    """Sort by id; of several with one id the first is kept and the others are told."""
    by_id: dict[str, Source] = {}
    for source in found.sources:
        if by_id.setdefault(source.id, source) is not source:
            found.refuse(f"{source.id} ({source.url})", "Missing", f"another video is called {source.id}; rename one")
    found.sources = [by_id[name] for name in sorted(by_id)]


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
