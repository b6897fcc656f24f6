"""Ways to spread a model that hold a part of the adapters, or of a layer, on each rank are refused by name."""

import pytest
from accelerate import ParallelismConfig
from support.trainers import adapted, arguments, train
from transformers.distributed import DistributedConfig

from siftune import GAST, IST
from siftune.errors import UnsupportedError
from siftune.methods.spread import refuse_launched, refuse_wrappers


@pytest.mark.parametrize("method", [IST, GAST])
def test_what_accelerates_config_turns_on(tmp_path, monkeypatch, method):
    settings, model = arguments(tmp_path), adapted()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    refuse_wrappers(settings, model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UnsupportedError, match=r"has fsdp on.*siftune\.shard_base\(model\).*--sharding fsdp"):
        method().on_train_begin(settings, None, None, model=model)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_the_command_line_goes_by_neither(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(UnsupportedError, match=rf"has {name} on.*--sharding fsdp"):
        refuse_launched()


SPLITS = [
    ({"tp_size": 2}, "a tensor-parallel plan"),
    ({"pp_size": 4}, "a pipeline"),
    ({"tp_size": 2, "ep_size": 2}, "a tensor-parallel plan"),
]


@pytest.mark.parametrize(("sizes", "what"), SPLITS)
@pytest.mark.parametrize("plain", [True, False])
def test_plans_that_the_model_was_loaded_by(tmp_path, sizes, what, plain):
    model = adapted()
    plan = DistributedConfig(**sizes)
    model.config.distributed_config = plan.to_dict() if plain else plan
    name, size = next(iter(sizes.items()))
    with pytest.raises(UnsupportedError, match=rf"split by {what} \({name} {size}\)"):
        train(tmp_path, IST(), model=model)


def test_a_plan_of_accelerates(tmp_path):
    plan = ParallelismConfig(tp_size=2)
    with pytest.raises(UnsupportedError, match=r"a tensor-parallel plan \(tp_size 2\)"):
        refuse_wrappers(arguments(tmp_path), adapted(), plan)


def test_weights_that_transformers_has_divided_for_data_parallel_training_are_none(tmp_path):
    model = adapted()
    model.config.distributed_config = DistributedConfig(fsdp_size=2)
    refuse_wrappers(arguments(tmp_path), model)
