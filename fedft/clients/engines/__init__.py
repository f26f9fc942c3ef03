"""How a client's batches become an update: the plain loop, and many clients in one pass."""
