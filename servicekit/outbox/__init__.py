"""The transactional outbox: rows committed with the state they tell of, published by the relay and nobody else."""
