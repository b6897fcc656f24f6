"""DP: differential privacy for training rows, with any adapter and methods whose choices ignore the rows.

DP-SGD: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133. In every step

    each row i is drawn independently, with probability q = b / n                 `sampling`
    g_i ← ∇ ℓ_i · min(1, C / ‖∇ ℓ_i‖)                                             `maths`, `driver`
    g   ← (Σ g_i + N(0, σ² C²)) / b                                               `driver`
    the optimizer takes g

    ℓ_i  a row's mean token loss, independent of the other rows; 0 if not finite  `driver`
    n    training rows                                                            `Mechanism.rows`
    b    expected rows per step: batch size times accumulation                    `Mechanism.batch`
    C    `--dp-clip`; the norm is over all layers that train in the step, whose gradients of all rows of a pass are held
    σ    calibrated to ε, δ, q and the number of steps                            `accounting`

The guarantee is for the presence or absence of one row. It covers the weights and everything computed from them. It
does not cover logged losses, counts and times, held-out rows, or settings chosen by other runs on these rows. Duplicate
rows, or rows of one person, count separately.

No row decides whether a run continues. A row without a finite loss, or with a gradient that is not finite, adds nothing
to the sum. The loss is compared with the model's own on a fixed row. With the noise, gradients are finite.

Ours: the row's mean token loss; rows that add nothing; C = 0.1, small as Li et al., arXiv 2110.05679, recommend.
Clipping every layer by itself, at C / √K of K layers, needs one layer's gradients at a time, but learned less.

Noise and draw come from a cryptographic generator; see `secret`. Not hardened: Gaussian noise in floating point leaves
traces in the lowest bits (Mironov 2012). Noise is added in float64 and the result rounded to float32, which removes
most of them, without a proof.
"""
