"""`siftune rows` writes files, and nothing in the place of a folder; what it finds is tested in tests/unit/rows."""

import pytest
from support.commands import error_of


@pytest.mark.parametrize("flag", ["--csv", "--html"])
def test_a_folder_is_never_replaced(tmp_path, capsys, flag):
    kept = tmp_path / "kept" / "file"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert error_of(capsys, "rows", tmp_path, flag, kept.parent).startswith(f"{flag} {kept.parent} is a folder")
    assert kept.read_text() == "mine"
