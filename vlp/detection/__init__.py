"""Open-vocabulary detection: feature maps, pyramid, region heads, boxes, inference and what is drawn from it."""
