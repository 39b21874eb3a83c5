"""What sits on an encoder: projectors, classifiers, gates. Modules here know nothing of batches or losses."""
