"""One self-contained HTML page: headings, tables, pictures, films and charts; its looks lie in templates/."""

from __future__ import annotations

import base64
import functools
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"
LOG_AXIS_FROM = 30.0
"""A histogram gets a logarithmic axis where its 99th percentile is so many times the median: else it is one bar."""


class Page:
    """Collects blocks in order; `write` makes the file.

    All text is escaped; pictures are embedded, so the file can be sent on by itself.
    """

    def __init__(self, title: str, lead: str = "", live: str = ""):
        """Args: live, what the program is doing at the moment: a served page then reads itself again."""
        self.title, self.lead, self.live = title, lead, live
        self._media: list[tuple[str, bytes]] = []
        self._sections: list[dict[str, Any]] = [{"title": "", "id": "", "blocks": []}]

    def extend(self, other: Page) -> None:
        """Add another page's sections and media at the end."""
        self._sections += [part for part in other._sections if part["title"] or part["blocks"]]
        self._media += other._media

    def section(self, title: str, text: str = "", warning: bool = False) -> None:
        """Start a section, with an optional paragraph; it is listed in the contents."""
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        self._sections.append({"title": title, "id": name, "warning": warning, "blocks": []})
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add("text", text=text)

    def code(self, text: str) -> None:
        """Commands or source, as typed."""
        self._add("code", text=text)

    def link(self, href: str, text: str) -> None:
        """A link on a line of its own; only http(s) addresses and files."""
        if re.match(r"(https?|file)://", href):
            self._add("link", href=href, text=text)
        else:
            self.text(text)

    def numbers(self, values: Mapping[str, Any]) -> None:
        """A row of cards: label and figure."""
        self._add("numbers", items=[(label, _show(value)) for label, value in values.items()])

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
        """A table with one line per mapping."""
        columns = list(columns or (rows[0] if rows else ()))
        cells = [
            [{"text": _show(row.get(c)), "number": isinstance(row.get(c), int | float)} for c in columns]
            for row in rows
        ]
        self._add("table", columns=columns, rows=cells)

    def pictures(self, items: Sequence[tuple[np.ndarray, str]], width: int = 0) -> None:
        """A row of pictures, uint8 [H, W, 3] with captions; `width` is the shown width in pixels, 0 the picture's."""
        shown = [
            {"source": self._embedded(_png(picture), "image/png", caption), "caption": caption, "width": width}
            for picture, caption in items
        ]
        self._add("pictures", items=shown)

    def times(self, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Sequence[np.ndarray]]]]) -> None:
        """Pictures over time with one slider: each row is a caption and, for every column, its pictures in order."""
        shown = [
            {"caption": caption, "cells": [[_data(_jpeg(picture), "image/jpeg") for picture in cell] for cell in cells]}
            for caption, cells in rows
        ]
        for caption, cells in rows:
            self._media += [
                (self._file_name(f"{caption}_{column}", "png"), _png(cell[len(cell) // 2]))
                for column, cell in zip(columns, cells, strict=True)
            ]
        frames = max((len(cell) for _, cells in rows for cell in cells), default=1)
        self._add("times", columns=list(columns), rows=shown, frames=frames)

    def patches(self, pictures: Sequence[tuple[np.ndarray, str]], features: np.ndarray) -> None:
        """Pictures whose patches can be clicked: the nearest ones in all of them light up.

        Args: features, float [number of pictures, rows, columns, width], of each picture's patches.
        """
        unit = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
        bytes_ = np.clip(np.round(unit * 127), -127, 127).astype(np.int8)
        _, rows, columns, width = features.shape
        items = [{"source": self._embedded(_png(p), "image/png", c), "caption": c} for p, c in pictures]
        packed = base64.b64encode(bytes_.tobytes()).decode()
        self._add("patches", pictures=items, grid=f"{rows},{columns}", width=width, features=packed)

    def film(self, mp4: bytes, caption: str, width: int = 0) -> None:
        """A film that plays in a loop, without sound; `width` as in `pictures`."""
        self._add("film", source=self._embedded(mp4, "video/mp4", caption), caption=caption, width=width)

    def films(self, items: Sequence[tuple[str, str]], width: int = 0) -> None:
        """A row of films that lie beside the page, as (relative path, caption); `width` as in `pictures`."""
        shown = [{"source": source, "caption": caption, "width": width} for source, caption in items]
        self._add("films", items=shown)

    def line_chart(
        self,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        x: str,
        y: str,
        doubling: bool = False,
        reference: str = "",
    ) -> None:
        """Curves {name: (x values, y values)}.

        Args: doubling, axes on which a doubling is a fixed step, with a mark at every value; reference, name of a
            curve that others are compared with, which is dashed.
        """
        figure, axes = _axes(x, y)
        for name, (xs, ys) in series.items():
            style: dict[str, Any] = {"linestyle": "--", "color": "#888888"} if name == reference else {}
            axes.plot(xs, ys, label=name, linewidth=1.4, marker="." if doubling and not style else "", **style)
        if doubling:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
        self._chart(figure)

    def histogram(self, values: Sequence[float], x: str, bins: int = 40) -> None:
        """How often each value of a column occurs; non-finite ones are left out, equal ones said in a sentence."""
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        if finite.size and finite.min() == finite.max():
            self.text(f"{x}: {_show(float(finite[0]))} for all {finite.size:,}.")
            return
        figure, axes = _axes(x, "count")
        positive = finite[finite > 0]
        skewed = positive.size > 0.5 * finite.size and np.quantile(positive, 0.99) > LOG_AXIS_FROM * np.median(positive)
        if skewed:
            low = max(positive.min(), positive.max() * 1e-6)
            axes.hist(np.maximum(finite, low), bins=np.geomspace(low, positive.max() * 1.0001, bins), color="#3e63dd")
            axes.set_xscale("log")
        elif finite.size:
            axes.hist(finite, bins=bins, color="#3e63dd")
        self._chart(figure)

    def _add(self, kind: str, **content: Any) -> None:
        self._sections[-1]["blocks"].append({"kind": kind, **content})

    def _chart(self, figure: Any) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight")
        svg = buffer.getvalue().decode()
        self._add("chart", svg=svg[svg.index("<svg") :])

    def _file_name(self, caption: str, suffix: str) -> str:
        name = re.sub(r"[^a-z0-9.]+", "_", caption.lower()).strip("_.")[:80] or "picture"
        return f"{len(self._media):03d}_{name}.{suffix}"

    def _embedded(self, data: bytes, kind: str, caption: str) -> str:
        self._media.append((self._file_name(caption, kind.rpartition("/")[2]), data))
        return _data(data, kind)

    def write_media(self, folder: str | os.PathLike[str]) -> int:
        """Every picture (PNG) and film (mp4) of the page as a file, named by place and caption; returns how many."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, data in self._media:
            temporary = target / f".{name}.partial"
            temporary.write_bytes(data)
            os.replace(temporary, target / name)
        return len(self._media)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page (to a temporary file first) and return its absolute path."""
        target = Path(path).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        text = _template().render(
            title=self.title,
            lead=self.lead,
            live=self.live,
            sections=[part for part in self._sections if part["title"] or part["blocks"]],
            style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
            script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        )
        temporary = target.with_suffix(".tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return target


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "page.html"
    )


def _show(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:.4g}"


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="png")
    return buffer.getvalue()


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="jpeg", quality=85, subsampling=0)
    return buffer.getvalue()


def _data(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.6))
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.set_xlabel(x, fontsize=9, color="#80838d")
    axes.set_ylabel(y, fontsize=9, color="#80838d")
    axes.tick_params(labelsize=8, colors="#80838d")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#b0b4ba")
    axes.grid(alpha=0.25)
    return figure, axes
