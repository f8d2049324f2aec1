"""Runs models on prepaid credit: the streaming path, the call journal and the model registry."""
