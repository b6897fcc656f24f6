"""Emulators: a model whose middle is compressed, layer after layer."""
