"""Measurements; each file says in its first lines how to repeat them."""
