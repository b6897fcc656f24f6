"""Plans of a middle: sizes and shares."""

import pytest
from support.emulators import FAMILIES, base, calibration, settings

from siftune.base.errors import RecipeError
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.plan import keep_for_size
from siftune.offsite.emulator.split import Split


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_is_met(family):
    model = base(family)
    whole, half = (keep_size(model, keep) for keep in (1.0, 0.5))
    target = (whole + half) / 2
    keep = keep_for_size(model, Split(1, 1), target, 8)
    assert half < keep_size(model, keep) <= target * 1.02


def keep_size(model, keep):
    (parts,) = emulators(model, calibration(model), [settings(keep=keep)])
    return sum(t.numel() * t.element_size() for t in parts.frozen.values())


def test_a_size_out_of_range_names_the_range():
    with pytest.raises(RecipeError, match="give a size between"):
        keep_for_size(base(), Split(1, 1), 10, 8)
    with pytest.raises(RecipeError, match="give a size between"):
        keep_for_size(base(), Split(1, 1), 1e9, 8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keep_attn": 0.0}, r"keep_attn is 0\.0"),
        ({"keep_mlp": 1.5}, r"keep_mlp is 1\.5"),
        ({"keep_attn": 1.0, "keep_mlp": 1.0}, "both 1"),
        ({"keep_mlp": 0.5, "method": "layerdrop"}, "keep_mlp says what stays"),
        ({"keep_attn": 0.5, "allot": "measured"}, "keep_attn says what stays"),
        ({"keep_attn": 0.5, "keep": 1.0}, "a keep of 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(values, words):
    with pytest.raises(RecipeError, match=words):
        settings(**values).check()
    settings(keep_attn=1.0, keep_mlp=0.5).check()
