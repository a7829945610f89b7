"""The verbs in order: compress, recipes, runs."""

from spectrim.pipeline.compressed import Compressed

__all__ = ["Compressed"]
