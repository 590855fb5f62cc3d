"""Training frameworks; each is imported in its own file alone."""
