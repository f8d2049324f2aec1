"""Commands about models: register, test, watch, delete, and a file that says what there is to be."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from creditmesh.llm.v1 import model_service_pb2, model_service_pb2_grpc

from llm_service.cli.model_file import Change, ModelFileError, changes_between, read_model_file
from servicekit.cli import Client, add_client_options, fail, show_json


async def _register(client: Client, arguments: argparse.Namespace) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(client.channel)
    key = arguments.key_file.read_text().strip() if arguments.key_file else os.environ.get("MODEL_API_KEY", "")
    request = model_service_pb2.RegisterModelRequest(model=model_service_pb2.Model(
        alias=arguments.alias, provider=model_service_pb2.Provider.Value(f"PROVIDER_{arguments.provider}"),
        base_url=arguments.base_url, upstream_model=arguments.upstream_model, api_key=arguments.key or key,
        active=True, context_window=arguments.context_window, max_output_tokens=arguments.max_output_tokens,
        priority=arguments.priority, quirks=model_service_pb2.Quirks(server=arguments.server),
    ))
    show_json(await stub.RegisterModel(request, metadata=client.metadata, timeout=client.timeout))


async def _all_models(client: Client) -> list[model_service_pb2.Model]:
    stub = model_service_pb2_grpc.ModelServiceStub(client.channel)
    request = model_service_pb2.ListModelsRequest(page_size=500)
    found: list[model_service_pb2.Model] = []
    while True:
        page = await stub.ListModels(request, metadata=client.metadata, timeout=client.timeout)
        found += page.models
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def _models(client: Client, arguments: argparse.Namespace) -> None:
    found = await _all_models(client)
    if arguments.json:
        show_json(model_service_pb2.ListModelsResponse(models=found))
        return
    for model in found:
        provider = model_service_pb2.Provider.Name(model.provider).removeprefix("PROVIDER_")
        state = "active" if model.active else "off"
        print(f"{model.model_id}  {model.alias:<12} {state:<6}  priority {model.priority:<3} weight {model.weight:<3}"
              f"  {provider:<16} {model.upstream_model}  {model.base_url}  {model.api_key}".rstrip())


async def _delete(client: Client, arguments: argparse.Namespace) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(client.channel)
    request = model_service_pb2.DeleteModelRequest(model_id=arguments.model_id)
    await stub.DeleteModel(request, metadata=client.metadata, timeout=client.timeout)
    print("deleted")


async def _test(client: Client, arguments: argparse.Namespace) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(client.channel)
    request = model_service_pb2.TestModelRequest(model_id=arguments.model_id)
    answer = await stub.TestModel(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
    elif answer.ok:
        first = answer.first_token.ToTimedelta().total_seconds() * 1000
        total = answer.latency.ToTimedelta().total_seconds() * 1000
        print(f"ok: {answer.upstream_model}, first token after {first:.0f} ms, all after {total:.0f} ms,"
              f" {answer.usage.input_tokens} + {answer.usage.output_tokens} tokens")
    else:
        fail(f"failed: {answer.error_reason}: {answer.detail}")


async def _watch(client: Client, arguments: argparse.Namespace) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(client.channel)
    request = model_service_pb2.WatchModelsRequest(alias=arguments.alias)
    async for answer in stub.WatchModels(request, metadata=client.metadata):
        if arguments.json:
            show_json(answer)
        elif answer.synced:
            print(f"-- revision {answer.revision}; changes follow", flush=True)
        else:
            what = "deleted" if answer.deleted else "active" if answer.model.active else "off"
            name = answer.model.upstream_model
            print(f"{answer.model.alias:<12} {what:<8} {name}  {answer.model.model_id}", flush=True)


async def _apply(client: Client, arguments: argparse.Namespace) -> None:
    try:
        wanted = read_model_file(arguments.file.read_text(), os.environ)
    except ModelFileError as error:
        fail(*(f"{arguments.file}: {problem}" for problem in error.problems), code=2)
    changes, unchanged = changes_between(
        wanted, await _all_models(client), prune=arguments.prune, keys=arguments.keys
    )
    for change in changes:
        print(change.text())
    stub = model_service_pb2_grpc.ModelServiceStub(client.channel)
    if not arguments.dry_run:
        for change in changes:
            await _apply_one(stub, client, change)
    verb = "would change" if arguments.dry_run else "changed"
    print(f"{verb} {len([change for change in changes if change.is_done])}, {unchanged} as they should be")


async def _apply_one(stub: Any, client: Client, change: Change) -> None:
    """One change is one RPC: a file that breaks off half way is simply applied again."""
    options = {"metadata": client.metadata, "timeout": client.timeout}
    if change.kind == "+":
        await stub.RegisterModel(model_service_pb2.RegisterModelRequest(model=change.wanted), **options)
    elif change.kind == "~":
        model = model_service_pb2.Model()
        assert change.wanted is not None
        model.CopyFrom(change.wanted)
        model.model_id = change.model_id
        request = model_service_pb2.UpdateModelRequest(model=model)
        request.update_mask.paths.extend(change.fields)
        await stub.UpdateModel(request, **options)
    elif change.kind == "-":
        await stub.DeleteModel(model_service_pb2.DeleteModelRequest(model_id=change.model_id), **options)


def add_to(commands: Any, target: str) -> None:
    """Adds register-model, models, test-model, watch-models, delete-model, apply."""
    register = commands.add_parser("register-model", help="register a model server's model")
    register.add_argument("--alias", default="pro")
    register.add_argument(
        "--provider", default="OPENAI_CHAT", choices=("OPENAI_CHAT", "OPENAI_RESPONSES", "ANTHROPIC"),
        help="its protocol (%(default)s)",
    )
    register.add_argument("--base-url", required=True, help="e.g. http://127.0.0.1:3030/v1")
    register.add_argument("--upstream-model", required=True, help="name that the model server knows the model by")
    register.add_argument("--server", default="", help="preset: openai, azure, deepseek, vllm, ollama, openrouter")
    register.add_argument("--key", default="", help="its key; better --key-file or $MODEL_API_KEY")
    register.add_argument("--key-file", type=Path)
    register.add_argument("--priority", type=int, default=0, help="lower is asked first")
    register.add_argument("--context-window", type=int, default=0)
    register.add_argument("--max-output-tokens", type=int, default=0)
    register.set_defaults(client=_register)
    models = commands.add_parser("models", help="the registered models")
    models.set_defaults(client=_models)
    test = commands.add_parser("test-model", help="make one tiny real call to a model, charged to nobody")
    test.add_argument("model_id")
    test.set_defaults(client=_test)
    watch = commands.add_parser("watch-models", help="the models now, and every change")
    watch.add_argument("--alias", default="")
    watch.set_defaults(client=_watch)
    delete = commands.add_parser("delete-model", help="remove a model")
    delete.add_argument("model_id")
    delete.set_defaults(client=_delete)
    apply = commands.add_parser("apply", help="make the registered models those of a file (models.yaml)")
    apply.add_argument("file", type=Path)
    apply.add_argument("--dry-run", action="store_true", help="show what would change, change nothing")
    apply.add_argument("--prune", action="store_true", help="delete models that the file does not name")
    apply.add_argument("--keys", action="store_true", help="send every key again, also where its ends are the same")
    apply.set_defaults(client=_apply)
    for command in (register, models, test, watch, delete, apply):
        add_client_options(command, target=target)
