"""What a report reads of a run."""

import pytest
from support.report_runs import save_run

from siftune.base.work_folder import record_text
from siftune.report.subjects import read_run


@pytest.mark.parametrize(
    ("record", "more"),
    [
        (record_text({}, {"seconds": 90}), 90),
        (record_text({}, {"seconds": "nan"}), 0),
        (record_text({}, {}), 0),
        (record_text({}, {"seconds": 90}).replace("90", "91"), 0),
        ("[]", 0),
    ],
)
def test_the_time_of_a_run_includes_that_of_sifting_its_pool(tmp_path, record, more):
    run = save_run(tmp_path / "run", steps=2)
    before = read_run(run, "run").figure("seconds")
    (run / "sift").mkdir()
    (run / "sift" / "sift.json").write_text(record)
    assert read_run(run, "run").figure("seconds") == before + more
