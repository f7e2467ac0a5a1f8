"""The page that people look at."""

import base64
import io
import re

import numpy as np
from PIL import Image

from kinema.pipelines.report import Page


def test_page_holds_its_pictures_and_escapes_text(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    page = Page("<b>title</b>", "lead & more")
    page.section("Section")
    page.pictures([(picture, 'a "caption"')])
    page.table([{"source": "<script>.mp4", "count": 12345, "share": 0.123456}])
    page.table([])
    page.line_chart({"loss": ([0, 1, 2], [3.0, 2.0, 1.0])}, "step", "loss")
    page.histogram([1.0, 2.0, float("nan")], "motion")
    path = page.write(tmp_path / "sub" / "page.html")
    text = path.read_text()
    assert "<script>" not in text and "&lt;script&gt;.mp4" in text
    assert "12,345" in text and "0.1235" in text and "none" in text
    assert text.count("<svg") == 2
    shown = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown))), picture)
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert not list(path.parent.glob("*.tmp"))
