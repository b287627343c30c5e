"""An evaluation belongs to a deployment; what was evaluated before belongs to none, so it ships nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the deployment of an evaluation."""
    op.add_column("evaluations", sa.Column("deployment", sa.String(), nullable=True))
    op.create_index(op.f("ix_evaluations_deployment"), "evaluations", ["deployment"], unique=False)
