"""The loss of a private run: a sum over rows, each row's share its own."""

import torch
from support.oracles import row_of, summed_loss
from support.tiny import batch, tiny

from siftune.methods.dp.loss import row_loss
from siftune.models.loss import label_positions


def private_loss(model, inputs):
    labels = inputs["labels"]
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return row_loss(logits[label_positions(labels)][None], labels)


def test_it_is_the_sum_of_what_single_rows_give():
    model = tiny("llama").double()
    inputs = batch(model, 4)
    single = [summed_loss(model, row_of(inputs, row)) for row in range(4)]  # a mean over the row's own tokens
    torch.testing.assert_close(private_loss(model, inputs), torch.stack(single).sum(), rtol=1e-12, atol=0)
    assert len({int((row > -1).sum()) for row in inputs["labels"]}) > 1, (
        "rows have as many labels each: nothing is shown"
    )


def test_a_row_without_labels_adds_nothing():
    model = tiny("llama").double()
    inputs = batch(model, 3)
    without = {name: value[:2] for name, value in inputs.items()}
    inputs["labels"][2] = -100
    loss = private_loss(model, inputs)
    torch.testing.assert_close(loss, private_loss(model, without), rtol=1e-12, atol=0)


def test_half_precision_is_widened():
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    loss = row_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, row_loss(logits.double(), labels).float())
