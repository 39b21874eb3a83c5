"""The HTTP server: a bundle behind OpenAI-compatible and native routes, with an embedded vector index."""
