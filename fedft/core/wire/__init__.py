"""Tensors as messages carry them."""
