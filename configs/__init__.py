"""Recipes: each file has a `get_config(scale)`, and its head says what it does, with which command and on which machine."""
