"""The laboratory's scores by gradients."""

import numpy as np
import torch

from lab.pays.gradients import _SIZE, _signs, _sketch, _update, compared


def test_scores_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    pool, known = (torch.randn(count, 3, 5, generator=generator) for count in (7, 4))
    target = sum(row / row.norm() for row in known) / 4
    scores = compared(pool, known)
    for centre, name in ((torch.zeros(3, 5), ""), (pool.mean(0), ", centred")):
        for number, row in enumerate(pool - centre):
            cosine = float((row * target).sum() / row.norm() / target.norm())
            layers = [float(a @ b / a.norm() / b.norm()) for a, b in zip(row, target, strict=True)]
            np.testing.assert_allclose(scores[f"cosine{name}"][number], -cosine, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(scores[f"mean of layers{name}"][number], -np.mean(layers), rtol=1e-4, atol=1e-6)


def test_an_update_is_that_of_adam():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    adam = torch.optim.Adam([parameter], lr=1.0)
    for values in ([0.5, 0.1, -1.0], [0.2, -0.3, 2.0]):
        parameter.grad = torch.tensor(values)
        adam.step()
    gradient, before = torch.tensor([-0.7, 0.4, 0.9]), parameter.detach().clone()
    expected = _update(gradient, adam.state[parameter])
    parameter.grad = gradient
    adam.step()
    torch.testing.assert_close(before - parameter.detach(), expected)


def test_a_sketch_keeps_products():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20_000, generator=generator)
    second = first + torch.randn(20_000, generator=generator)
    sign = _signs("layers.0.q_proj.lora_A", 20_000)
    product = float(_sketch(first, sign) @ _sketch(second, sign))
    assert abs(product - float(first @ second)) < 4 * float(first.norm() * second.norm()) / _SIZE**0.5
