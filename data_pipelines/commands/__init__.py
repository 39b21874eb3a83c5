"""The commands of `vlp shard`; data_pipelines.cli mounts them."""
