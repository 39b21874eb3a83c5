"""One paper, one file: `NEEDS`, `Config`, `COUPLING`, `NEUTRAL`, `build(config, dims)`. The module name is the name."""
