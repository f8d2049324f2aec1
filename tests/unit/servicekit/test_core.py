"""Ids, page tokens, back-off, faults, lanes, error statuses."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from servicekit.core.backoff import Backoff
from servicekit.core.errors import DomainError, FieldViolation, InvalidField
from servicekit.core.faults import FaultPoint, NoFaults, faults_from
from servicekit.core.ids import RandomIdSource, uuid7_from
from servicekit.core.page_token import decode_page_token, decode_time_token, encode_page_token
from servicekit.outbox.message import LANES, lane_of
from servicekit.rpc.status import error_info_of, status_of
from servicekit.rpc.times import duration_to_proto, timestamp_from_proto, timestamp_to_proto
from servicekit.settings import split_address


@given(st.integers(0, 2**48 - 1), st.integers(0, 2**74 - 1))
def test_a_uuid7_carries_its_time_and_its_version(milliseconds: int, random_bits: int) -> None:
    made = uuid7_from(milliseconds=milliseconds, random_bits=random_bits)
    assert (made.version, made.int >> 80) == (7, milliseconds)
    assert made.variant == "specified in RFC 4122"


def test_ids_do_not_repeat() -> None:
    assert len({RandomIdSource().new_id() for _ in range(10_000)}) == 10_000


@given(st.lists(st.one_of(st.text(alphabet=st.characters(exclude_characters="\x00", codec="utf-8")),
                          st.integers(0, 2**63 - 1)), min_size=1, max_size=4))
def test_a_page_token_comes_back_as_it_went(key: list[str | int]) -> None:
    token = encode_page_token(key, question=("list", "user"))
    assert decode_page_token(token, question=("list", "user"), types=[type(part) for part in key]) == key
    with pytest.raises(InvalidField):
        decode_page_token(token, question=("list", "somebody"), types=[type(part) for part in key])


@given(st.text(max_size=60))
def test_any_other_token_is_an_invalid_field(token: str) -> None:
    if token:
        with pytest.raises(InvalidField):
            decode_page_token(token, question=("list",), types=(int,))


def test_a_time_token_with_a_bad_time_is_an_invalid_field() -> None:
    for bad in ("yesterday", "2026-01-01T00:00:00"):
        with pytest.raises(InvalidField):
            decode_time_token(encode_page_token([bad, "x"], question=()), question=())


def test_backoff_grows_to_its_ceiling_and_begins_again() -> None:
    backoff = Backoff(first_seconds=1.0, most_seconds=8.0)
    waits = [backoff.next_seconds() for _ in range(50)]
    assert all(0.5 <= wait <= 8.0 for wait in waits)
    assert all(wait >= 4.0 for wait in waits[3:])
    backoff.reset()
    assert backoff.next_seconds() <= 1.0


def test_faults_are_off_unless_named() -> None:
    assert isinstance(faults_from(""), NoFaults)
    faults_from("after_hold:3").reach(FaultPoint.BEFORE_HOLD)
    with pytest.raises(ValueError):
        faults_from("somewhere")


@given(st.text(max_size=64))
def test_a_key_has_one_lane(key: str) -> None:
    assert 0 <= lane_of(key) == lane_of(key) < LANES


def test_a_status_always_carries_reason_domain_and_request_id() -> None:
    class Refused(DomainError):
        reason = "INSUFFICIENT_CREDIT"

    error = Refused("no", retry_after_seconds=1.5, violations=[FieldViolation("a.b", "is wrong")], user_id="u", needed=7)
    status = status_of(error, request_id="r-1")
    info = error_info_of(status)
    assert info is not None
    assert (info.reason, info.domain) == ("INSUFFICIENT_CREDIT", "creditmesh")
    assert dict(info.metadata) == {"user_id": "u", "needed": "7", "request_id": "r-1"}
    kinds = {detail.type_url.rpartition(".")[2] for detail in status.details}
    assert kinds == {"ErrorInfo", "BadRequest", "QuotaFailure", "RetryInfo"}
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay == Duration(seconds=1, nanos=500_000_000)


def test_times_out_of_range_are_invalid_fields() -> None:
    moment = datetime(2026, 5, 4, 3, 2, 1, 123456, tzinfo=UTC)
    assert timestamp_from_proto(timestamp_to_proto(moment), field="at") == moment
    for bad in (Timestamp(seconds=2**62), Timestamp(seconds=-1), Timestamp(nanos=-5), Timestamp(seconds=253402300800)):
        with pytest.raises(InvalidField):
            timestamp_from_proto(bad, field="at")
    assert duration_to_proto(1.25) == Duration(seconds=1, nanos=250_000_000)


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:port", "host:70000"])
def test_a_bad_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError):
        split_address(address)


@given(st.datetimes(
    min_value=datetime(1970, 1, 1, tzinfo=UTC).replace(tzinfo=None),
    max_value=datetime(8999, 12, 31, tzinfo=UTC).replace(tzinfo=None), timezones=st.just(UTC),
))
def test_times_travel_exactly_also_far_ones(moment: datetime) -> None:
    expected = Timestamp()
    expected.FromDatetime(moment)
    assert timestamp_to_proto(moment) == expected
    assert timestamp_from_proto(expected, field="x") == moment
