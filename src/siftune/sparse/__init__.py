"""The papers' selection rules: pure maths and small state."""
