"""The commands of two parties: emulate, verify, plug, audit."""
