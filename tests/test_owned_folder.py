"""Folders in a shared temporary directory: this user's alone, or refused."""

import os
from pathlib import Path

import pytest

from beam_gemma.errors import StorageError
from beam_gemma.storage import owned_folder


def test_a_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = owned_folder(tmp_path / "own")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert owned_folder(str(folder)) == folder


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o755, 0o701])
def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(StorageError, match=r"with mode 700, got drwx.* of user .*; remove it"):
        owned_folder(tmp_path / "open")


def test_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch(mode=0o700)
    for name in ("link", "dangling", "file"):
        with pytest.raises(StorageError, match=f"{name}: expected a folder of user"):
            owned_folder(tmp_path / name)
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = owned_folder(tmp_path / "own")
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(StorageError, match=f"of user {folder.stat().st_uid}; remove it"):
        owned_folder(folder)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="expected to create a folder, got FileNotFoundError"):
        owned_folder(tmp_path / "missing" / "own")
