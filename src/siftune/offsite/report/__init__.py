"""An audit as files."""
