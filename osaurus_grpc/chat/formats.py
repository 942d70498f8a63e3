"""JSON schema's string formats as regular expressions that admit a part of each, and nothing else.

Kept shorter than the formats are: repetitions are bounded, since small models loop on digits, and
what validators disagree about is left out (leap seconds, quoted e-mail names, February 29th in years
that have none, the year 0000). Anchors are added where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

# As RFC 3339, appendix C, counts them.
_LEAP_YEAR: Final = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR: Final = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_DATE: Final = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    rf"|{_LEAP_YEAR}-02-29)"
)
_TIME: Final = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_DAY_PART: Final = r"T(?:[0-9]{1,4}H(?:[0-9]{1,4}M(?:[0-9]{1,4}S)?)?|[0-9]{1,4}M(?:[0-9]{1,4}S)?|[0-9]{1,4}S)"
_DURATION: Final = (
    r"P(?:(?:[0-9]{1,4}Y(?:[0-9]{1,4}M(?:[0-9]{1,4}D)?)?|[0-9]{1,4}M(?:[0-9]{1,4}D)?|[0-9]{1,4}D)"
    rf"(?:{_DAY_PART})?|{_DAY_PART}|[0-9]{{1,4}}W)"
)
# No two hyphens together: "xn--" announces punycode.
_LABEL: Final = r"[a-zA-Z0-9]{1,20}(?:-[a-zA-Z0-9]{1,20}){0,2}"
_HOSTNAME: Final = rf"{_LABEL}(?:\.{_LABEL}){{0,5}}"
_EMAIL_WORD: Final = r"[a-zA-Z0-9_+-]{1,30}"
_BYTE: Final = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4: Final = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_GROUP: Final = r"[0-9a-fA-F]{1,4}"
_IPV6: Final = (
    "(?:"
    + "|".join(
        [
            rf"{_GROUP}(?::{_GROUP}){{7}}",
            *(
                # So many groups before "::", and at most as many behind it as leave it standing for one.
                (rf"{_GROUP}(?::{_GROUP}){{{before - 1}}}" if before else "")
                + (rf"::(?:{_GROUP}(?::{_GROUP}){{0,{6 - before}}})?" if before < 7 else "::")
                for before in range(8)
            ),
        ]
    )
    + ")"
)
_URI: Final = (
    rf"(?:https?|ftp|file|ws|wss)://{_HOSTNAME}(?::[1-9][0-9]{{0,3}})?"
    r"(?:/(?:[a-zA-Z0-9._~-]|%[0-9A-F]{2}){0,64}){0,16}"
    r"(?:\?[a-zA-Z0-9._~=&+-]{0,128})?(?:#[a-zA-Z0-9._~-]{0,64})?"
)
_URI_TEMPLATE: Final = (
    rf"(?:https?)://{_HOSTNAME}(?:/(?:[a-zA-Z0-9._~-]|\{{[a-zA-Z_][a-zA-Z0-9_]{{0,30}}\}}){{0,64}}){{0,16}}"
)
# RFC 6901.
_JSON_POINTER: Final = r"(?:/(?:[a-zA-Z0-9._-]|~[01]){0,64}){0,16}"
_UUID: Final = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"


def _uuid(version: int) -> str:
    return (
        rf"[0-9a-fA-F]{{8}}-[0-9a-fA-F]{{4}}-{version}[0-9a-fA-F]{{3}}"
        r"-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}"
    )


FORMATS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "date-time": f"{_DATE}T{_TIME}",
        "date": _DATE,
        "time": _TIME,
        "duration": _DURATION,
        "email": rf"{_EMAIL_WORD}(?:\.{_EMAIL_WORD}){{0,3}}@{_HOSTNAME}",
        "idn-email": rf"{_EMAIL_WORD}(?:\.{_EMAIL_WORD}){{0,3}}@{_HOSTNAME}",
        "hostname": _HOSTNAME,
        "idn-hostname": _HOSTNAME,
        "ipv4": _IPV4,
        "ipv6": _IPV6,
        "uri": _URI,
        "iri": _URI,
        "uri-reference": _URI,
        "iri-reference": _URI,
        "uri-template": _URI_TEMPLATE,
        "json-pointer": _JSON_POINTER,
        "relative-json-pointer": rf"(?:0|[1-9][0-9]{{0,3}})(?:#|{_JSON_POINTER})",
        "uuid": _UUID,
        # pydantic's names.
        **{f"uuid{version}": _uuid(version) for version in (1, 3, 4, 5, 6, 7, 8)},
    }
)
"""Format to an expression that matches whole strings of it."""
