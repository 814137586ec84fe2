"""The cache of compiled kernels: what is damaged, planted or another's is never loaded."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import needs_compiler

from capsrun import errors
from capsrun.models.fast import native, routing_cpu

pytestmark = needs_compiler


def load():
    """Kernels, taken from the cache or built, that work."""
    library = native.load_library(routing_cpu.SOURCE, "K=1", "J=1", "D=1")
    assert library.lanes() > 0


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The file of a library that was built before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        load()
        (file,) = native._cache_dir().iterdir()
    return file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "notices", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "capsrun"


@pytest.fixture
def kept(cache, built):
    """A copy of it in the cache."""
    cache.mkdir(mode=0o700)
    return Path(shutil.copy2(built, cache))


@pytest.mark.parametrize("damage", ["truncated", "empty", "another", "a bit", "no digest"])
def test_a_damaged_library_is_built_again(kept, damage):
    whole = kept.read_bytes()
    broken = {
        "truncated": whole[:3000],
        "empty": b"",
        "another": b"\x7fELF" + bytes(5000),
        "a bit": whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
        "no digest": whole[:-32],
    }
    kept.write_bytes(broken[damage])
    load()
    assert kept.read_bytes() == whole


def test_a_whole_one_is_taken_as_it_is(kept):
    written = kept.stat().st_mtime_ns
    load()
    assert kept.stat().st_mtime_ns == written


@pytest.mark.parametrize("mode", [0o666, 0o664])
def test_a_library_that_others_may_change_is_built_again(kept, mode):
    kept.chmod(mode)
    load()
    assert not kept.stat().st_mode & 0o022


def test_a_link_is_not_followed(kept, tmp_path):
    kept.rename(tmp_path / "elsewhere.so")
    kept.symlink_to(tmp_path / "elsewhere.so")
    load()
    assert not kept.is_symlink()


def test_nothing_is_kept_where_others_may_write(cache, capsys):
    cache.mkdir()
    cache.chmod(0o777)
    load()
    assert not list(cache.iterdir())
    assert "chmod go-w" in capsys.readouterr().err


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to others")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_belongs_to_somebody_else_is_not_loaded(cache, kept, what):
    os.chown(cache if what == "folder" else kept, 65534, 65534)
    before = kept.read_bytes()
    kept.write_bytes(b"")
    load()
    assert kept.read_bytes() == (b"" if what == "folder" else before)


def test_where_the_cache_cannot_be_written_nothing_is_left_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "notices", [])
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nope")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    load()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_a_compiler_that_cannot_be_read_is_said(cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "g++ '")
    assert native.load_library(routing_cpu.SOURCE) is None
    assert "could not be built with g++ ' (No closing quotation)" in capsys.readouterr().err
