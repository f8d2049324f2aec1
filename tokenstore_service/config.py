"""Settings of tokenstore_service: environment variables `TOKENSTORE_<FIELD>`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from servicekit.settings import Address, AddressOrOff, ServerSettings, load_settings
from tokenstore_service.domain.policy import Policy

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
    balance_cache_seconds: float = Field(default=0.5, ge=0, le=60)
    allow_mock_payment: bool = False
    payment_secrets_file: Path | None = None
    late_payment: Literal["credit", "flag"] = "credit"
    order_expiry_seconds: float = Field(default=1800.0, ge=0)
    refund_spent: bool = False
    lot_grace_days: float = Field(default=0.0, ge=0, le=3650)
    reprice: Literal["manual", "auto"] = "manual"
    balance_events: Literal["off", "notable", "all"] = "notable"
    low_balance_credits: str = ""
    low_balance_rise_percent: int = Field(default=10, ge=0, le=1000)
    verify_seconds: float = Field(default=3600.0, ge=0)

    @field_validator("low_balance_credits")
    @classmethod
    def _check_thresholds(cls, value: str) -> str:
        thresholds_from_text(value)
        return value

    def policy(self) -> Policy:
        """What the rules are told."""
        return Policy(
            lot_grace=timedelta(days=self.lot_grace_days), credit_late_payments=self.late_payment == "credit",
            refund_spent=self.refund_spent, low_balances=thresholds_from_text(self.low_balance_credits),
            rise_percent=self.low_balance_rise_percent,
            announce=bool(self.kafka_bootstrap_servers) and self.balance_events != "off",
            announce_all=self.balance_events == "all",
        )


def thresholds_from_text(text: str) -> tuple[int, ...]:
    """`100,10` credits as micro-credits, highest first. Raises ValueError."""
    try:
        values = {int(Decimal(part) * 1_000_000) for part in text.split(",") if part.strip()}
    except InvalidOperation:
        raise ValueError("must be credits such as 100,10") from None
    return tuple(sorted(values, reverse=True))


def load(environ: Mapping[str, str]) -> Settings:
    """Raises ConfigurationError with one line for each problem."""
    return load_settings(Settings, prefix=PREFIX, environ=environ)
