"""The page's words on attacks: every figure with its interval, and what is said of it, high, at chance, or unsure."""

import pytest

from siftune.evaluate.bootstrap import Estimate
from siftune.offsite.audits.membership import Attack, Membership
from siftune.offsite.audits.result import RecoveryPoint
from siftune.offsite.report.audit import (
    membership_section,
    recovery_section,
)


def attack(auc, others=200):
    return Attack(
        Estimate(auc, auc - 0.08, min(1.0, auc + 0.08)), Estimate(0.02, 0, 0.1), Estimate(0.3, 0.2, 0.4), 40, others
    )


def cells(text, first):
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_membership_with_shadow_models():
    found = Membership(attack(0.55), attack(0.56), attack(0.5), 40, 200, 3, attack(0.9), 16)
    text = membership_section(found)
    assert cells(text, "LiRA, online") == ["0.900 [0.820, 0.980]", "2.0 % [0.0, 10.0]", "30.0 % [20.0, 40.0]"]
    assert "16 shadow models" in text
    assert "Training rows can be distinguished from others: LiRA, online, with an AUC of 0.900 [0.820, 0.980]" in text
    assert "too few" not in text


def test_at_chance_nothing_is_promised():
    text = membership_section(Membership(attack(0.53), attack(0.54), attack(0.5), 40, 200), "emulator")
    assert "None of these attacks distinguished training rows from others beyond chance" in text
    assert "says nothing of attacks that were not tried" in text
    assert cells(text, "blind: the emulator's loss alone")[0] == "0.500 [0.420, 0.580]"


@pytest.mark.parametrize("auc", [0.2, 0.8])
def test_sources_that_differ_are_warned_of(auc):
    text = membership_section(Membership(attack(0.8), attack(0.5), attack(auc), 40, 200))
    assert "**Members and others differ by source**" in text


def test_what_few_others_do_not_resolve():
    text = membership_section(Membership(*(attack(0.6, 50),) * 3, 40, 50))
    assert "50 others are too few to resolve 1 % false alarms" in text
    assert "(too few others)" in cells(text, "by loss")[1]
    assert "(too few others)" not in cells(text, "by loss")[2]


def test_recovery_by_rate():
    def point(lr, tokens, nll):
        return RecoveryPoint(lr, tokens, Estimate(nll, nll - 0.1, nll + 0.1), Estimate(3 - nll, 0.1, 0.9))

    points = (point(1e-3, 1000, 2.4), point(1e-3, 2000, 2.2), point(1e-4, 2000, 2.9), point(1e-4, 1000, 2.95))
    text = recovery_section(points)
    assert cells(text, "0.001") == ["1,000", "2.400 [2.300, 2.500]", "0.600 [0.100, 0.900]"]
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:6]] == ["0.0001"] * 2 + ["0.001"] * 2
    assert "learning rate of 0.001 after 2,000 tokens. It was still falling at the end" in text
    assert "Longer was no better" in recovery_section((point(1e-3, 1000, 2.0), point(1e-3, 2000, 2.1)))
