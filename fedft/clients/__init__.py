"""One site: its data, its device, its training loop."""
