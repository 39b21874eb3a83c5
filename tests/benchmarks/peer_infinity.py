"""infinity's command line beside a torch for the CPU: python peer_infinity.py v2 --model-id FOLDER ...

Runs in an environment of infinity's own. Its torchvision is built for CUDA and cannot be imported before the two
operators exist that its compiled library would have declared; see vlp/torchvision_guard.py.
"""

import torch


def main() -> None:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from infinity_emb.cli import cli

    cli()


if __name__ == "__main__":
    main()
