"""Files that are replaced whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from atommem_env.paths import replacing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in ("old", "new"):
        with replacing(path) as temporary:
            temporary.write_text(content)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == content

    def fail(error: Exception) -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(OSError, match="No space") as caught:
        fail(OSError(errno.ENOSPC, "No space left on device"))
    assert caught.value.filename == str(path)
    with pytest.raises(KeyError):
        fail(KeyError())
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_that_does_not_exist_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "none" / "file") as temporary:
        temporary.write_text("text")
    assert caught.value.filename == str(tmp_path / "none" / "file")


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links and devices")
def test_a_link_stays_and_a_device_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"
    with replacing(Path(os.devnull)) as temporary:
        assert temporary == Path(os.devnull)
