"""LoRA-drop: the layers whose adapters respond most."""
