"""One paper, one file: `NEEDS`, `Config`, `COUPLING`, `build(config, dims)`. The module name is the name."""
