"""The commands of this floor, one module per family; `vlp/cli.py` mounts them on use."""
