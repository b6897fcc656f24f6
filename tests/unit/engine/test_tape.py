"""Gradients of single rows against a loop over them, for every family and adapter; what is left behind."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from support.adapted import (
    adapted,
    checkpoint_whole_layers,
    from_config,
    looped,
    lora_and_dora,
    lora_with_patterns,
    shake,
    two_active_adapters,
)
from support.oracles import gradients, sample_gradients, summed_loss
from support.tiny import FAMILIES, batch, tiny

from siftune.base.errors import UnsupportedError
from siftune.engine import kinds as per_sample
from siftune.engine.gate import LayerGates
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.engine.survey import Survey
from siftune.engine.tape import Tape

# family -> modules for IA3, and those of them whose input it scales; biases trained along
_IA3 = {
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "bloom": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "gptj": (["k_proj", "v_proj", "fc_out"], ["fc_out"]),
    "phi3": (["qkv_proj", "down_proj"], ["down_proj"]),
}
_IN_FULL = ("llama", "gpt2", "qwen3", "gemma2", "olmo")
_BIASED = {"gpt2": ["c_attn", "c_fc"], "opt": ["q_proj", "fc1"], "gpt_neox": ["query_key_value"], "qwen2": ["q_proj"]}


def with_ia3(family):
    targets, inputs = _IA3.get(family, (["k_proj", "v_proj", "down_proj"], ["down_proj"]))
    if "mix" in family or "moe" in family:
        targets, inputs = ["k_proj", "v_proj"], []
    return from_config(IA3Config(target_modules=targets, feedforward_modules=inputs), family)


def with_biases(family, which="all"):
    config = LoraConfig(r=2, target_modules=_BIASED[family], bias=which, fan_in_fan_out=family == "gpt2")
    return shake(get_peft_model(tiny(family), config)).eval()


def without_adapters(family):
    """Every weight of the layers trains."""
    return tiny(family)


def with_kernels(model):
    """Replace the forwards of norms as transformers 5.25 does on GPUs: one weight for all rows, gradients in place."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
            ctx.save_for_backward(hidden, weight, scale)
            return hidden * scale * weight

        @staticmethod
        def backward(ctx, grad):
            hidden, weight, scale = ctx.saved_tensors
            of_weight = (grad * hidden * scale).flatten(0, -2).sum(0)
            grad.mul_(weight)
            grad.sub_(scale**2 * hidden * (grad * hidden).mean(-1, keepdim=True)).mul_(scale)
            return grad, of_weight

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda hidden, norm=module: Fused.apply(hidden, norm.weight)
            module._kernel_repo = "of the hub"
    return model


CASES = {
    **{f"{family} lora": (lambda f=family: adapted(f)) for family in FAMILIES},
    **{f"{family} dora": (lambda f=family: adapted(f, "dora")) for family in ("llama", "gpt2", "bloom", "mixtral")},
    "mamba lora": lambda: adapted("mamba"),
    "olmo lora": lambda: adapted("olmo"),
    "llama lora beside kernels of the hub": lambda: with_kernels(adapted()),
    "llama rslora": lambda: adapted(kind="rslora"),
    "bloom series": lambda: adapted("bloom", "series"),
    "opt parallel on both": lambda: adapted("opt", "parallel", targets=["attention", "mlp"]),
    **{
        f"{family} ia3": (lambda f=family: with_ia3(f))
        for family in ("llama", "gpt2", "opt", "gptj", "phi3", "mixtral")
    },
    **{f"{family} biases": (lambda f=family: with_biases(f)) for family in _BIASED},
    "opt lora's biases": lambda: with_biases("opt", "lora_only"),
    "ranks per module, LoRA bias": lora_with_patterns,
    "two active adapters": two_active_adapters,
    "LoRA and DoRA on one module": lora_and_dora,
    **{f"{family} in full": (lambda f=family: without_adapters(f)) for family in _IN_FULL},
}


def double(model):
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others have no float64
    return model.double()


class Recorder:
    """A tape that keeps all gradients of rows and follows some of them."""

    def __init__(self, model, rows=None, pairs=False):
        self.grads, self.passes, self.order = {}, [], []
        self._rows = rows
        self.tape = Tape(Survey(group_by_layer(model)), self._begin, self._reduce, pairs)

    def _begin(self, samples):
        self.passes.append(samples)
        return f"pass {len(self.passes)}"

    def _reduce(self, this, layers):
        ((group, grads),) = layers
        self.order.append((this, group.index))
        self.grads |= grads
        return {p: g.sum(0) if self._rows is None else g[self._rows].sum(0) for p, g in grads.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tape.remove()


def in_layers(model):
    return [p for group in group_by_layer(model) for p in group.parameters.values()]


def assert_close(got, wanted, tolerance):
    """Equal relative to the largest value."""
    scale = max(float(wanted.abs().max()), 1e-3)
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("name", CASES)
def test_rows_gradients_equal_the_loop_in_float64(name):
    model = double(CASES[name]())
    inputs = batch(model, 4)
    wanted = sample_gradients(model, inputs)
    with Recorder(model, rows=[0, 2]) as recorder:
        summed_loss(model, inputs).backward()
    assert set(recorder.grads) == set(in_layers(model))
    for parameter, rows in recorder.grads.items():
        assert_close(rows, wanted[parameter], 1e-12)
        assert_close(parameter.grad, wanted[parameter][[0, 2]].sum(0), 1e-12)


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "gemma3n"])
def test_rows_gradients_in_models_that_compute_parts_in_float32(family):
    model = double(adapted(family))
    inputs = batch(model, 4)
    wanted = sample_gradients(model, inputs)
    with Recorder(model) as recorder:
        summed_loss(model, inputs).backward()
    assert set(recorder.grads) == set(in_layers(model))
    for parameter, rows in recorder.grads.items():
        assert_close(rows, wanted[parameter], 1e-6)


@pytest.mark.parametrize("name", ["gpt2 dora", "opt ia3", "mixtral lora", "opt parallel on both"])
def test_rows_gradients_in_float32_are_as_near_to_float64_as_the_loop_in_float32(name):
    """A loop over rows in float32 is itself up to 3e-6 away, so that no bound of 1e-6 can hold against float64."""
    model = CASES[name]()
    inputs = batch(model, 4)
    wanted = sample_gradients(double(CASES[name]()), inputs)
    looped = sample_gradients(model, inputs)
    with Recorder(model) as recorder:
        summed_loss(model, inputs).backward()
    for parameter, oracle in zip(recorder.grads, (wanted[p] for p in _twins(model, wanted, recorder)), strict=True):
        scale = max(float(oracle.abs().max()), 1e-3)
        ours, loops = (float((g[parameter] - oracle).abs().max()) / scale for g in (recorder.grads, looped))
        assert ours <= 1.5 * loops + 1e-6
        assert loops < 1e-5


def _twins(model, wanted, recorder):
    """The oracle's parameters in the recorder's order: both models list theirs alike."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    own = dict(zip(names, [p for p in model.parameters() if p.requires_grad], strict=True))
    other = dict(zip(names, wanted, strict=True))
    by_id = {id(p): n for n, p in own.items()}
    return [other[by_id[id(p)]] for p in recorder.grads]


@st.composite
def batches(draw):
    """Rows of any length, padded left or right, with any prompt, some without a label."""
    rows, length = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    left = draw(st.booleans())
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row in range(rows):
        size = draw(st.integers(1, length))
        start = length - size if left else 0
        mask[row, start : start + size] = 1
        prompt = draw(st.integers(0, size))
        labels[row, start + prompt : start + size] = ids[row, start + prompt : start + size]
    return {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@settings(max_examples=15)
@given(inputs=batches())
def test_any_shape_mask_and_padding(kind, inputs):
    model = adapted(kind=kind).double()
    wanted = sample_gradients(model, inputs)
    with Recorder(model) as recorder:
        summed_loss(model, inputs).backward()
    for parameter, rows in recorder.grads.items():
        assert_close(rows, wanted[parameter], 1e-12)


@pytest.mark.parametrize(("kind", "reentrant"), [("lora", False), ("dora", True), ("parallel", False)])
def test_activation_checkpointing_changes_nothing(kind, reentrant):
    model = adapted(kind=kind, dropout=0.3).double().train()
    inputs = batch(model, 4)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(0)  # of dropout
        with Recorder(model) as recorder:
            summed_loss(model, inputs).backward()
        found.append(recorder.grads)
    assert recorder.passes == [4]
    for parameter, rows in found[0].items():
        assert_close(found[1][parameter], rows, 1e-12)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_checkpointing_may_run_a_layers_hooks_again(kind, monkeypatch):
    model = adapted(kind=kind).double()
    inputs = batch(model, 4)
    wanted = sample_gradients(model, inputs)
    checkpoint_whole_layers(model, monkeypatch, reentrant=False)
    with Recorder(model, rows=[0, 2]) as recorder:
        for _ in range(2):
            model.zero_grad()
            summed_loss(model, inputs).backward()
    assert recorder.passes == [4, 4]
    for parameter, rows in recorder.grads.items():
        assert_close(rows, wanted[parameter], 1e-12)
        assert_close(parameter.grad, wanted[parameter][[0, 2]].sum(0), 1e-12)


@pytest.mark.parametrize("before", [False, True])
def test_reentrant_checkpointing_around_a_layers_hooks_is_refused(before, monkeypatch):
    model = adapted()
    model.enable_input_require_grads()  # else reentrant checkpointing trains nothing at all
    with Recorder(model):
        if before:
            summed_loss(model, batch(model, 4)).backward()
        checkpoint_whole_layers(model, monkeypatch, reentrant=True)
        with pytest.raises(UnsupportedError, match="use_reentrant"):
            summed_loss(model, batch(model, 4)).backward()


def test_kernels_of_the_hub_with_trainable_weights_are_refused():
    model = with_kernels(tiny("llama"))
    with Recorder(model), pytest.raises(UnsupportedError, match="use_kernels=False"):
        summed_loss(model, batch(model, 4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_passes_before_one_backward_with_checkpointing(reentrant):
    """Reentrant checkpointing runs the first one again when the record is that of the second."""
    model = adapted().double().train()
    first, second = batch(model, 4), batch(model, 3, seed=1)
    wanted = {p: rows.sum(0) for p, rows in sample_gradients(model, first).items()}
    for parameter, rows in sample_gradients(model, second).items():
        wanted[parameter] = wanted[parameter] + rows.sum(0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.zero_grad()
    with Recorder(model):
        loss = summed_loss(model, first) + summed_loss(model, second)
        with pytest.raises(UnsupportedError, match="mixes the samples") if reentrant else nullcontext():
            loss.backward()
    if not reentrant:
        for parameter, grad in wanted.items():
            assert_close(parameter.grad, grad, 1e-12)


@pytest.mark.parametrize(("kind", "checkpointing"), [("lora", True), ("dora", False), ("parallel", True)])
def test_a_loop_over_layers_is_one_pass(kind, checkpointing):
    model = looped(kind=kind).double().train()
    inputs = batch(model, 4)
    wanted = sample_gradients(model, inputs)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with Recorder(model, rows=[0, 2]) as recorder:
        for _ in range(2):
            model.zero_grad()
            summed_loss(model, inputs).backward()
    assert recorder.passes == [4, 4]
    assert [index for _, index in recorder.order] == [3, 2, 1, 0] * 2
    for parameter, rows in recorder.grads.items():
        assert_close(rows, wanted[parameter], 1e-12)
        assert_close(parameter.grad, wanted[parameter][[0, 2]].sum(0), 1e-12)


def test_a_loop_that_begins_with_an_inactive_layer_is_one_pass():
    model = looped().double()
    inputs, groups = batch(model, 4), group_by_layer(model)
    with LayerGates(model, groups) as gates:
        gates.set_active([2])
        wanted = sample_gradients(model, inputs)
        with Recorder(model) as recorder:
            summed_loss(model, inputs).backward()
    assert recorder.passes == [4]
    assert set(recorder.grads) == set(groups[2].parameters.values())
    for parameter, rows in recorder.grads.items():
        assert_close(rows, wanted[parameter], 1e-12)


def test_dropout_in_adapters_is_that_of_plain_training():
    model = adapted(dropout=0.4).double().train()
    inputs = batch(model, 4)
    torch.manual_seed(5)
    plain = gradients(model, inputs)
    torch.manual_seed(5)
    with Recorder(model):
        summed_loss(model, inputs).backward()
    for parameter in in_layers(model):
        assert_close(parameter.grad, plain[parameter], 1e-12)


def test_pairs_are_one_sample():
    model = adapted(kind="dora").double()
    inputs = batch(model, 6)
    single = sample_gradients(model, inputs)
    with Recorder(model, rows=[1], pairs=True) as recorder:
        summed_loss(model, inputs).backward()
    assert recorder.passes == [3]
    for parameter, rows in recorder.grads.items():
        assert_close(rows, single[parameter][:3] + single[parameter][3:], 1e-12)
        assert_close(parameter.grad, single[parameter][[1, 4]].sum(0), 1e-12)


def test_two_passes_before_one_backward():
    model = adapted().double()
    first, second = batch(model, 3, seed=1), batch(model, 2, seed=2)
    wanted = [gradients(model, inputs) for inputs in (first, second)]
    with Recorder(model) as recorder:
        (summed_loss(model, first) + summed_loss(model, second)).backward()
    assert recorder.passes == [3, 2]
    assert sorted(recorder.order) == [(f"pass {n}", layer) for n in (1, 2) for layer in range(4)]
    for parameter in in_layers(model):
        assert_close(parameter.grad, wanted[0][parameter] + wanted[1][parameter], 1e-12)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_module_that_runs_twice_in_its_layer(kind):
    model = adapted(kind=kind).double()
    for group in group_by_layer(model):
        once = group.module.mlp.forward
        group.module.mlp.forward = lambda x, once=once: once(x) + once(0.5 * x)
    inputs = batch(model, 4)
    wanted = sample_gradients(model, inputs)
    with Recorder(model, rows=[0, 2]) as recorder:
        summed_loss(model, inputs).backward()
    for parameter, rows in recorder.grads.items():
        assert_close(rows, wanted[parameter], 1e-12)
        assert_close(parameter.grad, wanted[parameter][[0, 2]].sum(0), 1e-12)


def test_an_adapter_that_is_not_in_use_gets_no_gradient():
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("idle", LoraConfig(r=3, target_modules=["q_proj", "o_proj"]))
    shake(model).double()
    inputs = batch(model, 3)
    plain = gradients(model, inputs)
    with Recorder(model) as recorder:
        summed_loss(model, inputs).backward()
        assert len(recorder.grads) == 8
        with model.disable_adapter():
            model(**inputs)
    for parameter, grad in plain.items():
        assert_close(parameter.grad, grad, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_half_precision_base(dtype):
    model = adapted().to(dtype)
    for parameter in in_layers(model):
        parameter.data = parameter.data.float()
    inputs = batch(model, 4)
    with use_base_dtype(model, group_by_layer(model)):
        plain = gradients(model, inputs)
        with Recorder(model) as recorder:
            summed_loss(model, inputs).backward()
    for parameter, rows in recorder.grads.items():
        assert rows.dtype == dtype
        assert parameter.grad.dtype == torch.float32
        assert_close(parameter.grad, plain[parameter], 0.03)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_autocast(kind):
    model = adapted(kind=kind)
    inputs = batch(model, 4)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, inputs)
        with Recorder(model):
            summed_loss(model, inputs).backward()
    for parameter in in_layers(model):
        assert_close(parameter.grad, plain[parameter], 0.05)


@pytest.mark.compiled
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_and_layers(whole):
    model = adapted()
    inputs = batch(model, 4)
    wanted = sample_gradients(model, inputs)
    called = torch.compile(model, backend="aot_eager") if whole else model
    if not whole:
        for group in group_by_layer(model):
            group.module.compile(backend="aot_eager")
    with Recorder(model, rows=[0, 2]) as recorder:
        for _ in range(2):  # the second time without tracing
            model.zero_grad()
            summed_loss(called, inputs).backward()
    torch.compiler.reset()
    assert set(recorder.grads) == set(in_layers(model))
    for parameter in in_layers(model):
        assert_close(parameter.grad, wanted[parameter][[0, 2]].sum(0), 1e-5)


# --- what a pass may touch, and what is left


def test_logits_are_the_same_bits():
    for name in ("llama lora", "llama dora", "opt ia3"):
        model = CASES[name]()
        inputs = batch(model)
        plain = model(**inputs).logits
        with Recorder(model):
            assert torch.equal(model(**inputs).logits, plain)
            with torch.no_grad():
                assert torch.equal(model(**inputs).logits, plain)


def test_live_gradients_of_rows_are_those_of_one_layer(monkeypatch):
    model = adapted(targets=["q_proj", "down_proj"])
    alive, peak = weakref.WeakSet(), []
    form = per_sample.linear_weight

    def counted(*args):
        rows = form(*args)
        alive.add(rows)
        peak.append(len(alive))
        return rows

    monkeypatch.setattr(per_sample, "linear_weight", counted)
    groups = group_by_layer(model)
    tape = Tape(Survey(groups), lambda n: True, lambda this, layers: {p: g.sum(0) for p, g in layers[0][1].items()})
    summed_loss(model, batch(model, 4)).backward()
    tape.remove()
    assert len(peak) == 4 * 4  # layers, matrices in each
    assert max(peak) == 4
    assert not alive


def saved_bytes(model, inputs):
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage, storage.nbytes())  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = summed_loss(model, inputs)
    del loss
    return sum(size for _, size in kept.values())


def test_no_more_is_saved_between_forward_and_backward_than_in_plain_training():
    model = adapted()
    inputs = batch(model, 4, 32)
    plain = saved_bytes(model, inputs)
    with Recorder(model):
        recorded = saved_bytes(model, inputs)
    # the first layer's input now needs a gradient, so what its norm and attention work on is saved as well
    first_input = inputs["input_ids"].numel() * 32 * 4
    assert recorded <= plain + 3 * first_input


def state(model):
    return {
        name: (
            [id(p) for p in module._parameters.values()],
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            {n: p.requires_grad for n, p in module._parameters.items() if p is not None},
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_removing_leaves_nothing(kind):
    model = adapted(kind=kind)
    inputs, before = batch(model), state(model)
    plain = gradients(model, inputs)
    recorder = Recorder(model)
    summed_loss(model, inputs).backward()
    kept = [weakref.ref(recorder.tape), *(weakref.ref(rows) for rows in recorder.grads.values())]
    recorder.tape.remove()
    recorder.tape.remove()
    del recorder
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    assert state(model) == before
    again = gradients(model, inputs)
    assert all(torch.equal(again[p], grad) for p, grad in plain.items())


def test_after_an_error_in_the_middle_of_a_pass():
    model = adapted().double()
    inputs = batch(model, 3)
    wanted = gradients(model, inputs)

    def fail(*_):
        raise KeyboardInterrupt

    with Recorder(model) as recorder:
        handle = model.base_model.model.model.layers[2].mlp.down_proj.base_layer.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        summed_loss(model, inputs).backward()
    assert recorder.passes == [3, 3]
    for parameter in in_layers(model):
        assert_close(parameter.grad, wanted[parameter], 1e-12)


def test_paused_passes_are_plain():
    model = adapted()
    inputs = batch(model)
    plain = gradients(model, inputs)
    with Recorder(model) as recorder, recorder.tape.paused():
        paused = gradients(model, inputs)
    assert not recorder.passes
    assert all(torch.equal(paused[p], grad) for p, grad in plain.items())
