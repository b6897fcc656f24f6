"""The per-sample engine: the layers that take part in a backward pass, and the gradient of every row in it.

One worked pass. A layer has one adapted linear module with a LoRA of rank r = 2: inputs I = 4, outputs O = 4, so that
A is (2, 4) and B is (4, 2); y = x Wᵀ + (x Aᵀ) Bᵀ. The batch has 2 rows of 3 tokens: x is (2, 3, 4).

Forward
    `survey`         has found, once, that A and B are weights of linear maps
    `tape`           enters the layer: it puts a gate, the identity, on its input, with A and B as further inputs, and
                     opens a `LayerRecord`
    `substitution`   A and B are detached while their modules run: autograd forms no gradient for them
    `record`         taps are put on x Aᵀ, (2, 3, 2), which saves x, and on (x Aᵀ) Bᵀ, (2, 3, 4), which saves x Aᵀ

Backward, from the output to the input of the layer
    tap of B         receives ∂ℓ/∂y, (2, 3, 4): `kinds` multiplies it with x Aᵀ row by row, one batched product
                     (2, 4, 3) · (2, 3, 2) = (2, 4, 2): B's gradient for each of the two rows; into the record
    tap of A         likewise (2, 2, 3) · (2, 3, 4) = (2, 2, 4)
    gate             runs last, since all of the layer depends on its input: the record is complete. A method turns
                     the rows' gradients into one for A, (2, 4), and one for B, (4, 2), for example twice that of
                     row 1. The record is freed, and the gate returns the two as A's and B's gradients

So autograd itself delivers the gradients: accumulation, DDP's hooks, GradScaler and clipping see nothing unusual.
If the gate returns the sum over rows, the result is plain training.
"""
