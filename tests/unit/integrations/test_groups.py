"""What a tool's YAML says becomes callbacks, or a sentence on what is wrong."""

import pytest

from siftune import GAST, IST, RST, LabelLogits
from siftune.base.errors import RecipeError
from siftune.integrations.groups import callbacks, keys
from siftune.methods import all_parts


def test_groups_become_callbacks_with_their_settings():
    made = callbacks({"gast": {"select": 0.5, "seed": 7}, "ist": {}, "label_logits": True, "seed": 3, "lora_r": 8})
    assert [type(each) for each in made] == [IST, GAST, LabelLogits]
    assert (made[0].seed, made[1].seed, made[1].select) == (3, 7, 0.5)
    assert made[0].to_dict() == IST().to_dict()
    assert [type(each) for each in callbacks({"label_logits": True, "gast": None})] == [LabelLogits]
    assert repr(callbacks({"rst": {"active": 0.5}})) == repr([RST(active=0.5)])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lora_r": 8, "label_logits": False}, r"^there is nothing for siftune to do"),
        ({"gast": {"selct": 0.5}}, "^gast has no setting 'selct': did you mean 'select'"),
        ({"gast": {"support_set": "rows.jsonl"}}, "^gast has no setting 'support_set'"),
        ({"gast": 0.75}, "^gast is 0.75"),
        ({"ist": {"active": 2.0}}, "^ist.active is 2.0"),
        ({"label_logits": "yes"}, "^label_logits is 'yes'"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(given, sentence):
    with pytest.raises(RecipeError, match=sentence):
        callbacks(given)


def test_the_keys_are_the_groups_of_all_methods():
    assert keys() == [*(part.settings.group for part in all_parts()), "label_logits"]
    assert {"gast", "ist", "rst"} < set(keys())
    for part in all_parts():
        (made,) = callbacks({part.settings.group: part.settings().to_dict()})
        assert made.to_dict() == part.settings().to_dict()
