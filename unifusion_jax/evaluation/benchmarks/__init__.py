"""Public benchmarks: their files, images laid out as their own scorers take them, and scores by a VLM."""
