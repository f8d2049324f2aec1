"""Settings of llm_service: environment variables `LLM_<FIELD>`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, SecretStr, model_validator

from llm_service.domain.rate_limit import Limits
from llm_service.domain.upstream_address import Reach
from servicekit.sealing import keys_of
from servicekit.settings import Address, AddressOrOff, ServerSettings, Target, TargetOrOff, load_settings

PREFIX = "LLM"


class Settings(ServerSettings):
    """What llm_service is told; see servicekit.settings.ServerSettings for the rest."""

    listen: Address = "127.0.0.1:50051"
    metrics_listen: AddressOrOff = "127.0.0.1:9091"
    tokenstore_target: Target = "127.0.0.1:50052"
    tokenstore_token_file: Path | None = None
    tokenstore_tls_ca_file: Path | None = None
    tokenstore_tls_cert_file: Path | None = None
    tokenstore_tls_key_file: Path | None = None
    kafka_bootstrap_servers: str = ""
    redis_url: str = ""
    secret_key: SecretStr | None = None
    secret_key_file: Path | None = None
    kafka_topic_prefix: str = ""
    call_lease_seconds: float = Field(default=10.0, ge=2, le=3600)
    hold_ttl_seconds: int = Field(default=60, ge=2, le=3600)
    replay_ttl: int = Field(default=86_400, ge=0, le=31_536_000)
    most_running_calls: int = Field(default=20_000, ge=1, le=1_000_000)
    local_tokens_per_second: float = Field(default=60.0, ge=0, le=1_000_000)
    upstream_reach: Reach = Reach.LOOPBACK
    most_attempts: int = Field(default=6, ge=1, le=50)
    queue_seconds: float = Field(default=5.0, ge=0, le=600)
    most_waiting_calls: int = Field(default=100, ge=0, le=100_000)
    user_max_concurrency: int = Field(default=0, ge=0, le=1_000_000)
    user_rpm: int = Field(default=0, ge=0, le=100_000_000)
    user_tpm: int = Field(default=0, ge=0, le=1_000_000_000)
    memory_target: TargetOrOff = ""
    memory_token_file: Path | None = None
    memory_tls_ca_file: Path | None = None
    memory_tls_cert_file: Path | None = None
    memory_tls_key_file: Path | None = None
    memory_seconds: float = Field(default=0.3, gt=0, le=30)
    seal_conversations: bool = False
    turn_key: SecretStr | None = None
    turn_key_file: Path | None = None
    history_messages: int = Field(default=1000, ge=1, le=2000)

    @model_validator(mode="after")
    def _check_sealing(self) -> Settings:
        if self.seal_conversations and not (self.secret_key or self.secret_key_file):
            raise ValueError("seal_conversations: needs LLM_SECRET_KEY or LLM_SECRET_KEY_FILE")
        if self.seal_conversations and (self.memory_target or self.kafka_bootstrap_servers) and not (
            self.turn_key or self.turn_key_file
        ):
            raise ValueError(
                "seal_conversations: needs LLM_TURN_KEY or LLM_TURN_KEY_FILE, too (memory_worker's MEMORY_TURN_KEY):"
                " finished turns would travel in clear"
            )
        return self

    @model_validator(mode="after")
    def _check_turn_key(self) -> Settings:
        try:
            self.turn_keys()
        except ValueError as error:
            raise ValueError(f"{'turn_key' if self.turn_key else 'turn_key_file'}: {error}") from None
        return self

    @model_validator(mode="after")
    def _check_secret_key(self) -> Settings:
        try:
            self.sealing_keys()
        except ValueError as error:
            raise ValueError(f"{'secret_key' if self.secret_key else 'secret_key_file'}: {error}") from None
        return self

    def sealing_keys(self) -> list[bytes]:
        """Keys of 32 bytes that seal model keys and answers, the newest first. Raises ValueError."""
        return keys_of(self.secret_key, self.secret_key_file)

    def turn_keys(self) -> list[bytes]:
        """Keys that seal finished turns on their way to memory_worker; none = they travel in clear. Raises
        ValueError."""
        return keys_of(self.turn_key, self.turn_key_file)

    def user_limits(self) -> Limits:
        """Of users without a policy of their own."""
        return Limits(self.user_max_concurrency, self.user_rpm, self.user_tpm)


def load(environ: Mapping[str, str]) -> Settings:
    """Raises ConfigurationError with one line for each problem."""
    return load_settings(Settings, prefix=PREFIX, environ=environ)
