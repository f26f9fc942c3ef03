"""Noise, where it is drawn from, and what it is worth."""
