"""What a settlement does to its conversation, in the settlement's own statement.

Every settled call whose billing names a conversation of its user is added to that conversation's totals and the user's,
once, so that both reconcile with the ledger. The call that answers a turn also ends it: its answer is stored and the
head moves on, or, uncharged, the turn is taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

from llm_service.domain.call import CallRecord, CallState
from llm_service.domain.chat import Message
from llm_service.domain.conversation import ConversationStatus, MessageState, is_cut
from llm_service.storage.content import ContentBox
from llm_service.usecases.conversation_ports import TaskKind
from llm_service.usecases.ports import Heartbeat, Settlement, TurnEnd
from servicekit.outbox.message import lane_of
from servicekit.outbox.table import INSERT_COLUMNS

RECORD_COLUMNS = """
    conversation uuid, turn_content text, turn_tokens integer, turn_family text, turn_state smallint,
    turn_key text, turn_event text, turn_type text, turn_topic text, turn_payload text, turn_lane smallint,
    turn_summary integer, turn_memories jsonb
"""
_IS_SETTLED = f"t.state = {CallState.SETTLED:d}"
_SAME = "t.user_id = {0}.user_id AND t.conversation_id = {0}.conversation_id"

# Conversations are locked in order, so that two batches can not wait for each other.
SETTLE = f""", ended AS MATERIALIZED (
    SELECT d.*, d.conversation AS its_conversation, coalesce(d.credit_micros, 0) AS micros,
        CASE WHEN d.state = {CallState.SETTLED:d} THEN d.input_tokens + d.output_tokens ELSE 0 END AS tokens
    FROM data d JOIN settled USING (user_id, call_id) WHERE d.conversation IS NOT NULL
), locked AS MATERIALIZED (
    SELECT c.user_id, c.conversation_id, c.title, c.compact_history, c.deleted_at, c.running_call_id, c.running_branch,
        c.running_first, c.running_last, c.running_message_id
    FROM conversation c
    WHERE (c.user_id, c.conversation_id) IN (SELECT user_id, its_conversation FROM ended)
    ORDER BY c.user_id, c.conversation_id FOR UPDATE
), turn AS MATERIALIZED (
    SELECT e.user_id, e.its_conversation AS conversation_id, e.call_id, e.state, e.tokens, e.micros, e.ended_at,
        e.finish_reason, e.traceparent, e.turn_content, e.turn_tokens, e.turn_family, e.turn_state, e.turn_event,
        e.turn_key, e.turn_type, e.turn_topic, e.turn_payload, e.turn_lane, e.turn_summary, e.turn_memories, l.title,
        l.compact_history,
        l.running_branch AS branch, l.running_first AS first, l.running_last AS last, l.running_message_id AS message_id
    FROM ended e JOIN locked l
        ON l.user_id = e.user_id AND l.conversation_id = e.its_conversation AND l.running_call_id = e.call_id
), sums AS (
    SELECT e.user_id, e.its_conversation AS conversation_id, sum(e.tokens)::bigint AS tokens,
        sum(e.micros)::bigint AS micros
    FROM ended e JOIN locked l ON l.user_id = e.user_id AND l.conversation_id = e.its_conversation
    GROUP BY 1, 2
), totals AS (
    UPDATE conversation c SET
        tokens_total = c.tokens_total + s.tokens, credit_micros_total = c.credit_micros_total + s.micros,
        message_count = c.message_count + CASE WHEN {_IS_SETTLED} THEN t.last - t.first + 1 ELSE 0 END,
        branch = CASE WHEN {_IS_SETTLED} THEN t.branch ELSE c.branch END,
        length = CASE WHEN {_IS_SETTLED} THEN t.last + 1 ELSE c.length END,
        head_message_id = CASE WHEN {_IS_SETTLED} THEN t.message_id ELSE c.head_message_id END,
        last_message_at = CASE WHEN {_IS_SETTLED} THEN greatest(t.ended_at, c.last_message_at)
            ELSE c.last_message_at END,
        status = CASE WHEN {_IS_SETTLED} THEN {ConversationStatus.ACTIVE:d} ELSE c.status END,
        running_call_id = CASE WHEN t.call_id IS NULL THEN c.running_call_id END,
        running_message_id = CASE WHEN t.call_id IS NULL THEN c.running_message_id END,
        running_request_id = CASE WHEN t.call_id IS NULL THEN c.running_request_id END,
        running_branch = CASE WHEN t.call_id IS NULL THEN c.running_branch END,
        running_first = CASE WHEN t.call_id IS NULL THEN c.running_first END,
        running_last = CASE WHEN t.call_id IS NULL THEN c.running_last END,
        running_until = CASE WHEN t.call_id IS NULL THEN c.running_until END
    FROM sums s LEFT JOIN turn t ON {_SAME.format("s")}
    WHERE c.user_id = s.user_id AND c.conversation_id = s.conversation_id
), users AS (
    INSERT INTO user_total AS u (user_id, tokens_total, credit_micros_total)
    SELECT user_id, sum(tokens)::bigint, sum(micros)::bigint FROM sums GROUP BY user_id ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE SET
        tokens_total = u.tokens_total + excluded.tokens_total,
        credit_micros_total = u.credit_micros_total + excluded.credit_micros_total
), answered AS (
    UPDATE message m SET
        content = coalesce(decode(t.turn_content, 'hex'), m.content),
        prompt_tokens = coalesce(t.turn_tokens, m.prompt_tokens),
        token_family = coalesce(t.turn_family, m.token_family), memory_ids = coalesce(t.turn_memories, m.memory_ids),
        state = coalesce(t.turn_state, {MessageState.CUT:d}), tokens_consumed = t.tokens, credit_micros = t.micros,
        finish_reason = t.finish_reason, created_at = t.ended_at
    FROM turn t
    WHERE {_IS_SETTLED} AND {_SAME.format("m")} AND m.branch = t.branch AND m.position = t.last
), undone AS (
    DELETE FROM message m USING turn t
    WHERE NOT {_IS_SETTLED} AND {_SAME.format("m")} AND m.branch = t.branch AND m.position BETWEEN t.first AND t.last
), unforked AS (
    DELETE FROM branch b USING turn t
    WHERE NOT {_IS_SETTLED} AND {_SAME.format("b")} AND b.number = t.branch AND b.forked_at = t.first
), tasks AS (
    INSERT INTO conversation_task (user_id, conversation_id, kind, branch, until, tries, due_at)
    SELECT t.user_id, t.conversation_id, {TaskKind.TITLE:d}, 0, 0, 0, now() FROM turn t
    WHERE {_IS_SETTLED} AND t.title = ''
    UNION ALL
    SELECT t.user_id, t.conversation_id, {TaskKind.SUMMARY:d}, t.branch, t.turn_summary, 0, now() FROM turn t
    WHERE {_IS_SETTLED} AND t.turn_summary > 0 AND t.compact_history
    ON CONFLICT DO NOTHING
), told AS (
    INSERT INTO outbox_message ({INSERT_COLUMNS}, traceparent)
    SELECT t.turn_lane, t.turn_key, t.turn_event, t.turn_type, t.turn_topic, decode(t.turn_payload, 'hex'),
        coalesce(t.traceparent, '')
    FROM turn t WHERE {_IS_SETTLED} AND t.turn_payload IS NOT NULL
)
"""
CORRECT = """added AS (
    UPDATE conversation c SET
        tokens_total = c.tokens_total + d.more_tokens, credit_micros_total = c.credit_micros_total + d.more_micros
    FROM data d JOIN corrected USING (user_id, call_id)
    WHERE c.user_id = d.user_id AND c.conversation_id = d.conversation
    RETURNING c.user_id, d.more_tokens, d.more_micros
), added_to_user AS (
    UPDATE user_total u SET
        tokens_total = u.tokens_total + a.more_tokens, credit_micros_total = u.credit_micros_total + a.more_micros
    FROM added a WHERE u.user_id = a.user_id
), added_to_message AS (
    UPDATE message m SET
        tokens_consumed = m.tokens_consumed + d.more_tokens, credit_micros = m.credit_micros + d.more_micros
    FROM data d JOIN corrected USING (user_id, call_id)
    WHERE m.user_id = d.user_id AND m.conversation_id = d.conversation AND m.call_id = d.call_id
)"""
# What was delivered so far, for the case that the process dies; an answer that is stored is left alone.
KEEP_SO_FAR = f"""
UPDATE message m SET content = decode(d.content, 'hex'), prompt_tokens = d.tokens, memory_ids = d.memory_ids
FROM json_to_recordset(%(turns)s::json) AS d (
    user_id text, conversation uuid, message_id uuid, content text, tokens integer, memory_ids jsonb
)
WHERE m.user_id = d.user_id AND m.conversation_id = d.conversation AND m.message_id = d.message_id
    AND m.state = {MessageState.PENDING:d}
"""
TurnEvent = Callable[[TurnEnd, CallRecord], tuple[str, str, str, str, bytes] | None]
"""Key, id, type, topic and bytes of a turn's event."""


class TurnRows:
    """Turns as values of the journal's statements. `event_of` makes the event of a finished turn, or None when nobody
    is to be told."""

    def __init__(
        self, box: ContentBox, *, message_to_bytes: Callable[[Message], bytes], event_of: TurnEvent
    ) -> None:
        self._box = box
        self._message_to_bytes = message_to_bytes
        self._event_of = event_of

    def settlement_to_row(self, settlement: Settlement) -> dict[str, Any]:
        record, end = settlement.record, settlement.turn_end
        conversation_id = conversation_of(record)
        if conversation_id is None:
            return {}
        row: dict[str, Any] = {"conversation": str(conversation_id)}
        if end is not None and record.state is CallState.SETTLED:
            packed = self._box.pack(self._message_to_bytes(end.message), conversation_id=conversation_id)
            state = MessageState.CUT if is_cut(record.finish_reason) else MessageState.COMPLETE
            row |= {
                "turn_content": packed.hex(), "turn_tokens": end.prompt_tokens, "turn_family": end.token_family,
                "turn_state": int(state), "turn_summary": end.summary_until,
                "turn_memories": end.turn.memory_ids,
            }
            if (event := self._event_of(end, record)) is not None:
                key, event_id, event_type, topic, payload = event
                row |= {
                    "turn_key": key, "turn_event": event_id, "turn_type": event_type, "turn_topic": topic,
                    "turn_payload": payload.hex(), "turn_lane": lane_of(key),
                }
        return row

    def so_far_to_row(self, beat: Heartbeat) -> dict[str, Any]:
        end = beat.turn_end
        assert end is not None
        turn = end.turn
        packed = self._box.pack(self._message_to_bytes(end.message), conversation_id=turn.conversation_id)
        return {
            "user_id": turn.user_id, "conversation": str(turn.conversation_id), "message_id": str(turn.message_id),
            "content": packed.hex(), "tokens": end.prompt_tokens, "memory_ids": turn.memory_ids,
        }


def conversation_of(record: CallRecord) -> UUID | None:
    """Conversations of ours have UUIDs; a caller may label calls with anything."""
    try:
        return UUID(record.billing.conversation_id)
    except ValueError:
        return None


def correction_to_row(known: CallRecord, truth: CallRecord) -> dict[str, Any]:
    """By how much a conversation's totals were off."""
    before, after = known.charge, truth.charge
    conversation_id = conversation_of(truth)
    return {
        "conversation": str(conversation_id) if conversation_id else None,
        "more_tokens": truth.usage.input_tokens + truth.usage.output_tokens
        - known.usage.input_tokens - known.usage.output_tokens,
        "more_micros": (after.credit_micros if after else 0) - (before.credit_micros if before else 0),
    }
