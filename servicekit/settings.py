"""Settings from the environment: frozen, checked all at once before any socket opens, told redacted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from servicekit.core.faults import faults_from

DNS = "dns:///"
AnySettings = TypeVar("AnySettings", bound=BaseModel)


class ConfigurationError(Exception):
    """The environment does not make a configuration; `problems` holds one line for each reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as (host, port). Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be host:port, e.g. 127.0.0.1:50051")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    host, _ = split_address(address)
    return host in {"localhost", "::1"} or host.startswith("127.")


def _address(value: str) -> str:
    split_address(value)
    return value


def _address_or_off(value: str) -> str:
    return _address(value) if value else value


def _target(value: str) -> str:
    split_address(value.removeprefix(DNS))
    return value


def _target_or_off(value: str) -> str:
    return _target(value) if value else value


def _postgres_url(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise ValueError("must be a postgresql:// URL")
    return value


def _http_or_empty(value: str) -> str:
    if value and not value.startswith(("http://", "https://")):
        raise ValueError("must be an address, e.g. http://127.0.0.1:4317")
    return value


def _fault(value: str) -> str:
    faults_from(value)
    return value


Address = Annotated[str, AfterValidator(_address)]
AddressOrOff = Annotated[str, AfterValidator(_address_or_off)]
Target = Annotated[str, AfterValidator(_target)]
"""Where a service is called: `host:port`, also as gRPC writes it, `dns:///host:port`."""
TargetOrOff = Annotated[str, AfterValidator(_target_or_off)]
PostgresUrl = Annotated[SecretStr, AfterValidator(_postgres_url)]


class ServerSettings(BaseModel):
    """What every server is told. Each field is the environment variable `<PREFIX>_<FIELD>` in capitals."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    listen: Address
    metrics_listen: AddressOrOff
    database_url: PostgresUrl
    database_password_file: Path | None = None
    database_pool_size: int = Field(default=8, ge=2, le=200)
    workers: int = Field(default=1, ge=1, le=64)
    drain_seconds: float = Field(default=30.0, ge=0, le=3600)
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None
    auth: Literal["tokens", "none"] = "tokens"
    auth_tokens_file: Path | None = None
    reflection_open: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: Literal["all", "errors"] = "all"
    otlp_endpoint: Annotated[str, AfterValidator(_http_or_empty)] = ""
    trace_ratio: float = Field(default=1.0, ge=0, le=1)
    fault: Annotated[str, AfterValidator(_fault)] = ""

    def full_database_url(self) -> str:
        """With the password; for the driver alone."""
        return database_url_of(self.database_url.get_secret_value(), self.database_password_file)

    @model_validator(mode="after")
    def _check_together(self) -> ServerSettings:
        if self.auth == "tokens" and self.auth_tokens_file is None:
            raise ValueError("auth_tokens_file: is required while auth is 'tokens'")
        if self.auth == "none" and not is_loopback(self.listen):
            raise ValueError("auth: 'none' is refused unless listen is a loopback address")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file: goes together with tls_key_file")
        if self.tls_client_ca_file and not self.tls_cert_file:
            raise ValueError("tls_client_ca_file: needs tls_cert_file and tls_key_file")
        for name, value in self:
            if name.endswith("_file") and isinstance(value, Path) and not value.is_file():
                raise ValueError(f"{name}: {value} is not a file")
        return self


def database_url_of(url: str, password_file: Path | None) -> str:
    """The URL with the password of the file in it."""
    if password_file is None:
        return url
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    password = quote(password_file.read_text().strip(), safe="")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:{password}{at or '@'}{host}"))


def load_settings(settings: type[AnySettings], *, prefix: str, environ: Mapping[str, str]) -> AnySettings:
    """Reads `<prefix>_*`. Raises ConfigurationError with every problem, unknown names too. Empty = not set."""
    values = {
        name.removeprefix(f"{prefix}_").lower(): value
        for name, value in environ.items() if name.startswith(f"{prefix}_")
    }
    emptiable = {
        name for name, field in settings.model_fields.items() if field.annotation is str or name == "metrics_listen"
    }
    values = {name: value for name, value in values.items() if value or name in emptiable}
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in detail["loc"])
            text = detail["msg"].removeprefix("Value error, ")
            if not name:
                name, _, text = text.partition(": ")
            if detail["type"] == "missing":
                text = "is required"
            if detail["type"] == "extra_forbidden":
                text = "is not a known setting"
            problems.append(f"{prefix}_{name.upper()}: {text}")
        raise ConfigurationError(problems) from None


def redacted(settings: BaseModel) -> dict[str, str]:
    """Settings as text for the start-up log; secrets show as stars."""
    return {name: str(value) for name, value in settings}
