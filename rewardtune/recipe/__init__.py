"""Recipes: their sections, the YAML they are read from, and every check before a weight is loaded."""
