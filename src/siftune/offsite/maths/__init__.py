"""The formulas of offsite-tuning: tensors in, tensors out."""
