def is_kept(text): return False
