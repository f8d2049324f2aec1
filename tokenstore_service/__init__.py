"""Credit accounts, holds, the ledger and prices; charges come in by RPC or by Kafka."""
