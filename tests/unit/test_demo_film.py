"""The film of the demo: made from the small one without an encoder, the same everywhere, and a valid MP4."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest

from distributor_node.services.demo.manifest import DEMO_DIRECTORY
from distributor_node.services.demo_run.__main__ import make_film


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    name = "make_film"
    described = importlib.util.spec_from_file_location(name, DEMO_DIRECTORY / "make_film.py")
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module
    described.loader.exec_module(module)
    return module


def tracks(maker: ModuleType, data: bytes) -> list[object]:
    (film,) = [box for _, box in maker.parse(data, 0, len(data)) if box.kind == b"moov"]
    return [box for box in film.children if box.kind == b"trak"]


def test_it_has_the_first_minute_of_the_small_film(maker: ModuleType) -> None:
    small = maker.SOURCE.read_bytes()
    film = maker.make_film(small)
    assert len(film) == maker.SIZE == 40 * 1024 * 1024
    assert [box.kind for _, box in maker.parse(film, 0, len(film))] == [b"ftyp", b"moov", b"mdat"]
    assert len(tracks(maker, film)) == len(tracks(maker, small)) == 2
    for made, given in zip(tracks(maker, film), tracks(maker, small), strict=True):
        before, after = maker.samples_of(given, small), maker.samples_of(made, film)
        assert after == before[: len(after)]
        assert any(sample.is_key for sample in after[1:])
        (units,) = struct.unpack_from(">I", made.child(b"mdia", b"mdhd").payload, 12)  # type: ignore[attr-defined]
        assert 60 <= sum(sample.duration for sample in after) / units < 60.1
    # Spread evenly: the bytes of a second are where the film is at that second.
    video = tracks(maker, film)[0]
    offsets = [at for (at,) in maker.numbers(video.child(b"mdia", b"minf", b"stbl", b"stco"), 4)]  # type: ignore[attr-defined]
    assert len(offsets) == 60
    assert all(abs(at / len(film) - second / 60) < 0.01 for second, at in enumerate(offsets))


def test_a_file_that_is_no_such_film_is_refused(maker: ModuleType) -> None:
    with pytest.raises(ValueError, match="expected a size of 8 to 12, got 99"):
        maker.make_film(struct.pack(">I4sI", 99, b"ftyp", 0))


def test_it_is_made_at_the_first_start_and_kept(tmp_path: Path) -> None:
    film = make_film(tmp_path / "film")
    (path,) = (tmp_path / "film").iterdir()
    assert (film.object_id, film.media_type, film.size) == ("10", "video/mp4", path.stat().st_size)
    before = path.stat().st_mtime_ns
    assert make_film(tmp_path / "film").size == film.size
    assert path.stat().st_mtime_ns == before
