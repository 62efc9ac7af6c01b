"""Recipes: each file has a `get_config(scale)`; its head names the command, the machine and what to expect."""
