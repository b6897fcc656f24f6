"""Rows by themselves: what each cost a training run, and which of them look wrong."""
