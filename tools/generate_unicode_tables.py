"""Print the three Unicode tables of ``targets/package/infer.py``, read off the `tokenizers` library itself.

BERT's normalizer there knows Unicode 8; Python's ``unicodedata`` knows a later one, another in every release. A
table makes the packaged tokenizer give the same ids on all of them. Format: pairs of base-36 numbers, the gap since the
last range and the length of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

SURROGATES = range(0xD800, 0xE000)
LATIN = 0x80  # below it plain rules hold, and they are written as such


def code_points() -> Iterator[str]:
    return (chr(code) for code in range(LATIN, 0x110000) if code not in SURROGATES)


def encode(belongs: Callable[[str], bool]) -> str:
    """Run lengths of the code points for which ``belongs`` holds."""
    ranges: list[list[int]] = []
    for character in code_points():
        if belongs(character):
            code = ord(character)
            if ranges and ranges[-1][1] == code:
                ranges[-1][1] = code + 1
            else:
                ranges.append([code, code + 1])
    words, last = [], 0
    for start, end in ranges:
        words += [base36(start - last), base36(end - start)]
        last = end
    return " ".join(words)


def base36(number: int) -> str:
    digits = ""
    while number:
        number, rest = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[rest] + digits
    return digits or "0"


def tables() -> dict[str, str]:
    """``CONTROL`` (dropped by clean-up), ``PUNCTUATION`` (a token of its own), ``ACCENT`` (dropped after NFD)."""
    from tokenizers import normalizers, pre_tokenizers

    off = {"handle_chinese_chars": False, "lowercase": False}
    clean = normalizers.BertNormalizer(clean_text=True, strip_accents=False, **off)
    strip = normalizers.BertNormalizer(clean_text=False, strip_accents=True, **off)
    split = pre_tokenizers.BertPreTokenizer()
    return {
        "CONTROL": encode(lambda character: clean.normalize_str(f"a{character}b") == "ab"),
        "PUNCTUATION": encode(
            lambda character: [word for word, _ in split.pre_tokenize_str(f"a{character}b")] == ["a", character, "b"]
        ),
        "ACCENT": encode(lambda character: strip.normalize_str(character) == ""),
    }


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"{name} = {table!r}")
