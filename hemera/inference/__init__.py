"""A trained network applied to a whole slide."""

from hemera.inference.whole_slide import predict

__all__ = ["predict"]
