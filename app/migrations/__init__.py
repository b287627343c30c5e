"""Alembic migrations of the ledger; `app.ledger.Ledger.open` applies them."""
