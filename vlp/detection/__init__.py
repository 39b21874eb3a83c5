"""Open-vocabulary detection: feature maps, pyramid, region heads, boxes, inference and what is drawn from it."""

from vlp.torchvision_guard import ensure_torchvision

ensure_torchvision()  # open_clip and timm, which the modules of this folder import, import torchvision
