"""Members of fedft in a package of their own: see the README beside it."""
