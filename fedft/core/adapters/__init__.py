"""Families of adapters, one a file."""
