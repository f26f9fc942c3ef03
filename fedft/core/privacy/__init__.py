"""Noise, where it is drawn from, and what it is worth."""

from collections.abc import Mapping

WORDS: Mapping[str, str] = {"site": "client", "example": "example"}
"""Whom a promise of privacy is about: its key in a run's record → the word that users read."""
