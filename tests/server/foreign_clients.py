"""Run by test_foreign_clients.py with the interpreter of an environment that has these clients and nothing of ours.

    python foreign_clients.py URL PICTURE

Prints one JSON object: name of a client -> what it got, or {"error": ...}.
"""

import asyncio
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXTS = ["red circle", "tall tree"]
MODEL = "micro"


def langchain_openai(url: str, _picture: str) -> Any:
    from langchain_openai import OpenAIEmbeddings

    client = OpenAIEmbeddings(base_url=f"{url}/v1", api_key="unused", model=MODEL, check_embedding_ctx_length=False)
    return {"documents": client.embed_documents(TEXTS), "query": client.embed_query(TEXTS[0])}


def langchain_openai_sends_token_ids(url: str, _picture: str) -> Any:
    """Its default asks tiktoken for ids, which comes from the network; here they are sent by hand as it would."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    return client.embeddings.create(model=MODEL, input=[[1, 2, 3]]).data[0].embedding


def langchain_cohere(url: str, _picture: str) -> Any:
    from langchain_cohere import CohereEmbeddings

    client = CohereEmbeddings(cohere_api_key="unused", base_url=url, model=MODEL)
    return {"documents": client.embed_documents(TEXTS), "query": client.embed_query(TEXTS[0])}


def llama_index_openai(url: str, _picture: str) -> Any:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    client = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{url}/v1", api_key="unused")
    several = asyncio.run(client.aget_text_embedding_batch(TEXTS))
    return {"documents": several, "query": client.get_query_embedding(TEXTS[0])}


def _jina(url: str, **options: Any) -> Any:
    from llama_index.embeddings.jinaai import JinaEmbedding

    client = JinaEmbedding(model=MODEL, api_key="unused", **options)
    client._api.api_url = f"{url}/v1/embeddings"  # the class has no option for it
    return client


def llama_index_jina(url: str, picture: str) -> Any:
    client = _jina(url)
    return {
        "documents": client.get_text_embedding_batch(TEXTS),
        "query": client.get_query_embedding(TEXTS[0]),
        "pictures": client.get_image_embedding_batch([picture]),
    }


def llama_index_jina_binary(url: str, _picture: str) -> Any:
    client = _jina(url, encoding_queries="ubinary", encoding_documents="binary")
    return {"documents": client.get_text_embedding_batch(TEXTS), "query": client.get_query_embedding(TEXTS[0])}


def llama_index_jina_by_url(url: str, _picture: str) -> Any:
    return _jina(url).get_image_embedding("https://example.com/a.jpg")


def llama_index_tei(url: str, _picture: str) -> Any:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    client = TextEmbeddingsInference(model_name=MODEL, base_url=url)
    return {"documents": client.get_text_embedding_batch(TEXTS), "query": client.get_query_embedding(TEXTS[0])}


def llama_index_cohere(url: str, picture: str) -> Any:
    from llama_index.embeddings.cohere import CohereEmbedding

    client = CohereEmbedding(api_key="unused", base_url=url, model_name="embed-english-v3.0")
    return {
        "documents": client.get_text_embedding_batch(TEXTS),
        "query": client.get_query_embedding(TEXTS[0]),
        "pictures": [client.get_image_embedding(picture)],
    }


def voyage(url: str, picture: str) -> Any:
    import PIL.Image
    import voyageai

    client = voyageai.Client(api_key="unused", base_url=f"{url}/v1")
    with PIL.Image.open(picture) as opened:
        found = client.multimodal_embed([[TEXTS[0]], [TEXTS[1]], [opened]], model=MODEL)
    return {"documents": found.embeddings[:2], "query": found.embeddings[0], "lossless": found.embeddings[2:]}


def cohere_5(url: str, _picture: str) -> Any:
    import cohere

    client = cohere.ClientV2(api_key="unused", base_url=url)
    found = client.embed(texts=TEXTS, model=MODEL, input_type="search_query", embedding_types=["float"]).embeddings
    return {"documents": found.float_, "query": (found.float_ or [])[0]}


def clip_client(url: str, picture: str) -> Any:
    """The client's own file: the package around it imports all of clip-retrieval."""
    path = Path(sysconfig.get_paths()["purelib"]) / "clip_retrieval" / "clip_client.py"
    spec = importlib.util.spec_from_file_location("clip_client", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = module.ClipClient(f"{url}/knn-service", "default", num_images=5, deduplicate=False)
    text, image = plain.query(text=TEXTS[0]), plain.query(image=picture)
    vector = [1.0] + [0.0] * 15
    return {
        "text": text,
        "image": image,
        "vector": plain.query(embedding_input=vector),
        "distinct": module.ClipClient(f"{url}/knn-service", "default", num_images=60).query(text=TEXTS[0]),
        "unknown": module.ClipClient(f"{url}/knn-service", "laion5B").query(text=TEXTS[0]),
        "by_url": plain.query(image="https://example.com/a.jpg"),
    }


CLIENTS: tuple[Callable[[str, str], Any], ...] = (
    langchain_openai, langchain_openai_sends_token_ids, langchain_cohere, llama_index_openai, llama_index_jina,
    llama_index_jina_binary, llama_index_jina_by_url, llama_index_tei, llama_index_cohere, voyage, cohere_5,
    clip_client,
)  # fmt: skip


def main() -> None:
    """Ask with every client; one that fails does not stop the next."""
    url, picture = sys.argv[1:]
    found: dict[str, Any] = {}
    for client in CLIENTS:
        try:
            found[client.__name__] = client(url, picture)
        except Exception as error:  # noqa: BLE001 - what a client raises is the result
            found[client.__name__] = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
