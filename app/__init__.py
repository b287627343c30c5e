"""prefloop's core: the product without a cluster, a port or a screen."""

__version__ = "0.1.0"
