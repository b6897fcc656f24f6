"""Steps that go on where they were cut off."""

import json

from lab.reproduce.steps import drop_ended, rate_of


def test_a_checkpoint_of_the_last_step_is_no_place_to_go_on_from(tmp_path):
    for step in (2, 3):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 3}))
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir()  # half written
    drop_ended(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert rate_of(tmp_path) is None
    drop_ended(tmp_path / "none")
