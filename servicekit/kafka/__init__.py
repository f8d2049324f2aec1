"""Kafka by librdkafka: an idempotent producer for the outbox, a consumer whose offsets live with its effects."""
