"""The catalogue of residual schemes, grouped by what a wiring remembers."""

from addnorm.wirings import norm, scale, memory, streams  # isort: skip  # the catalogue's order

__all__ = ["memory", "norm", "scale", "streams"]
