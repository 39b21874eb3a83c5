"""Dataset work that needs a model: labels by clustering or by entities, written as sidecar files beside the shards."""
