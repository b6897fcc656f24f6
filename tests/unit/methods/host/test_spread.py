"""Ways to spread a model that hold a part of the adapters, or of a layer, on each rank are refused by name."""

import pytest
import torch
from accelerate import ParallelismConfig
from support.tiny import batch
from support.trainers import adapted, arguments, train
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from siftune import GAST, IST, RST
from siftune.base.errors import UnsupportedError
from siftune.methods.host.spread import refuse_launched, refuse_wrappers


@pytest.mark.parametrize("method", [IST, GAST])
def test_what_accelerates_config_turns_on(tmp_path, monkeypatch, method):
    settings, model = arguments(tmp_path), adapted()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    refuse_wrappers(settings, model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UnsupportedError, match="fsdp"):
        method().on_train_begin(settings, None, None, model=model)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_the_command_line_goes_by_neither(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(UnsupportedError, match=name):
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
    with pytest.raises(UnsupportedError, match=rf"{what} \({name} {size}\)"):
        train(tmp_path, IST(), model=model)


def test_a_plan_of_accelerates(tmp_path):
    plan = ParallelismConfig(tp_size=2)
    with pytest.raises(UnsupportedError, match=r"a tensor-parallel plan \(tp_size 2\)"):
        refuse_wrappers(arguments(tmp_path), adapted(), plan)


def test_weights_that_transformers_has_divided_for_data_parallel_training_are_none(tmp_path):
    model = adapted()
    model.config.distributed_config = DistributedConfig(fsdp_size=2)
    refuse_wrappers(arguments(tmp_path), model)


@pytest.fixture
def alone():
    """A process group of this process, as torchrun makes it for one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_of_one_process_gets_the_gradients_that_it_waits_for(alone):
    model = adapted()
    spread = DistributedDataParallel(model)
    with RST(active=0.5).attach(model) as chosen:
        for _ in range(3):  # it reports a missing one at the next step
            spread(**batch(model)).loss.backward()
            chosen.step()
