"""The trace that an event belongs to."""

from alembic import op

from servicekit.outbox import table as outbox

revision = "20261121_1400"
down_revision = "20261121_1200"


def upgrade() -> None:
    op.execute(outbox.ADD_TRACEPARENT)
