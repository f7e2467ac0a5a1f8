"""Frames whose side data was looked at go when the last name for them goes."""

import gc
import sys
from pathlib import Path

import av
import pytest
from av.sidedata.sidedata import Type

from kinema.pipelines.video.orient import orientation_of
from kinema.pipelines.video.side_data import side_data

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import numbered, set_display_matrix


@pytest.mark.parametrize("look", [orientation_of, side_data])
def test_looking_keeps_no_frame_alive(tmp_path, look):
    path = set_display_matrix(numbered(tmp_path / "a.mp4", 3), (0, 1, -1, 0))
    gc.disable()
    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            assert [data.type for data in side_data(frame)][0] == Type.DISPLAYMATRIX
            assert orientation_of(frame).quarter_turns == 3
            look(frame)
            references = sys.getrefcount(frame)
            assert references == 2, "this name and the call's"
    finally:
        gc.enable()
