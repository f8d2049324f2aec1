"""Makes the secrets of docker-compose.yml, once: python -m deploy.make_secrets. Existing files are left alone."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from pathlib import Path

FOLDER = Path(__file__).parent / "secrets"
LLM_SCOPES = ["holds.write", "charges.write", "balance.read", "memory.read", "memory.write"]
MEMORY_SCOPES = ["llm.call", "billing.skip"]
BACKEND_SCOPES = ["llm.call", "balance.read", "ledger.read", "memory.read", "memory.write"]
OPERATOR_SCOPES = [*BACKEND_SCOPES, "models.admin", "prices.admin", "ledger.adjust", "memory.admin"]


def write_once(name: str, text: str) -> str:
    """The text that is in the file in the end."""
    path = FOLDER / name
    if not path.exists():
        path.write_text(text)
        path.chmod(0o444)  # the containers' user reads it; on the host the folder keeps others out
        print(f"made {path}")
    return path.read_text().strip()


def main() -> None:
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    write_once("postgres_password", secrets.token_urlsafe(24))
    write_once("llm_secret_key", base64.b64encode(secrets.token_bytes(32)).decode())
    tokens = {
        "llm_service": (write_once("llm_token", secrets.token_urlsafe(32)), LLM_SCOPES),
        "memory_worker": (write_once("memory_token", secrets.token_urlsafe(32)), MEMORY_SCOPES),
        "backend": (write_once("backend_token", secrets.token_urlsafe(32)), BACKEND_SCOPES),
        "operator": (write_once("operator_token", secrets.token_urlsafe(32)), OPERATOR_SCOPES),
    }
    write_once("service_tokens.json", json.dumps({"tokens": [
        {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), "scopes": scopes}
        for name, (token, scopes) in tokens.items()
    ]}, indent=2))


if __name__ == "__main__":
    main()
