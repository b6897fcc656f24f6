"""`siftune rows` writes a file, and nothing in the place of a folder; tests/unit/suspects has what it finds."""

from support.commands import error_of


def test_a_folder_is_never_replaced(tmp_path, capsys):
    kept = tmp_path / "kept" / "file"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert error_of(capsys, "rows", tmp_path, "--csv", kept.parent).startswith(f"--csv {kept.parent} is a folder")
    assert kept.read_text() == "mine"
