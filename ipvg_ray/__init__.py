"""Turn a set of faces and prompts into identity-preserving videos, on a laptop or a cluster."""

__version__ = "0.1.0"
