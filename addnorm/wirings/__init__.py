"""The catalogue of residual schemes, grouped by what a wiring remembers."""

from addnorm.wirings import norm, scale

__all__ = ["norm", "scale"]
