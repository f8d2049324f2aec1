"""Deployments, the built-in model, token counts, sealed keys."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llm_service.clients.local_model import LocalModel, reply_to
from llm_service.clients.token_counter import BpeTokenCounter
from llm_service.domain.chat import FinishReason, ImagePart, Message, Prompt, Role, TextPart
from llm_service.domain.deployment import BUILT_IN, Deployment, Directory, masked_key
from llm_service.domain.errors import ModelNotFound, ModelNotReady, SecretKeyMissing
from llm_service.storage.sealed_keys import KeySealer

TOKENS = BpeTokenCounter()


def nothing() -> None:
    pass


def deployment(model_id: str, **fields: object) -> Deployment:
    values: dict[str, object] = {"model_id": model_id, "alias": "pro", **fields}
    return replace(BUILT_IN, **values)  # type: ignore[arg-type]


def prompt(text: str, **fields: object) -> Prompt:
    return Prompt((Message(Role.USER, (TextPart(text),)),), **fields)  # type: ignore[arg-type]


def first(deployments: object) -> Deployment:
    return deployments[0]  # type: ignore[index,no-any-return]


def test_the_built_in_model_serves_pro_only_while_nothing_is_registered() -> None:
    assert Directory().resolve("pro", choose=first) is BUILT_IN
    with pytest.raises(ModelNotFound):
        Directory().resolve("max", choose=first)
    with pytest.raises(ModelNotFound):
        Directory([deployment("1", alias="lite")]).resolve("pro", choose=first)


def test_the_lowest_priority_serves_and_inactive_models_do_not() -> None:
    directory = Directory([
        deployment("off", active=False), deployment("later", priority=2), deployment("a", priority=1),
        deployment("b", priority=1),
    ])
    offered: list[str] = []

    def choose(deployments: object) -> Deployment:
        offered.extend(each.model_id for each in deployments)  # type: ignore[attr-defined]
        return first(deployments)

    directory.resolve("pro", choose=choose)
    assert offered == ["a", "b"]
    with pytest.raises(ModelNotReady):
        Directory([deployment("off", active=False)]).resolve("pro", choose=first)


@pytest.mark.parametrize(("key", "shown"), [("", ""), ("short", "..."), ("sk-0123456789abwxyz", "sk-...wxyz")])
def test_a_key_is_shown_masked(key: str, shown: str) -> None:
    assert masked_key(key) == shown
    assert "api_key" not in repr(deployment("x", api_key="sk-secret"))


async def test_the_local_model_is_deterministic_and_counts_for_real() -> None:
    model = LocalModel(TOKENS, tokens_per_second=0)
    once = await model.generate(BUILT_IN, prompt("hello"), max_output_tokens=4096, on_sent=nothing)
    again = await model.generate(BUILT_IN, prompt("hello"), max_output_tokens=4096, on_sent=nothing)
    other = await model.generate(BUILT_IN, prompt("goodbye"), max_output_tokens=4096, on_sent=nothing)
    assert once == again != other
    text = once.message.parts[0].text  # type: ignore[union-attr]
    assert "LOCAL" in text
    assert once.usage is not None
    assert once.usage.output_tokens == TOKENS.count_text(text)
    assert once.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("bound", [1, 5, 30])
async def test_the_local_model_keeps_to_its_bound(bound: int) -> None:
    answer = await LocalModel(TOKENS, tokens_per_second=0).generate(BUILT_IN, prompt("x"), max_output_tokens=bound, on_sent=nothing)
    assert answer.usage is not None
    assert answer.usage.output_tokens <= bound
    assert answer.finish_reason is FinishReason.LENGTH


async def test_the_local_model_stops_at_a_stop_string() -> None:
    answer = await LocalModel(TOKENS, tokens_per_second=0).generate(
        BUILT_IN, prompt("x", stop=("offline",)), max_output_tokens=4096, on_sent=nothing
    )
    assert "offline" not in answer.message.parts[0].text  # type: ignore[union-attr]


def test_the_local_reply_quotes_the_last_thing_said() -> None:
    assert '"hello there"' in "".join(reply_to(prompt("hello \n there")))


async def test_tokens_are_counted_by_a_real_vocabulary() -> None:
    assert TOKENS.count_text("hello world") == 2
    assert TOKENS.count_text("") == 0
    plain = await TOKENS.count_prompt(prompt("hello world"))
    assert plain == 2 + 4 + 3
    picture = Prompt((Message(Role.USER, (TextPart("hello world"), ImagePart("http://x", b"", "", ""))),))
    assert await TOKENS.count_prompt(picture) > plain + 1000
    long_one = await TOKENS.count_prompt(prompt("word " * 50_000))
    assert 50_000 <= long_one <= 50_010 + 7


def test_a_sealed_key_opens_only_for_its_model_and_under_its_secret() -> None:
    sealer = KeySealer(bytes(32))
    sealed = sealer.seal("sk-secret", model_id="m1")
    assert sealed is not None
    assert b"sk-secret" not in sealed
    assert sealer.open(sealed, model_id="m1") == "sk-secret"
    for other, model_id, box in (
        (sealer, "m2", sealed), (KeySealer(bytes([1]) * 32), "m1", sealed), (KeySealer(None), "m1", sealed),
        (sealer, "m1", sealed[:-1] + bytes([sealed[-1] ^ 1])),
    ):
        with pytest.raises(SecretKeyMissing):
            other.open(box, model_id=model_id)
    with pytest.raises(SecretKeyMissing):
        KeySealer(None).seal("sk-secret", model_id="m1")
    assert KeySealer(None).seal("", model_id="m1") is None
