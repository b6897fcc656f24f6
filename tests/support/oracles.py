"""The slow and obvious way: one backward pass per sample."""

import torch


def summed_loss(model, inputs, divisor=None):
    """Cross entropy over the labels, summed and divided by a number that no row's absence changes."""
    labels = inputs["labels"]
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    targets = labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    return total / (divisor or (labels[:, 1:] != -100).sum().clamp_min(1))


def row_of(inputs, index):
    return {name: value[index : index + 1] for name, value in inputs.items()}


def gradients(model, inputs, divisor=None):
    """parameter -> gradient of the loss; zeros where there is none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(summed_loss(model, inputs, divisor), parameters, allow_unused=True)
    return {p: torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)}


def sample_gradients(model, inputs):
    """parameter -> (S, …): the gradients of every row's share of the batch's loss, each from a pass of its own."""
    rows = inputs["input_ids"].shape[0]
    divisor = (inputs["labels"][:, 1:] != -100).sum().clamp_min(1)
    single = [gradients(model, row_of(inputs, i), divisor) for i in range(rows)]
    return {p: torch.stack([grads[p] for grads in single]) for p in single[0]}


def flat(grads, parameters):
    """(S, P): the gradients of some parameters side by side, in float64."""
    return torch.cat([grads[p].flatten(1).double() for p in parameters], 1)


def rest_scores(grads, parameters):
    """⟨g_i, Σ_{j≠i} g_j⟩ by a double loop."""
    rows = flat(grads, parameters)
    count = rows.shape[0]
    return torch.stack(
        [sum((rows[i] @ rows[j] for j in range(count) if j != i), torch.zeros(())) for i in range(count)]
    )
