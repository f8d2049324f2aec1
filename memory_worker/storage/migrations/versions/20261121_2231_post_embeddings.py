"""The vectors left the items."""

from alembic import op

revision = "20261121_2231"
down_revision = "20261121_2230"

STATEMENTS = (
    # What the old code wrote while the new one came.
    """
    INSERT INTO embedding (user_id, embedder, item_id, version, is_active, type, sensitivity, expires_at, vector)
    SELECT user_id, embedder, item_id, version, status = 1, type, sensitivity, expires_at, embedding
    FROM item WHERE embedding IS NOT NULL ON CONFLICT DO NOTHING
    """,
    "ALTER TABLE item DROP COLUMN embedding, DROP COLUMN embedder",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
