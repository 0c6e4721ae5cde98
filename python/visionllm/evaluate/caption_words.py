"""Words of captions as the published caption metrics count them.

COCO's caption evaluation (arXiv 1504.00325) splits captions by the Penn Treebank rules of Stanford's
tokenizer, in lower case, and leaves punctuation out. The rules that captions meet are written out here, so
that no Java is needed: clitics and contractions come off ("dog 's", "ca n't"), hyphens and slashes between
letters stay, numbers and abbreviations keep their points.
"""

from __future__ import annotations

import re

_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": " -- ", "—": " -- ", "…": " ... "})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PUNCTUATION = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_JOINED = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
_ABBREVIATIONS = frozenset(
    "mr. mrs. ms. dr. st. jr. sr. ft. vs. etc. inc. co. corp. ave. blvd. rd. no. lb. oz. dept. mt.".split()
)
_TOKEN = re.compile(
    r"""
      https?://\S+ | [\w.+-]+@[\w-]+\.[\w.]+         # addresses
    | <[a-z/][^<>\s]*>                              # tags
    | [#@][^\W\d]\w*                                # hashtags, names
    | (?:[^\W\d_]\.){2,}                            # a.m., u.s.
    | \d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?:[-/]\w+)*(?!\w)  # 3.5  10:30  1,000  2-3  1st
    | '\d\ds?\b | 'em\b | 'n' | '(?:s|m|d|re|ve|ll)\b  # '90s, and what follows a number: 1990's
    | \w+(?:[-/.]\w+|'(?!(?:s|m|d|re|ve|ll)\b)(?<!n')\w+)*'?\w*\.?  # words with what joins them
    | \.{2,} | --+ | ``? | ''
    | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|re|ve|ll))$")


def caption_words(text: str) -> list[str]:
    """The words of a caption, lower-case and without punctuation."""
    words: list[str] = []
    for token in _TOKEN.findall(text.lower().translate(_QUOTES)):
        words += _split(token)
    return [word for word in words if word not in _PUNCTUATION and not set(word) <= {".", "-"}]


def _split(token: str) -> list[str]:
    """One run of characters as the tokens in it."""
    if token in _BRACKETS:
        return [_BRACKETS[token]]
    if token in ("'em", "'n'") or token.startswith(("http", "<", "#", "@")):
        return [token]
    if token.endswith(".") and not _keeps_point(token):
        token = token[:-1]
    token = token.removesuffix("'")
    parts = _CLITIC.match(token)
    if parts is not None:
        return [*_split(parts.group(1)), parts.group(2)]
    return _JOINED[token].split() if token in _JOINED else [token]


def _keeps_point(token: str) -> bool:
    """Abbreviations do; other words lose the point, which ends the sentence."""
    return token in _ABBREVIATIONS or re.fullmatch(r"(?:[^\W\d_]\.){2,}", token) is not None
