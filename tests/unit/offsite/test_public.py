"""The public names of `siftune.offsite`."""

import inspect


def test_audit_stays_a_function():
    """A package `audit` would take the place of the function once it is imported; `audits` does not."""
    import siftune.offsite.audits.audit
    from siftune.offsite import audit

    assert inspect.isfunction(audit)
    assert audit is siftune.offsite.audits.audit.audit
