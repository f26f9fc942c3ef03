"""``python -m fedft``."""

from fedft.cli import main

main()
