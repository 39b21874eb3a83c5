"""Vision-language pretraining: recipes, models, objectives, the trainer, evaluation and bundles."""

__version__ = "0.1.0"
