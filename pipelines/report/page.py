"""One self-contained HTML page: headings, tables, pictures and charts."""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --back: #fcfcfd; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #b0b4ba; --line: #363a3f; --back: #111113; --card: #18191b; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
  max-width: 1080px; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 8px; }
p.lead, figcaption, .note { color: var(--soft); }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.numbers div { border: 1px solid var(--line); background: var(--card); border-radius: 8px; padding: 10px 16px; }
.numbers b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.numbers span { color: var(--soft); font-size: 13px; }
.row { display: flex; flex-wrap: wrap; gap: 12px; } figure { margin: 0; max-width: 100%; }
figure img, figure video { display: block; max-width: 100%; border-radius: 6px; }
figcaption { font-size: 13px; margin-top: 4px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.n { text-align: right; }
pre { border: 1px solid var(--line); background: var(--card); border-radius: 6px; padding: 10px; overflow-x: auto; }
"""


class Page:
    """Collects parts in order; `write` makes the file.

    All text is escaped; pictures are embedded, so the file can be sent on by itself.
    """

    def __init__(self, title: str, lead: str = ""):
        self.title = title
        self._media: list[tuple[str, bytes]] = []
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{html.escape(lead)}</p>')

    def section(self, title: str, text: str = "") -> None:
        """Start a section, with an optional paragraph."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Commands or source, as typed."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def numbers(self, values: Mapping[str, Any]) -> None:
        """A row of cards: label and figure."""
        cards = (f"<div><b>{html.escape(_show(v))}</b><span>{html.escape(k)}</span></div>" for k, v in values.items())
        self._parts.append(f'<div class="numbers">{"".join(cards)}</div>')

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
        """A table with one line per mapping."""
        if not rows:
            self._parts.append('<p class="note">none</p>')
            return
        columns = list(columns or rows[0])
        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = []
        for row in rows:
            cells = (
                f"<td{' class=n' if isinstance(row.get(c), int | float) else ''}>{html.escape(_show(row.get(c)))}</td>"
                for c in columns
            )
            body.append(f"<tr>{''.join(cells)}</tr>")
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>')

    def pictures(self, items: Sequence[tuple[np.ndarray, str]], width: int = 0) -> None:
        """A row of pictures, uint8 [H, W, 3] with captions; `width` is the shown width in pixels, 0 the picture's."""
        figures = []
        for picture, caption in items:
            size = f' style="width:{width}px"' if width else ""
            source = self._embedded(_png(picture), "image/png", caption)
            figures.append(
                f'<figure><img{size} src="{source}" alt="{html.escape(caption)}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        self._parts.append(f'<div class="row">{"".join(figures)}</div>')

    def film(self, mp4: bytes, caption: str, width: int = 0) -> None:
        """A film that plays in a loop, without sound; `width` as in `pictures`."""
        size = f' style="width:{width}px"' if width else ""
        source = self._embedded(mp4, "video/mp4", caption)
        self._parts.append(
            f'<figure><video{size} src="{source}" autoplay loop muted playsinline controls></video>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def line_chart(self, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> None:
        """Curves {name: (x values, y values)}."""
        figure, axes = _axes(x, y)
        for name, (xs, ys) in series.items():
            axes.plot(xs, ys, label=name, linewidth=1.4)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
        self._chart(figure)

    def histogram(self, values: Sequence[float], x: str, bins: int = 40) -> None:
        """How often each value of a column occurs; non-finite ones are left out."""
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        figure, axes = _axes(x, "count")
        if finite.size:
            axes.hist(finite, bins=bins, color="#3e63dd")
        self._chart(figure)

    def _chart(self, figure: Any) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight")
        svg = buffer.getvalue().decode()
        self._parts.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")

    def _embedded(self, data: bytes, kind: str, caption: str) -> str:
        name = re.sub(r"[^a-z0-9.]+", "_", caption.lower()).strip("_.")[:80] or "picture"
        self._media.append((f"{len(self._media):03d}_{name}.{kind.rpartition('/')[2]}", data))
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

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
        head = (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style>"
        )
        temporary = target.with_suffix(".tmp")
        try:
            temporary.write_text(head + "\n".join(self._parts) + "</html>\n", encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return target


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:.4g}"


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="png")
    return buffer.getvalue()


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
