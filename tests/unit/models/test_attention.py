"""Products for short rows: against the plain formula in float64, and against transformers' `sdpa` on every family."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import FAMILIES, batch, tiny
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from siftune.models import attention
from siftune.models.attention import short_rows


@pytest.fixture(autouse=True)
def also_wide(monkeypatch):
    """As in bfloat16, and exact."""
    monkeypatch.setattr(attention, "_LONGEST", {torch.bfloat16: 256, torch.float32: 128, torch.float64: 128})


class Layer(nn.Module):
    """What transformers hands to an attention function."""

    is_causal = True

    def __init__(self, groups=1):
        super().__init__()
        self.num_key_value_groups = groups


def plainly(query, key, value, seen, scale):
    """The formula, query by query."""
    rows, heads, length, _ = query.shape
    found = torch.empty(rows, length, heads, value.shape[-1], dtype=query.dtype)
    each = heads // key.shape[1]
    for b in range(rows):
        for h in range(heads):
            for t in range(length):
                kept = seen[b, t].nonzero()[:, 0]
                weights = torch.softmax(key[b, h // each, kept] @ query[b, h, t] * scale, 0)
                found[b, t, h] = weights @ value[b, h // each, kept]
    return found


def asked(rows, heads, own, length, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, count, length, width) for count in (heads, own, own)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def with_gradients(function, tensors):
    found = function(*tensors)
    towards = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    return [found.detach(), *torch.autograd.grad((found * towards).sum(), tensors)]


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 3), own=st.integers(1, 3), groups=st.integers(1, 3), length=st.integers(2, 6),
    width=st.sampled_from([2, 5]), scaling=st.sampled_from([None, 0.3]), masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_outputs_and_gradients_are_the_formulas(rows, own, groups, length, width, scaling, masked, seed):
    tensors = asked(rows, own * groups, own, length, width, seed=seed)
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, -1, -1).clone()
    if masked:
        seen &= torch.rand(rows, length, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask = seen[:, None] if masked else None
    ours = with_gradients(
        lambda q, k, v: attention._attention(Layer(groups), q, k, v, mask, scaling=scaling)[0], tensors
    )
    scale = width**-0.5 if scaling is None else scaling
    theirs = with_gradients(lambda q, k, v: plainly(q, k, v, seen, scale), tensors)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_it_is_as_near_to_the_formula_as_eager():
    wide = asked(2, 4, 2, 40, 16)
    seen = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, -1, -1)
    wanted = plainly(*wide, seen, 0.25).detach()
    query, key, value = (tensor.detach().bfloat16() for tensor in wide)
    ours = attention._attention(Layer(2), query, key, value, None)[0]
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    unseen = torch.full((40, 40), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1)
    scores = query @ key.transpose(2, 3) * 0.25 + unseen
    eager = (scores.softmax(-1, dtype=torch.float32).bfloat16() @ value).transpose(1, 2)
    errors = [(found.double() - wanted).square().mean().sqrt().item() for found in (ours, eager)]
    assert errors[0] < 1.1 * errors[1] < 0.02


def test_a_query_that_sees_no_key_gets_zeros_as_by_sdpa():
    tensors = asked(1, 2, 2, 3, 4, torch.float32)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    mask[..., 0, :] = False
    ours, theirs = (
        with_gradients(lambda *given, run=run: run(Layer(), *given, mask)[0], tensors)
        for run in (attention._attention, sdpa_attention_forward)
    )
    assert not ours[0][0, 0].any()
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted)


def test_weights_are_dropped_and_the_others_made_up_for(monkeypatch):
    asked_for = []
    monkeypatch.setattr(
        nn.functional, "dropout", lambda weights, p: asked_for.append((weights.sum(-1).mean().item(), p)) or weights
    )
    attention._attention(Layer(), *asked(1, 2, 2, 3, 4), None, dropout=0.25)
    assert asked_for == [(pytest.approx(1.0), 0.25)]


@pytest.mark.parametrize("why", [
    "long", "one query", "keys left out", "a bias of positions", "a mask that is added", "float16",
    "keys of one row for all",
])  # fmt: skip
def test_unsupported_inputs_go_to_sdpa(why, monkeypatch):
    query, key, value = asked(1, 2, 2, 129 if why == "long" else 4, 4, torch.float32)
    mask, more = None, {}
    if why == "one query":
        query = query[:, :, :1]
    if why == "keys left out":
        query = query[:, :, :3]
    if why == "a bias of positions":
        more = {"position_bias": torch.randn(1, 2, 4, 4)}
    if why == "keys of one row for all":
        query = torch.cat([query, -query])
    if why == "a mask that is added":
        mask = torch.randn(1, 2, 4, 4)
    if why == "float16":
        query, key, value = (tensor.half() for tensor in (query, key, value))
    monkeypatch.setattr(attention, "_products", None)
    found = attention._attention(Layer(), query, key, value, mask, **more)[0]
    torch.testing.assert_close(found, sdpa_attention_forward(Layer(), query, key, value, mask, **more)[0])


def test_only_bfloat16_is_changed_as_it_is(monkeypatch):
    monkeypatch.undo()
    called = _counted(monkeypatch)
    for dtype, calls in ((torch.float32, 0), (torch.float64, 0), (torch.bfloat16, 1)):
        attention._attention(Layer(), *asked(1, 2, 2, 3, 4, dtype), None)
        assert len(called) == calls


def _counted(monkeypatch):
    calls, products = [], attention._products
    monkeypatch.setattr(attention, "_products", lambda *given: calls.append(1) or products(*given))
    return calls


@pytest.mark.parametrize(
    ("family", "padded"), [*((family, "left") for family in FAMILIES), ("llama", None), ("llama", "right")]
)
def test_losses_and_gradients_are_sdpas_on_every_family(family, padded, monkeypatch):
    model = tiny(family)
    if model.config._attn_implementation != "sdpa":
        model.set_attn_implementation("sdpa") if model._supports_sdpa else pytest.skip(f"{family} has no sdpa")
    inputs = batch(model)
    if padded:
        some = slice(-3, None) if padded == "right" else slice(None, 3)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, some] = 0
        inputs["labels"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)  # the first real one, too
    calls, found = _counted(monkeypatch), []
    for within in (False, True):
        model.zero_grad()
        if within:
            with short_rows():
                loss = model(**inputs).loss
        else:
            loss = model(**inputs).loss
            assert not calls
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(calls) == model.config.num_hidden_layers
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_afterwards_all_is_as_before_also_within_one_another_and_beside_others():
    def others(*given, **options):
        return sdpa_attention_forward(*given, **options)

    with short_rows():
        with short_rows():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention._attention
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention._attention
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    with short_rows():
        ALL_ATTENTION_FUNCTIONS["sdpa"] = others
    try:
        with short_rows():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is others
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is others
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
