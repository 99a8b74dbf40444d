import gzip
import io
import json

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.collect import codings, formats
from headrace.collect.formats import Decompressor, Limits, check_ndjson, check_table, decompress, read_table, split_json
from headrace.errors import BadData, TooLarge, UnsupportedType
from headrace.model import RowError

LIMITS = Limits(depth=200, bytes=1 << 20)
LINE = b'{"id":1234567,"name":"some name here","score":0.123456,"flag":true,"text":"lorem ipsum dolor sit amet"}'
COMPRESS = {"gzip": gzip.compress, "zstd": zstandard.compress, "identity": bytes}
TEXT = b"the quick brown fox " * 400

DOUBTFUL = [
    b"01", b"+1", b"1.", b".5", b"-", b"1e", b"--1", b"tRue", b"NaN", b"-Infinity", b"Inf", b'"\x01"', b'"\\x"', b"'a'",
    b'"\xff"', b'"\\ud800"', b'"\\udc00"', b'"\\ud83d\\ude00"', b'"a\0b"', b"\0", b"1,", b"[1,]", b"/**/1", b"", b"{",
    b"}", b'"NaN, Information"', b'"NaN}"', b"1e400", b"-1e999", b"1e-400", b"9" * 400, b"1.2.3e400", b"2e308 1",
    b'1,"a":2',
    b'1},{"b":2', b'1}{"b":2', b'"}\\n{"', b"[" * 300 + b"]" * 300, b"[" * 199 + b"]" * 199, b"[" * 200 + b"]" * 200,
    b'"' + b"[" * 900 + b'"', b"18446744073709551616", b"-0", b"1E+2", b" \t1 ", b"nullx", b'"\xe4\xbd\xa0"',
]  # fmt: skip


def with_fields(values):
    return [b'{"a":' + value + b"}" for value in values]


# ------------------------------------------------------------------------------------------------ content codings


@pytest.mark.parametrize("encoding", COMPRESS)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_body_decodes_the_same_however_it_is_cut(encoding, size):
    body = COMPRESS[encoding](TEXT)
    assert decompress((body[i : i + size] for i in range(0, len(body), size)), encoding) == TEXT


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_several_members_are_one_body(encoding):
    assert decompress(COMPRESS[encoding](b"one") + COMPRESS[encoding](b"two"), encoding) == b"onetwo"


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_cut_or_dirty_body_is_refused(encoding):
    body = COMPRESS[encoding](TEXT)
    for bad in (
        b"",
        body[:1],
        body[:-1],
        body[: len(body) // 2],
        body + b"x",
        body + b"\0" * 40,
        b"plain text, no coding",
    ):
        with pytest.raises(BadData):
            decompress(bad, encoding)


def test_a_flipped_bit_is_seen_by_the_checksum():
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(TEXT)
    for encoding, body in (("gzip", gzip.compress(TEXT)), ("zstd", checked)):
        with pytest.raises(BadData):
            decompress(body[:20] + bytes([body[20] ^ 0xFF]) + body[21:], encoding)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_bomb_is_stopped_long_before_it_is_unpacked(encoding):
    coding = Decompressor(encoding, bytes_max=1 << 40, ratio_max=100)
    bomb, seen = COMPRESS[encoding](bytes(200 << 20)), []
    with pytest.raises(TooLarge, match="100 times"):
        seen.extend(len(piece) for piece in coding.pieces(bomb))
    assert sum(seen) <= 100 * len(bomb) + codings.PIECE_BYTES


def test_a_body_beyond_the_byte_limit_is_refused_even_if_plain():
    with pytest.raises(TooLarge, match="10 bytes"):
        decompress(b"01234567890", "identity", bytes_max=10)
    assert decompress(b"0123456789", "identity", bytes_max=10) == b"0123456789"


def test_an_unknown_coding_is_named():
    with pytest.raises(UnsupportedType, match="'br'"):
        Decompressor("br")


# ------------------------------------------------------------------------------------------------ one JSON body


def test_records_stay_verbatim():
    assert split_json(b'\xef\xbb\xbf \n{"a" : 1.0, "a":2}\n').texts == [b'{"a" : 1.0, "a":2}']
    assert split_json(b' [ {"a" : 1 } ,\n{"b":\t[{}, {}]}] ').texts == [b'{"a" : 1 }', b'{"b":\t[{}, {}]}']
    assert split_json(b"[ ]").texts == []
    big = b'{"n":' + str(2**70).encode() + b',"m":1e400}'
    assert split_json(big).texts == [big]
    assert split_json(b"[" + big + b"]").texts == [big]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"1",
        b'"x"',
        b"null",
        b"[1]",
        b"[{}",
        b"[{},]",
        b"[,{}]",
        b"[{}{}]",
        b"[{}]x",
        b"{}{}",
        b'{"a":NaN}',
        b'[{"a":-Infinity}]',
        b'{"a":"\xff"}',
        b'[{"a":"\xff"}]',
        b'{"a":01}',
        b'{"a":1,}',
        b"[" * 10_000 + b"]" * 10_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'[{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}]",
        b"[" * 10_000,
        b"[null]",
    ],
)
def test_what_is_no_record_is_refused_without_a_crash(body):
    with pytest.raises(BadData):
        split_json(body, single=True)


def test_one_bad_element_refuses_all_or_is_listed():
    with pytest.raises(BadData, match="record 1") as refused:
        split_json(b'[{"a":1}, 7]', single=True)
    assert refused.value.details == {"index": 1}
    records = split_json(b'[{"a":1}, 7, {"b":2}]')
    assert records.texts == [b'{"a":1}', b'{"b":2}']
    assert records.errors == [RowError(1, "a record is a JSON object, not a number")]


def test_depth_counts_levels_and_not_brackets_in_strings():
    limits = Limits(depth=3, bytes=1000)
    assert split_json(b'{"a":[[1]],"b":"[[[[[[\\"[["}', limits=limits).texts
    with pytest.raises(BadData, match="deeper than 3 levels"):
        split_json(b'{"a":[[[1]]]}', limits=limits)


def test_a_body_that_must_be_in_memory_has_a_limit():
    with pytest.raises(TooLarge, match="at most 4 bytes"):
        split_json(b'{"a":1}', limits=Limits(depth=3, bytes=4))


@pytest.mark.parametrize("between", [", ", ",", ",\n"])
def test_a_large_array_splits_as_a_small_one(between):
    elements = [
        json.dumps({"i": i, "s": "}, {" if i == 700 else "x", "n": [{}, {}] if i % 2 else []}) for i in range(1000)
    ]
    assert split_json(f"[{between.join(elements)}]".encode()).texts == [e.encode() for e in elements]
    plain = [json.dumps({"i": i, "s": "text"}) for i in range(2000)]
    assert split_json(f"[{between.join(plain)}]".encode()).texts == [e.encode() for e in plain]


# ------------------------------------------------------------------------------------------------ NDJSON


def test_lines_come_back_verbatim_and_blank_ones_do_not_count():
    good, count, errors = check_ndjson(b'\xef\xbb\xbf{"a": 1}\r\n\n  \nnot json\n{"b":1.0}\n[1]')
    assert (good, count) == (b'{"a": 1}\n{"b":1.0}\n', 2)
    assert [e.index for e in errors] == [1, 3]
    assert check_ndjson(b"") == (b"", 0, [])


@pytest.mark.parametrize("line", [*with_fields(DOUBTFUL), b"1", b"[{}]", b"{}", b'{"a":{}', b'"b":1}', b"{}{}", b"}{"])
def test_the_fast_path_never_takes_what_the_slow_one_refuses(line):
    for text in (line + b"\n", (LINE + b"\n") * 3 + line + b"\n" + LINE + b"\n"):
        count = formats.count_plain_lines(text, LIMITS)
        if count:
            assert formats.check_lines(text, LIMITS) == (text, count, [])


def test_numbers_beyond_a_float_are_valid_text_and_nothing_else_about_the_line_is_excused():
    for value in (b"1e400", b"-1e999", b"9" * 400, b'["1e400", 1e400]'):
        assert formats.check_lines(b'{"a":' + value + b"}\n", LIMITS)[1] == 1
    for value in (b"--1e400", b"1e400 1", b"01e400", b"1.2.3e400", b"1e400,NaN", b'"\x01",1e400'):
        assert formats.check_lines(b'{"a":' + value + b"}\n", LIMITS)[1] == 0
    assert formats.loads(b'{"a":1e400,"b":7}') == {"a": float("inf"), "b": 7}


def test_a_line_beyond_the_limit_is_rejected_alone():
    long = b'{"a":"' + b"x" * 100 + b'"}'
    good, count, errors = check_ndjson(b'{"b":1}\n' + long + b"\n", Limits(depth=5, bytes=50))
    assert (good, count, errors) == (b'{"b":1}\n', 1, [RowError(1, "longer than 50 bytes")])


def test_plain_lines_take_the_fast_path_with_nesting_and_escapes():
    lines = [b'{"a":[[1,2],[3]],"b":"\\n\\u4f60","c":{"d":null}}', LINE, '{"t":"你好, Information"}'.encode()] * 3000
    text = b"\n".join(lines) + b"\n"
    assert formats.count_plain_lines(text, LIMITS) == len(lines)
    assert check_ndjson(text) == (text, len(lines), [])
    assert check_ndjson(text.replace(b"\n", b"\r\n")) == (text, len(lines), [])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
GOOD_LINES = st.dictionaries(st.text(max_size=3), VALUES, max_size=4).map(lambda d: json.dumps(d).encode())
ANY_LINES = (
    GOOD_LINES | st.sampled_from(with_fields(DOUBTFUL)) | st.binary(max_size=12).map(lambda b: b'{"a":' + b + b"}")
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ANY_LINES, min_size=1, max_size=6))
def test_fast_and_slow_agree_on_any_lines(lines):
    text = b"\n".join(lines) + b"\n"
    good, count, errors = formats.check_lines(text, LIMITS)
    fast = formats.count_plain_lines(text, LIMITS)
    assert fast in (0, count)
    assert not fast or (good == text and not errors)
    for line in good.splitlines():
        assert isinstance(json.loads(line), dict)


@settings(max_examples=100, deadline=None)
@given(st.lists(GOOD_LINES, max_size=5), st.sampled_from([b",", b", ", b" ,\n"]))
def test_any_array_splits_into_its_elements(lines, between):
    records = split_json(b"[" + between.join(lines) + b"]")
    accepted = [line for line in lines if b"\\ud" not in line]
    assert [t for t in records.texts if t in accepted] == [line for line in accepted if line in records.texts]
    assert len(records.texts) + len(records.errors) == len(lines)
    for line in accepted:
        orjson.loads(line)
        assert line in records.texts


# ------------------------------------------------------------------------------------------------ tables


def arrow_stream(table):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def arrow_file(table):
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet(table):
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


TABLE = pa.table({"n": [1, 2, None], "s": ["a", None, "c"], "l": [[1.5], [], None]})


@pytest.mark.parametrize(("name", "write"), [("arrow", arrow_stream), ("arrow", arrow_file), ("parquet", parquet)])
def test_a_table_reads_back_from_bytes_and_from_a_file(name, write, tmp_path):
    path = tmp_path / "table"
    path.write_bytes(write(TABLE))
    for source in (write(TABLE), path):
        assert check_table(name, source) == (3, TABLE.schema)
        assert pa.Table.from_batches(read_table(name, source)) == TABLE


@pytest.mark.parametrize(("name", "write"), [("arrow", arrow_stream), ("arrow", arrow_file), ("parquet", parquet)])
def test_a_damaged_table_is_refused_before_it_is_acknowledged(name, write):
    body = write(TABLE)
    for bad in (b"", b"PAR1", body[: len(body) // 2], b"nonsense" * 10):
        with pytest.raises(BadData):
            check_table(name, bad)


def test_csv_columns_get_the_narrowest_type_that_loses_nothing():
    body = b"i,f,b,zip,big,text,empty,late\n1,1.5,true,007,99999999999999999999,x,,1\n-2,2,False,123,1,,,yes\n"
    rows, schema = check_table("csv", body)
    assert rows == 2
    assert dict(zip(schema.names, map(str, schema.types), strict=True)) == {
        "i": "int64",
        "f": "double",
        "b": "bool",
        "zip": "string",
        "big": "string",
        "text": "string",
        "empty": "string",
        "late": "string",
    }
    (batch,) = read_table("csv", body, schema)
    assert batch.to_pylist()[1] == {
        "i": -2, "f": 2.0, "b": False, "zip": "123", "big": "1", "text": None, "empty": None, "late": "yes",
    }  # fmt: skip


def test_csv_types_hold_for_the_whole_body_and_not_for_its_first_block(monkeypatch):
    monkeypatch.setenv("HEADRACE_BATCH_BYTES", "1024")
    lines = [f"{i},{'true' if i < 900 else '1'},{i if i < 900 else 'x'},{i if i < 900 else 0.5}" for i in range(1000)]
    rows, schema = check_table("csv", ("a,b,c,d\n" + "\n".join(lines)).encode())
    assert (rows, list(map(str, schema.types))) == (1000, ["int64", "string", "string", "double"])


def test_quotes_newlines_and_tabs_in_csv_are_read():
    body = b'\xef\xbb\xbfa,b\n"x\ny","1"\n"",2\n'
    assert [b.to_pylist() for b in read_table("csv", body)] == [[{"a": "x\ny", "b": 1}, {"a": "", "b": 2}]]
    assert check_table("tsv", b"a\tb\n1\t2,3\n")[1].names == ["a", "b"]


@pytest.mark.parametrize("body", [b"", b"a,b\n1\n", b"1,2\n3,4\n", b"a,a\n1,2\n", b"a,\n1,2\n", b"a\n\xff\n"])
def test_an_unreadable_csv_is_refused(body):
    with pytest.raises(BadData):
        check_table("csv", body)


def test_formats_are_told_by_type_and_by_name():
    assert formats.format_of_type("Application/JSON; charset=utf-8") == "json"
    assert formats.format_of_type("application/x-ndjson") == "ndjson"
    assert formats.format_of_path("a/b.jsonl.zst") == ("ndjson", "zstd")
    assert formats.format_of_path("B.CSV.GZ") == ("csv", "gzip")
    assert formats.format_of_path("notes.md") == ("text", "identity")
    for unknown in ("a.exe", "a", "a.gz"):
        with pytest.raises(UnsupportedType):
            formats.format_of_path(unknown)
    with pytest.raises(UnsupportedType, match="text/html"):
        formats.format_of_type("text/html")


def test_a_parquet_body_that_repeats_one_value_without_end_is_refused_unexpanded():
    table = pa.table({"t": pa.array(["x" * (4 << 20)] * 200).dictionary_encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    assert len(sink.getvalue()) < 10_000
    before = pa.total_allocated_bytes()
    with pytest.raises(TooLarge, match="decodes to more"):
        check_table("parquet", sink.getvalue())
    assert pa.total_allocated_bytes() - before < 64 << 20


def test_a_parquet_body_of_repeated_short_values_is_taken():
    table = pa.table({"t": pa.array(["yes"] * 100_000), "n": pa.array([1] * 100_000)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    assert check_table("parquet", sink.getvalue())[0] == 100_000
    assert pa.Table.from_batches(read_table("parquet", sink.getvalue())).equals(table)


def test_an_array_of_too_many_records_is_refused_before_it_is_cut():
    with pytest.raises(TooLarge, match="at most 1000000 records"):
        split_json(b"[" + b"{}," * 1_000_001 + b"{}]")
