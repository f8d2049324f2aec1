"""HTTP/2 as bytes: headers that any reader understands, and what may not be said."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit.http2 import frames, headers
from servicekit.http2.frames import ErrorCode, Flag, Http2Error, Kind, Setting

TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=300).map(str.encode)
GOOD = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a/b"), (b"x-own", b"1")]


@given(st.lists(st.tuples(TEXT.map(bytes.lower), TEXT), max_size=20))
def test_fields_are_read_by_others_as_they_were_written(fields: list[tuple[bytes, bytes]]) -> None:
    decoder = hpack.Decoder(max_header_list_size=2**20)
    for _ in range(2):  # nothing is kept in the reader's table
        assert [tuple(each) for each in decoder.decode(headers.encode(fields), raw=True)] == fields


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 256, 16_383, 16_511, 40_000])
def test_values_of_any_length_are_read_by_others(length: int) -> None:
    decoder = hpack.Decoder(max_header_list_size=2**20)
    ((name, value),) = decoder.decode(headers.encode([(b"n", b"v" * length)]), raw=True)
    assert (bytes(name), len(value)) == (b"n", length)


@pytest.mark.parametrize("status", [200, 405, 415])
def test_a_status_is_read_by_others(status: int) -> None:
    assert hpack.Decoder().decode(headers.encode_status(status)) == [(":status", str(status))]


@given(st.binary(max_size=50_000), st.booleans())
def test_a_block_is_continued_in_frames_that_fit(block: bytes, ends: bool) -> None:
    data = frames.headers_frames(3, block, end_stream=ends, most_frame=16_384)
    kinds, found = [], b""
    while data:
        upper, lower, kind, flags, stream_id = frames.HEADER.unpack_from(data)
        size = upper << 8 | lower
        assert size <= 16_384
        assert stream_id == 3
        found += data[9 : 9 + size]
        kinds.append((kind, flags))
        data = data[9 + size :]
    assert found == block
    assert [kind for kind, _ in kinds] == [Kind.HEADERS, *[Kind.CONTINUATION] * (len(kinds) - 1)]
    assert [bool(flags & Flag.END_HEADERS) for _, flags in kinds] == [False] * (len(kinds) - 1) + [True]
    assert bool(kinds[0][1] & Flag.END_STREAM) == ends


def test_a_request_is_read() -> None:
    request = headers.read_request([*GOOD, (b"content-length", b"7")], 1)
    assert (request.method, request.path, request.content_length) == (b"POST", b"/a/b", 7)
    assert request.fields == [(b"x-own", b"1"), (b"content-length", b"7")]


@pytest.mark.parametrize("fields", [
    GOOD[:2], GOOD[1:], [GOOD[0], GOOD[2]], [*GOOD[:2], (b":path", b"")], [*GOOD[:3], GOOD[0]],
    [*GOOD, (b":authority", b"late")], [*GOOD[:3], (b":status", b"200")], [*GOOD, (b"X-Own", b"1")], [*GOOD, (b"", b"1")],
    [*GOOD, (b"connection", b"close")], [*GOOD, (b"te", b"gzip")], [*GOOD, (b"content-length", b"-1")],
    [*GOOD, (b"content-length", b"9" * 19)],
])
def test_a_malformed_request_ends_its_stream_alone(fields: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(Http2Error) as caught:
        headers.read_request(fields, 5)
    assert (caught.value.code, caught.value.stream_id) == (ErrorCode.PROTOCOL_ERROR, 5)


FIELD = st.tuples(st.sampled_from([b"a", b"b", b"c", b"grpc-timeout"]), st.sampled_from([b"1", b"2", b"x" * 60]))


@given(st.lists(st.one_of(st.lists(FIELD, max_size=4), st.integers(0, 6)), max_size=60), st.sampled_from([0, 60, 200, 4096]))
def test_blocks_are_read_as_they_were_meant_however_often_they_come(said: list[list[tuple[bytes, bytes]] | int], size: int) -> None:
    """Lists of fields, said again or anew, and changes of the table's size in between."""
    encoder, reader = hpack.Encoder(), headers.BlockReader(most_bytes=2**16)
    encoder.header_table_size = size
    earlier: list[list[tuple[bytes, bytes]]] = []
    for each in said:
        if isinstance(each, int):
            encoder.header_table_size = each * 50
            if not earlier:
                continue
            fields = earlier[each % len(earlier)]
        else:
            fields = each
            earlier.append(each)
        block = encoder.encode(fields, huffman=bool(len(earlier) % 2))
        assert [tuple(field) for field in reader.read(block).fields] == fields


def test_a_block_that_was_read_is_not_read_again() -> None:
    encoder, reader = hpack.Encoder(), headers.BlockReader(most_bytes=2**16)
    reader.read(encoder.encode(GOOD))
    block = encoder.encode(GOOD)
    assert reader.read(block) is reader.read(block)
    first = reader.read(block)
    reader.read(encoder.encode([(b"new", b"to the table")]))
    assert reader.read(encoder.encode(GOOD)) is not first


def test_blocks_that_never_come_again_do_not_pile_up() -> None:
    reader = headers.BlockReader(most_bytes=2**16)
    for number in range(1000):
        reader.read(headers.encode([(b"x-request-id", b"%d" % number)]))
        assert len(reader._known) <= headers.MOST_KNOWN_BLOCKS
    block = headers.encode(GOOD[3:])
    assert reader.read(block) is reader.read(block)


def test_trailers_have_no_pseudo_headers() -> None:
    headers.require_trailers([(b"x-own", b"1")], 5)
    with pytest.raises(Http2Error):
        headers.require_trailers([(b":path", b"/a")], 5)


@pytest.mark.parametrize(("setting", "value", "code"), [
    (Setting.ENABLE_PUSH, 2, ErrorCode.PROTOCOL_ERROR), (Setting.INITIAL_WINDOW_SIZE, 2**31, ErrorCode.FLOW_CONTROL_ERROR),
    (Setting.MAX_FRAME_SIZE, 16_383, ErrorCode.PROTOCOL_ERROR), (Setting.MAX_FRAME_SIZE, 2**24, ErrorCode.PROTOCOL_ERROR),
])
def test_settings_out_of_bounds_are_refused(setting: Setting, value: int, code: ErrorCode) -> None:
    with pytest.raises(Http2Error) as caught:
        frames.settings_from(frames.settings_frame({setting: value})[9:])
    assert caught.value.code is code


@given(st.binary(max_size=40), st.integers(0, 40))
def test_padding_is_taken_off_or_refused(content: bytes, padding: int) -> None:
    payload = bytes((padding,)) + content + bytes(padding)
    assert frames.without_padding(Flag.PADDED, payload) == content
    if padding > len(content):
        with pytest.raises(Http2Error):
            frames.without_padding(Flag.PADDED, payload[: 1 + len(content)])
    assert frames.without_padding(0, payload) == payload
