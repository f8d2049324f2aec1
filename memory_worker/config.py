"""Settings of memory_worker: environment variables `MEMORY_<FIELD>`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from memory_worker.domain.detectors import policy_from_text
from memory_worker.usecases.ports import Policy
from servicekit.settings import Address, AddressOrOff, ServerSettings, load_settings

PREFIX = "MEMORY"


class Settings(ServerSettings):
    """What memory_worker is told; see servicekit.settings.ServerSettings for the rest."""

    listen: Address = "127.0.0.1:50053"
    metrics_listen: AddressOrOff = "127.0.0.1:9093"
    llm_target: str = "127.0.0.1:50051"
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
    confirm: bool = True
    most_candidates: int = Field(default=5, ge=1, le=20)
    floor: float = Field(default=0.1, ge=-1, le=1)
    retrieve_floor: float = Field(default=0.15, ge=-1, le=1)
    least_confidence: float = Field(default=0.5, ge=0, le=1)
    most_calls: int = Field(default=24, ge=1, le=1000)
    detectors: str = ""
    embedder: Literal["hashed", "llm"] = "hashed"
    embedding_version: str = "1"
    answers_kept_days: float = Field(default=7.0, ge=0, le=3650)

    @field_validator("detectors")
    @classmethod
    def _check_detectors(cls, value: str) -> str:
        policy_from_text(value)
        return value

    def policy_of(self) -> Policy:
        """What the pipeline is told."""
        return Policy(
            decision=self.policy, pairwise=self.pairwise, confirm=self.confirm,
            most_candidates=self.most_candidates, floor=self.floor,
            retrieve_floor=self.retrieve_floor, least_confidence=self.least_confidence, most_calls=self.most_calls,
            detectors=policy_from_text(self.detectors),
        )


def load(environ: Mapping[str, str]) -> Settings:
    """Raises ConfigurationError with one line for each problem."""
    return load_settings(Settings, prefix=PREFIX, environ=environ)
