"""DP: differential privacy for training rows, of any adapter, with methods whose choices do not look at the rows.

What Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133, call DP-SGD. In every step

    each row i is drawn by itself, with chance q = b / n                          `sampling`
    g_i ← ∇ ℓ_i · min(1, C / ‖∇ ℓ_i‖)                                             `maths`, `driver`
    g   ← (Σ g_i + N(0, σ² C²)) / b                                               `driver`
    the optimizer takes g

    ℓ_i  a row's mean token loss, which no other row has a part in                `loss`
    n    rows to train on                                                         `Mechanism.rows`
    b    rows of a step on average: batch size times accumulation                 `Mechanism.batch`
    C    `--dp-clip`; with "layer" each of the K layers that train in the step has C / √K for itself, and one layer's
         gradients are held at a time; with "flat" C is for all layers together, whose gradients are all held
    σ    found for ε, δ, q and the number of steps                                `accounting`

The promise is about a row that is there or is not. It covers the weights, and all that is computed from them; not the
losses, counts and times that a run writes down, not held-out rows, and not settings that were chosen by looking at
other runs on these rows. Rows that are the same, or of one person, are rows of their own.

Ours: that the layers are clipped one by one by default, at C / √K of the layers that train now, since one pass then
does with one layer's buffer (groups of layers: McMahan et al., arXiv 1812.06210); the row's mean token loss; that a row
whose gradient is not finite counts nothing; C = 0.1, small as Li et al., arXiv 2110.05679, find it best.

Not hardened: Gaussian noise in floating point leaves traces in the lowest bits (Mironov 2012), and the generators of
torch are not cryptographic, though none of them can be tried out; see `sampling`.
"""
