"""atomic_path: the whole new file or the untouched old one, never anything between."""

import errno
import os
from pathlib import Path

import pytest

from spt_fast.files import atomic_path, write_text


class Interruption(BaseException):
    """Like KeyboardInterrupt and SystemExit: not an Exception."""


def test_writes_what_was_written(tmp_path: Path) -> None:
    target = tmp_path / "data.bin"
    content = os.urandom(100_000)
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
        assert not target.exists()
    assert target.read_bytes() == content
    assert os.listdir(tmp_path) == ["data.bin"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, Interruption])
def test_an_error_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_path(tmp_path / "data.bin") as temporary:
        temporary.write_bytes(b"half of")
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "data.bin"
    target.write_bytes(b"old")
    before = target.stat()
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error
    assert target.read_bytes() == b"old"
    assert target.stat().st_ino == before.st_ino and target.stat().st_mode == before.st_mode
    assert os.listdir(tmp_path) == ["data.bin"]


def test_readers_see_the_old_file_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "data.txt"
    write_text(target, "old")
    with target.open() as open_before:
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            assert target.read_text() == "old"
        assert open_before.read() == "old"
    assert target.read_text() == "new"


def test_failing_to_replace_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(OSError), atomic_path(target) as temporary:
        temporary.write_text("cannot replace a folder")
    assert os.listdir(tmp_path) == ["taken"] and os.listdir(target) == ["inside"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0, 0o666)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "data.txt", "text")
        assert os.umask(umask) == umask  # atomic_path has to change it to read it; it must change it back
    finally:
        os.umask(before)
    assert (tmp_path / "data.txt").stat().st_mode & 0o777 == mode


def test_makes_missing_parents(tmp_path: Path) -> None:
    write_text(tmp_path / "some" / "deep" / "folder" / "data.txt", "text")
    assert (tmp_path / "some" / "deep" / "folder" / "data.txt").read_text() == "text"


def test_the_temporary_file_keeps_the_suffix_and_lies_beside(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "data.safetensors") as temporary:
        assert temporary.suffix == ".safetensors" and temporary.parent == tmp_path
        temporary.write_bytes(b"")


def test_takes_strings_and_files_without_suffix(tmp_path: Path) -> None:
    write_text(str(tmp_path / "Makefile"), "all:\n")
    assert (tmp_path / "Makefile").read_text() == "all:\n"


def test_write_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "data.txt", "μ ± σ, naïve, 猫\n")
    assert (tmp_path / "data.txt").read_bytes() == "μ ± σ, naïve, 猫\n".encode()


def test_an_error_of_the_disk_names_the_file_that_was_to_be(tmp_path: Path) -> None:
    """A write that fails names no file, or the temporary one, which is gone before anybody can look."""
    target = tmp_path / "data.bin"
    for arguments in ((), (None,)):
        with pytest.raises(OSError, match="No space left") as caught, atomic_path(target) as temporary:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *arguments)
        assert caught.value.filename == str(target)
    with pytest.raises(FileNotFoundError) as missing, atomic_path(target) as temporary:
        temporary.unlink()
        temporary.read_bytes()
    assert missing.value.filename == str(target)
    with pytest.raises(FileNotFoundError) as other, atomic_path(target):
        (tmp_path / "nowhere").read_bytes()
    assert other.value.filename == str(tmp_path / "nowhere")
    assert os.listdir(tmp_path) == []
