"""One file a verb; `main.py` imports a verb's module only after it has been asked for."""
