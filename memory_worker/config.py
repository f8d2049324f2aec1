"""Settings of memory_worker: environment variables `MEMORY_<FIELD>`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from memory_worker.domain.detectors import policy_from_text
from memory_worker.usecases.memory_ports import Retention
from memory_worker.usecases.ports import Policy
from servicekit.sealing import keys_of
from servicekit.settings import Address, AddressOrOff, ServerSettings, Target, load_settings

PREFIX = "MEMORY"


class Settings(ServerSettings):
    """What memory_worker is told; see servicekit.settings.ServerSettings for the rest."""

    listen: Address = "127.0.0.1:50053"
    metrics_listen: AddressOrOff = "127.0.0.1:9093"
    llm_target: Target = "127.0.0.1:50051"
    llm_token_file: Path | None = None
    llm_tls_ca_file: Path | None = None
    llm_tls_cert_file: Path | None = None
    llm_tls_key_file: Path | None = None
    kafka_bootstrap_servers: str = ""
    kafka_group: str = "creditmesh-memory"
    kafka_group_protocol: Literal["auto", "consumer", "classic"] = "auto"
    kafka_topic_prefix: str = ""
    most_running_jobs: int = Field(default=16, ge=1, le=1000)
    policy: Literal["set", "legacy"] = "set"
    pairwise: bool = False
    agreeing: int = Field(default=3, ge=1, le=9)
    most_candidates: int = Field(default=5, ge=1, le=20)
    floor: float | None = Field(default=None, ge=-1, le=1)
    retrieve_floor: float | None = Field(default=None, ge=-1, le=1)
    least_confidence: float = Field(default=0.5, ge=0, le=1)
    most_calls: int = Field(default=24, ge=1, le=1000)
    detectors: str = ""
    embedder: Literal["hashed", "minilm", "llm"] = "hashed"
    embedding_alias: str = Field(default="embedding", min_length=1, max_length=64, pattern="^[^:]*$")
    embedding_version: str = "1"
    vector_index: Literal["pgvector", "milvus"] = "pgvector"
    milvus_uri: str = "http://127.0.0.1:19530"
    milvus_token: SecretStr = SecretStr("")
    milvus_prefix: str = Field(default="creditmesh_", pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    milvus_search_seconds: float = Field(default=0.1, gt=0, le=60)
    milvus_seconds: float = Field(default=5.0, gt=0, le=300)
    compare_seconds: float = Field(default=600.0, gt=0)
    chores_seconds: float = Field(default=30.0, gt=0, le=3600)
    turn_key: SecretStr | None = None
    turn_key_file: Path | None = None
    answers_kept_days: float = Field(default=7.0, ge=0, le=3650)
    ended_items_kept_days: float = Field(default=90.0, ge=0, le=36500)
    ended_jobs_kept_days: float = Field(default=400.0, ge=0, le=36500)

    @field_validator("detectors")
    @classmethod
    def _check_detectors(cls, value: str) -> str:
        policy_from_text(value)
        return value

    @model_validator(mode="after")
    def _check_turn_key(self) -> Settings:
        try:
            self.turn_keys()
        except ValueError as error:
            raise ValueError(f"{'turn_key' if self.turn_key else 'turn_key_file'}: {error}") from None
        return self

    def turn_keys(self) -> list[bytes]:
        """Keys that open turns that llm_service sealed. Raises ValueError."""
        return keys_of(self.turn_key, self.turn_key_file)

    def policy_of(self) -> Policy:
        """What the pipeline is told."""
        return Policy(
            decision=self.policy, pairwise=self.pairwise, agreeing=self.agreeing,
            most_candidates=self.most_candidates, floor=self.floor,
            retrieve_floor=self.retrieve_floor, least_confidence=self.least_confidence, most_calls=self.most_calls,
            detectors=policy_from_text(self.detectors),
        )

    def retention_of(self) -> Retention:
        """How long what has ended is kept; 0 days = for ever."""
        return Retention(
            answers=timedelta(days=self.answers_kept_days),
            ended_items=timedelta(days=self.ended_items_kept_days) if self.ended_items_kept_days else None,
            ended_jobs=timedelta(days=self.ended_jobs_kept_days) if self.ended_jobs_kept_days else None,
        )


def load(environ: Mapping[str, str]) -> Settings:
    """Raises ConfigurationError with one line for each problem."""
    return load_settings(Settings, prefix=PREFIX, environ=environ)
