"""Lists and manifests as people have them: lines of paths, `path label`, CSV with or without header, JSON lines.

What a file is like is found out by looking: a header that names a path column, else the separator and the column
under which files are found.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from kinema.pipelines.artifacts import read_parquet
from kinema.pipelines.shard.labels import plain_labels

PATH_COLUMNS = ("path", "video", "file", "filename", "file_name", "filepath", "video_path", "url", "video_url")
START_COLUMNS = ("start", "start_time", "start_s", "start_sec")
END_COLUMNS = ("end", "end_time", "end_s", "end_sec")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_TRIED = 50  # lines that are looked at to find out what a list is like
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Entry:
    """One line."""

    path: str
    """As it is written."""
    labels: dict[str, Any]
    """What else the line says."""
    segment: tuple[float, float | None] | None = None
    """Start and end in seconds, where the line cuts a part out."""


@dataclass
class Listing:
    """A list that was read."""

    entries: list[Entry]
    form: str
    """How it was read, for people."""
    first_line: str = ""
    """As it stands in the file."""
    bad: dict[str, str] = field(default_factory=dict)
    """Name of a line that cannot be used -> why."""


def read_listing(data: bytes, name: str, extension: str, is_list: bool, exists: Callable[[str], bool]) -> Listing:
    """Read a list or manifest.

    Args:
        data: the file's bytes.
        name: of the file, for messages.
        extension: of the file.
        is_list: whether a whole line is the first guess (.txt) rather than columns.
        exists: whether a path as written is that of a file.

    Raises: ValueError when no column is one of paths.
    """
    if extension == "parquet":
        try:
            rows = [plain_labels(row) for row in read_parquet(data).to_pylist()]
        except pa.ArrowInvalid as error:
            raise ValueError(f"manifest {name} cannot be read: {error}") from None
        return _with_header(rows, list(rows[0]) if rows else [], name, "Parquet")
    lines = [line for line in decode_text(data).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    first = lines[0] if lines else ""
    if extension in ("jsonl", "ndjson", "json") or first.lstrip().startswith(("{", "[{")):
        return _from_json(lines, name, exists)
    text = "\n".join(lines)
    for separator, called in _SEPARATORS.items():
        columns = _split(first, separator)
        if _named(columns, PATH_COLUMNS) is not None and (len(columns) > 1 or not is_list):
            rows = _dict_rows(text, separator)
            return _with_header(rows, columns, name, f"CSV with a header and {called}", first)
    if is_list:
        return _from_lines(lines, exists)
    return _without_known_header(lines, text, name, exists)


def decode_text(data: bytes) -> str:
    """Text in UTF-8 or UTF-16 with a mark, else Latin-1."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _split(line: str, separator: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]


def _dict_rows(text: str, separator: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    return [{k.strip(): v for k, v in row.items() if k is not None} for row in reader]


def _named(columns: list[str], names: tuple[str, ...]) -> str | None:
    by_name = {column.lower().strip(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _with_header(
    rows: list[dict[str, Any]], columns: list[str], name: str, form: str, first: str = "", path: str | None = None
) -> Listing:
    path = path or _named(columns, PATH_COLUMNS)
    if path is None:
        raise ValueError(
            f"manifest {name} has no path column (its columns: {', '.join(columns) or 'none'}); "
            f"name one of {', '.join(PATH_COLUMNS)}"
        )
    start, end = _named(columns, START_COLUMNS), _named(columns, END_COLUMNS)
    listing = Listing([], f"{form}, paths in column {path}", first or str(rows[0] if rows else ""))
    for number, row in enumerate(rows, start=1):
        value = str(row.get(path) or "").strip()
        if not value:
            continue
        labels = {k: v for k, v in row.items() if k != path and v not in (None, "")}
        try:
            segment = _segment(labels, start, end)
        except ValueError as error:
            listing.bad[f"{value} (row {number})"] = str(error)
            continue
        listing.entries.append(Entry(value, labels, segment))
    return listing


def _segment(labels: dict[str, Any], start: str | None, end: str | None) -> tuple[float, float | None] | None:
    """Takes both columns out of the labels. Raises: ValueError for what is no time."""
    if start is None and end is None:
        return None
    first = seconds(labels.pop(start, None)) if start else None
    last = seconds(labels.pop(end, None)) if end else None
    if first is None and last is None:
        return None
    if last is not None and last <= (first or 0.0):
        raise ValueError(f"its end, {last:g} s, does not lie behind its start, {first or 0.0:g} s")
    return first or 0.0, last


def seconds(value: Any) -> float | None:
    """Seconds or `[hours:]minutes:seconds` as seconds; None for nothing. Raises: ValueError."""
    if value is None or value == "":
        return None
    text = str(value).strip().replace(",", ".")
    clock = _CLOCK.fullmatch(text)
    if clock:
        hours, minutes, rest = clock.groups()
        return 3600 * int(hours or 0) + 60 * int(minutes) + float(rest)
    try:
        found = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no time; write seconds or [hours:]minutes:seconds") from None
    if not 0 <= found < float("inf"):
        raise ValueError(f"{text!r} is no time inside of a video")
    return found


def _from_json(lines: list[str], name: str, exists: Callable[[str], bool]) -> Listing:
    text = "\n".join(lines)
    bad: dict[str, str] = {}
    try:
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else _rows_of(whole, exists)
    except ValueError:
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                bad[f"{name.rpartition('/')[2]}: line {number}"] = f"is no JSON: {error}"
    rows = [plain_labels(row) for row in rows if isinstance(row, dict)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    listing = _with_header(rows, columns, name, "JSON lines", lines[0] if lines else "")
    listing.bad |= bad
    return listing


def _rows_of(whole: Any, exists: Callable[[str], bool]) -> list[Any]:
    """Rows of one object: itself, a list it holds that has a path column, or `{path: labels}`."""
    if not isinstance(whole, dict) or _named(list(whole), PATH_COLUMNS) is not None:
        return [whole]
    for value in whole.values():
        if isinstance(value, list) and value and isinstance(value[0], dict) and _named(list(value[0]), PATH_COLUMNS):
            return value
    if not any(exists(path) for path in whole):
        return [whole]
    return [
        {PATH_COLUMNS[0]: path, **(value if isinstance(value, dict) else {"label": value})}
        for path, value in whole.items()
    ]


def _from_lines(lines: list[str], exists: Callable[[str], bool]) -> Listing:
    """A path on each line, with labels behind it where only that names a file; separated as most lines are."""
    concat = [line for line in lines if line.lstrip().startswith("file ")]
    if concat and not any(exists(line.strip()) for line in concat):  # FFmpeg's lists: `file 'path'`, directives
        lines = [line.lstrip().removeprefix("file ") for line in concat]
    cuts = [_cut_line(line.strip(), exists) for line in lines]
    known = [cut for cut in cuts if cut is not None]
    lengths = Counter(len(extra) for _, extra in known)
    usual = lengths.most_common(1)[0][0] if lengths else 0
    entries = []
    for line, cut in zip(lines, cuts, strict=True):
        path, extra = cut or _without_last(line.strip(), usual)
        entries.append(Entry(path, _as_labels(extra)))
    form = "lines of `path label`" if usual else "lines of paths"
    return Listing(entries, form, lines[0] if lines else "")


def _cut_line(line: str, exists: Callable[[str], bool]) -> tuple[str, list[str]] | None:
    """(path, what follows it) if there is such a file."""
    if exists(_unquoted(line)):
        return _unquoted(line), []
    for separator in (*_SEPARATORS, None):
        parts = line.split(separator)
        for count in range(1, min(len(parts), 12)):
            path, extra = _without_last(line, count, separator)
            if exists(path):
                return path, extra
    return None


def _without_last(line: str, count: int, separator: str | None = None) -> tuple[str, list[str]]:
    parts = line.rsplit(separator, count) if count else [line]
    return _unquoted(parts[0].strip()), [part.strip() for part in parts[1:]]


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _as_labels(extra: list[str]) -> dict[str, Any]:
    values = [_number(_unquoted(text)) for text in extra if text]
    return {"label": values[0] if len(values) == 1 else values} if values else {}


def _number(text: str) -> int | float | str:
    if re.fullmatch(r"[-+]?\d{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[-+]?\d*\.\d+(e[-+]?\d+)?", text) else text


def _without_known_header(lines: list[str], text: str, name: str, exists: Callable[[str], bool]) -> Listing:
    """CSV whose path column is found by looking for files; lines of `path label` where that finds more."""
    first = lines[0] if lines else ""
    best: tuple[int, str, int] = (0, ",", 0)
    for separator in _SEPARATORS:
        table = [row for row in csv.reader(lines[:_TRIED], delimiter=separator) if row]
        for column in range(max((len(row) for row in table), default=0)):
            hits = sum(len(row) > column and exists(row[column].strip()) for row in table)
            if hits > best[0]:
                best = hits, separator, column
    hits, separator, column = best
    spaced = _from_lines(lines, exists)
    if sum(exists(entry.path) for entry in spaced.entries[:_TRIED]) > hits:
        return spaced
    if not hits:
        columns = _split(first, ",") if first else []
        shown = ", ".join(columns) or "none"
        raise ValueError(
            f"manifest {name} has no path column (its columns: {shown}), and read without a header none of its files "
            f"exists; first line: {first[:200]!r}; name one of {', '.join(PATH_COLUMNS)}, or set root="
        )
    head = _split(first, separator)
    form = f"CSV with {_SEPARATORS[separator]}"
    if not exists(head[column]) and "." not in head[column]:
        return _with_header(_dict_rows(text, separator), head, name, f"{form} and a header", first, head[column])
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator) if len(row) > column]
    entries = [
        Entry(row[column], _as_labels([cell for i, cell in enumerate(row) if i != column]))
        for row in rows
        if row[column]
    ]
    return Listing(entries, f"{form} and no header, paths in column {column + 1}", first)
