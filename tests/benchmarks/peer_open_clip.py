"""The server that people write around open_clip: one FastAPI route, eager float32.

python peer_open_clip.py FOLDER PORT, where FOLDER holds a model as open_clip saves it.
"""

import base64
import io
import sys

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

from vlp.torchvision_guard import ensure_torchvision


class Wanted(BaseModel):
    images: list[str] = []
    texts: list[str] = []


def create_app(folder: str) -> FastAPI:
    ensure_torchvision()
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    app = FastAPI()

    @app.post("/embed")
    def embed(wanted: Wanted) -> dict[str, list[list[float]]]:
        with torch.inference_mode():
            if wanted.images:
                opened = [Image.open(io.BytesIO(base64.b64decode(image))) for image in wanted.images]
                features = model.encode_image(torch.stack([transform(image) for image in opened]), normalize=True)
            else:
                features = model.encode_text(tokenizer(wanted.texts), normalize=True)
        return {"embeddings": features.tolist()}

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
