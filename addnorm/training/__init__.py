"""The trainer: configuration, loop, choice of precision, checkpoints. It knows no model by name."""
