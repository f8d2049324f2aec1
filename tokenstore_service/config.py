"""Settings of tokenstore_service: environment variables `TOKENSTORE_<FIELD>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from servicekit.settings import Address, AddressOrOff, ServerSettings, load_settings

PREFIX = "TOKENSTORE"


class Settings(ServerSettings):
    """What tokenstore_service is told; see servicekit.settings.ServerSettings for the rest."""

    listen: Address = "127.0.0.1:50052"
    metrics_listen: AddressOrOff = "127.0.0.1:9092"
    kafka_bootstrap_servers: str = ""
    kafka_group: str = "creditmesh-tokenstore"
    kafka_group_protocol: Literal["auto", "consumer", "classic"] = "auto"
    kafka_topic_prefix: str = ""
    redis_url: str = ""


def load(environ: Mapping[str, str]) -> Settings:
    """Raises ConfigurationError with one line for each problem."""
    return load_settings(Settings, prefix=PREFIX, environ=environ)
