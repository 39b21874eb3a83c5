"""Backdoors: planting them for a test, finding them in data and in models, cleaning, guarding. Never says "clean"."""
