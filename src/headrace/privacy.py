"""Personal data in text: what kinds a column holds, and the same text with them replaced by ``[KIND]``.

``find(array) -> {kind: values that hold it}`` · ``redact(array, kinds) -> array`` · ``KINDS``

A pattern alone is no proof: resident IDs, cards and IBANs must also have the right check digits. Full-width digits and
signs, common in Chinese text, count as their plain forms. Where two kinds claim the same characters, the first of
``KINDS`` has them. Only texts that could hold anything are looked at one by one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import BadRequest

KINDS = ("email", "iban", "cn_id", "bank_card", "us_ssn", "phone", "ip")
"""The kinds that are known, in order of precedence."""

_NARROW = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20}
_CANDIDATE = (
    r"[@＠０-９]|(?:[0-9][ .()-]{0,2}){7}|(?:[0-9]{1,3}\.){3}|:[0-9A-Fa-f]{0,4}:|"
    r"[A-Za-z]{2}[0-9]{2} ?[A-Za-z0-9]{4}"
)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
# No digit before, and no fraction of which this is the end.
_FREE = r"(?<![0-9])(?<![0-9]\.)"
_IBAN_LENGTHS = {
    name: int(size)
    for size, names in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS", 23: "AE GI IL IQ TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "PT", 26: "IS TR", 27: "FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB PL", 29: "BR EG PS QA UA",
        30: "JO KW MU", 31: "MT SC", 32: "LC",
    }.items()
    for name in names.split()
}  # fmt: skip


def _whole(found: re.Match[str]) -> int:
    return found.end()


def _cn_id(found: re.Match[str]) -> int:
    """The end of a resident ID whose last character is the check digit of GB 11643 (ISO 7064, MOD 11-2)."""
    text = found[0].upper()
    total = sum(int(digit) * (1 << (17 - at)) for at, digit in enumerate(text[:17]))
    return found.end() if "10X98765432"[total % 11] == text[17] else 0


def _luhn(digits: str) -> bool:
    doubled = (int(digit) * (2 if at % 2 else 1) for at, digit in enumerate(reversed(digits)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _card(found: re.Match[str]) -> int:
    """The end of the longest card number that begins here; another number may follow after a space."""
    text = found[0]
    ends = [at for at in range(len(text), 0, -1) if at == len(text) or not text[at].isdigit()]
    for end in ends:
        digits = re.sub(r"[ -]", "", text[:end])
        if 13 <= len(digits) <= 19 and len(set(digits)) > 1 and _luhn(digits):
            return found.start() + len(text[:end].rstrip(" -"))
    return 0


def _iban(found: re.Match[str]) -> int:
    """The end of an account number of its country's length whose remainder by 97 is 1 (ISO 13616)."""
    text = found[0].upper()
    size = _IBAN_LENGTHS.get(text[:2], 0)
    places = [at for at, letter in enumerate(text) if letter != " "]
    if not size or len(places) < size or (len(text) > places[size - 1] + 1 and text[places[size - 1] + 1] != " "):
        return 0
    code = "".join(text[at] for at in places[:size])
    number = int("".join(str(int(letter, 36)) for letter in code[4:] + code[:4]))
    return found.start() + places[size - 1] + 1 if number % 97 == 1 else 0


def _ipv6(found: re.Match[str]) -> int:
    text = found[0]
    if text[0] == ":" and text[:2] != "::":
        return 0
    if ":" not in text or not any(letter.isdigit() for letter in text):
        # Dotted numbers have only this one form; names such as ab::cd are more often code than addresses.
        return found.end() if "." in text else 0
    try:
        ipaddress.IPv6Address(text.rstrip("."))
    except ValueError:
        return 0
    return found.start() + len(text.rstrip("."))


_Check = Callable[[re.Match[str]], int]
_RULES: dict[str, tuple[re.Pattern[str], _Check]] = {
    "email": (
        re.compile(rf"[A-Za-z0-9._%+'-]{{1,64}}@(?:{_LABEL}\.){{1,8}}[A-Za-z]{{2,24}}(?![A-Za-z0-9])"),
        _whole,
    ),
    "iban": (
        re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?: ?[A-Za-z0-9]{1,4}){3,10}(?![A-Za-z0-9])"),
        _iban,
    ),
    "cn_id": (
        re.compile(
            r"(?<![0-9])[1-9][0-9]{5}(?:18|19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}"
            r"[0-9Xx](?![0-9A-Za-z])"
        ),
        _cn_id,
    ),
    "bank_card": (re.compile(rf"{_FREE}[2-6](?:[ -]?[0-9]){{12,18}}(?![0-9])"), _card),
    "us_ssn": (
        re.compile(r"(?<![0-9-])(?!000|666|9)[0-9]{3}([- ])(?!00)[0-9]{2}\1(?!0000)[0-9]{4}(?![0-9]|-[0-9])"),
        _whole,
    ),
    "phone": (
        re.compile(
            rf"{_FREE}(?:(?:\+|00)?86[ -]?)?1[3-9][0-9](?:[ -]?[0-9]{{4}}){{2}}(?![0-9])"
            r"|(?<![0-9A-Za-z+])(?:\+|00)[1-9][0-9]{0,2}(?:[ .()-]{0,2}[0-9]){6,12}(?![0-9])"
            rf"|{_FREE}(?:\([2-9][0-9]{{2}}\) ?|[2-9][0-9]{{2}}[-. ])[2-9][0-9]{{2}}[-. ][0-9]{{4}}(?![0-9])"
            rf"|{_FREE}0[1-9][0-9]{{1,2}}-[2-9][0-9]{{6,7}}(?![0-9])"
        ),
        _whole,
    ),
    "ip": (
        re.compile(
            rf"(?<![0-9])(?<![0-9]\.)(?:{_BYTE}\.){{3}}{_BYTE}(?![0-9]|\.[0-9])"
            r"|(?<![0-9A-Za-z:.])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{1,35}(?:\.[0-9]{1,3}){0,3}(?![0-9A-Za-z:])"
        ),
        _ipv6,
    ),
}


def _spans(text: str, kinds: Sequence[str]) -> list[tuple[int, int, str]]:
    """Where ``kinds`` stand in ``text``, in order, without overlap."""
    plain = text.translate(_NARROW) if not text.isascii() else text
    taken: list[tuple[int, int, str]] = []
    for kind in kinds:
        pattern, check = _RULES[kind]
        at = 0
        while (found := pattern.search(plain, at)) is not None:
            end = check(found)
            if end and not any(start < end and found.start() < stop for start, stop, _ in taken):
                taken.append((found.start(), end, kind))
            at = max(end, found.start() + 1)
    return sorted(taken)


def _checked(kinds: Sequence[str]) -> list[str]:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise BadRequest(f"{unknown[0]!r} is no kind of personal data", hint=f"one of {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in kinds]


def _candidates(array: pa.Array) -> Iterator[tuple[int, str]]:
    """Position and text of the values that may hold something."""
    hits = pc.fill_null(pc.match_substring_regex(array, _CANDIDATE), False)
    places = pc.indices_nonzero(hits)
    yield from zip(places.to_pylist(), array.take(places).to_pylist(), strict=True)


def find(array: pa.Array, kinds: Sequence[str] = KINDS) -> dict[str, int]:
    """How many values of a column of text hold each of ``kinds``; BadRequest for a kind that is not known."""
    ordered = _checked(kinds)
    counts = dict.fromkeys(ordered, 0)
    for _, text in _candidates(array):
        # All rules run, so that what another kind claims is not counted twice.
        for kind in {kind for _, _, kind in _spans(text, KINDS)} & counts.keys():
            counts[kind] += 1
    return counts


def redact(array: pa.Array, kinds: Sequence[str] = KINDS) -> pa.Array:
    """The column of text with each found value of ``kinds`` replaced by ``[KIND]``, in capitals; nulls stay."""
    ordered = _checked(kinds)
    changed: dict[int, str] = {}
    for place, text in _candidates(array):
        parts, at = [], 0
        for start, end, kind in _spans(text, ordered):
            parts += [text[at:start], f"[{kind.upper()}]"]
            at = end
        if parts:
            changed[place] = "".join([*parts, text[at:]])
    if not changed:
        return array
    places = pa.array(list(changed), pa.int64())
    hit = pc.is_in(pa.array(range(len(array)), pa.int64()), places)
    return pc.replace_with_mask(array, hit, pa.array(list(changed.values()), array.type))
