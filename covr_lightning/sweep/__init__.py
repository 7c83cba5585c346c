"""``covr sweep``: several configs × several seeds, one table."""
