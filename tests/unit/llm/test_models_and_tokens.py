"""Deployments, the built-in model, sealed keys."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import replace

import pytest

from llm_service.clients.local_model import LocalModel, manners_of, reply_to, vector_of
from llm_service.clients.token_counter import BpeTokenCounter
from llm_service.domain.chat import FinishReason, JsonSchema, Message, Prompt, Role, TextPart
from llm_service.domain.deployment import BUILT_IN, Capabilities, Deployment, Directory, Provider, masked_key
from llm_service.domain.errors import ModelNotFound, ModelNotReady, SecretKeyMissing
from llm_service.domain.structured_output import check_answer
from llm_service.storage.sealed_keys import KeySealer
from llm_service.usecases.ports import Question, UpstreamChunk
from servicekit.sealing import parse_secret_keys

TOKENS = BpeTokenCounter()


def nothing() -> None:
    pass


def deployment(model_id: str, **fields: object) -> Deployment:
    values: dict[str, object] = {"model_id": model_id, "alias": "pro", **fields}
    return replace(BUILT_IN, **values)  # type: ignore[arg-type]


def prompt(text: str, **fields: object) -> Prompt:
    return Prompt((Message(Role.USER, (TextPart(text),)),), **fields)  # type: ignore[arg-type]


def names(tiers: list[list[Deployment]]) -> list[list[str]]:
    return [[each.model_id for each in tier] for tier in tiers]


def test_the_built_in_model_serves_pro_only_while_nothing_is_registered() -> None:
    assert Directory().tiers("pro", draw=random.random) == [[BUILT_IN]]
    with pytest.raises(ModelNotFound):
        Directory().tiers("max", draw=random.random)
    with pytest.raises(ModelNotFound):
        Directory([deployment("1", alias="lite")]).tiers("pro", draw=random.random)


def test_models_are_asked_by_priority_and_inactive_ones_never() -> None:
    directory = Directory([
        deployment("off", active=False), deployment("later", priority=2), deployment("a", priority=1),
        deployment("b", priority=1),
    ])
    first, second = names(directory.tiers("pro", draw=random.random))
    assert (sorted(first), second) == (["a", "b"], ["later"])
    with pytest.raises(ModelNotReady):
        Directory([deployment("off", active=False)]).tiers("pro", draw=random.random)


def test_weights_spread_the_load_within_a_priority() -> None:
    directory = Directory([deployment("a", weight=1), deployment("b", weight=3)])
    draw = random.Random(7).random
    firsts = [names(directory.tiers("pro", draw=draw))[0][0] for _ in range(4000)]
    assert 0.7 < firsts.count("b") / len(firsts) < 0.8


def test_models_that_can_not_do_what_is_needed_are_left_out() -> None:
    blind = deployment("blind", capabilities=Capabilities(images=False))
    seeing = deployment("seeing", priority=1)
    assert names(Directory([blind, seeing]).tiers("pro", draw=random.random, needed=frozenset({"images"}))) == [["seeing"]]
    with pytest.raises(ModelNotReady, match="images"):
        Directory([blind]).tiers("pro", draw=random.random, needed=frozenset({"images"}))
    messages = deployment("m", provider=Provider.ANTHROPIC)
    assert not messages.can("json_schema")
    assert replace(messages, capabilities=Capabilities(json_schema=True)).can("json_schema")


@pytest.mark.parametrize(("key", "shown"), [("", ""), ("short", "..."), ("sk-0123456789abwxyz", "sk-...wxyz")])
def test_a_key_is_shown_masked(key: str, shown: str) -> None:
    assert masked_key(key) == shown
    assert "api_key" not in repr(deployment("x", api_key="sk-secret"))


async def answer(question: Prompt, *, bound: int = 4096) -> UpstreamChunk:
    model = LocalModel(TOKENS, tokens_per_second=0)
    (chunk,) = [each async for each in model.ask(BUILT_IN, Question(question, bound, whole=True), on_sent=nothing)]
    return chunk


def text_of(chunk: UpstreamChunk) -> str:
    return "".join(delta.text for delta in chunk.deltas)


async def test_the_local_model_is_deterministic_and_counts_for_real() -> None:
    once, again, other = await answer(prompt("hello")), await answer(prompt("hello")), await answer(prompt("goodbye"))
    assert once == again != other
    assert "LOCAL" in text_of(once)
    assert once.usage is not None
    assert once.usage.output_tokens == TOKENS.count_text(text_of(once))
    assert once.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("bound", [1, 5, 30])
async def test_the_local_model_keeps_to_its_bound(bound: int) -> None:
    told = await answer(prompt("x"), bound=bound)
    assert told.usage is not None
    assert told.usage.output_tokens <= bound
    assert told.finish_reason is FinishReason.LENGTH


async def test_the_local_model_stops_at_a_stop_string() -> None:
    assert "offline" not in text_of(await answer(prompt("x", stop=("offline",))))


async def test_the_local_model_answers_a_schema_with_a_valid_instance() -> None:
    schema = json.dumps({
        "$defs": {"city": {"type": "object", "properties": {"name": {"type": "string", "minLength": 3}, "at": {"$ref": "#/$defs/point"}}, "required": ["name", "at"]},
                  "point": {"type": "array", "items": {"type": "number", "minimum": 5}, "minItems": 2, "maxItems": 2}},
        "type": "object", "additionalProperties": False,
        "properties": {
            "cities": {"type": "array", "items": {"$ref": "#/$defs/city"}, "minItems": 2}, "ok": {"type": "boolean"},
            "kind": {"enum": ["b", "a"]}, "count": {"type": "integer", "multipleOf": 7, "minimum": 8},
            "maybe": {"anyOf": [{"type": "null"}, {"type": "string"}]}, "at": {"type": "string", "format": "date-time"},
            "both": {"allOf": [{"type": "object", "properties": {"x": {"const": 5}}, "required": ["x"]}, {"properties": {"y": {"type": ["string", "null"]}}}]},
        },
        "required": ["cities", "ok", "kind", "count", "maybe", "at", "both"],
    })
    told = await answer(prompt("go", json_schema=JsonSchema("s", schema, strict=True)))
    assert check_answer(text_of(told), schema).violation is None


def test_the_local_model_says_what_it_does_not_know() -> None:
    for params in ({"nonsense": 1}, {"words": "many"}):
        with pytest.raises(ValueError):
            manners_of(params)


def test_local_vectors_are_near_for_near_texts() -> None:
    def near(first: str, second: str) -> float:
        return sum(a * b for a, b in zip(vector_of(first, 256), vector_of(second, 256), strict=True))

    assert near("I love green tea", "I love green tea") == pytest.approx(1.0)
    assert near("I love green tea", "I love black tea") > near("I love green tea", "the ledger has no gaps") + 0.2


def test_the_local_reply_quotes_the_last_thing_said() -> None:
    assert '"hello there"' in "".join(reply_to(prompt("hello \n there")))


def test_a_sealed_key_opens_only_for_its_model_and_under_its_secret() -> None:
    sealer = KeySealer([bytes(32)])
    sealed = sealer.seal("sk-secret", model_id="m1")
    assert sealed is not None
    assert b"sk-secret" not in sealed
    assert sealer.open(sealed, model_id="m1") == "sk-secret"
    for other, model_id, box in (
        (sealer, "m2", sealed), (KeySealer([bytes([1]) * 32]), "m1", sealed), (KeySealer([]), "m1", sealed),
        (sealer, "m1", sealed[:-1] + bytes([sealed[-1] ^ 1])),
    ):
        with pytest.raises(SecretKeyMissing):
            other.open(box, model_id=model_id)
    with pytest.raises(SecretKeyMissing):
        KeySealer([]).seal("sk-secret", model_id="m1")
    assert KeySealer([]).seal("", model_id="m1") is None


def test_an_older_secret_key_still_opens_and_the_newest_seals() -> None:
    old, new = bytes(32), bytes([1]) * 32
    sealed = KeySealer([old]).seal("sk-secret", model_id="m")
    assert sealed is not None
    both = KeySealer([new, old])
    assert both.open(sealed, model_id="m") == "sk-secret"
    assert not both.is_newest(sealed)
    again = both.seal("sk-secret", model_id="m")
    assert again is not None
    assert both.is_newest(again)
    assert KeySealer([new]).open(again, model_id="m") == "sk-secret"
    text = ",\n".join(base64.b64encode(key).decode() for key in (new, old))
    assert parse_secret_keys(text) == [new, old]
    for bad in ("", "AAAA", "not base64!"):
        with pytest.raises(ValueError):
            parse_secret_keys(bad)
