"""Tokens as text: joined they are the response, whatever the tokenizer does with spaces and parts of characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from vppo.analysis.tables import join_tables, token_texts


def tokenizer(tokens: list[str], decoder: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    core.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=tokens[0])


def test_spaces_in_front_of_words_stay() -> None:
    words = tokenizer(["▁Two", "▁and", "▁2", "."], decoders.Metaspace())
    assert words.decode([1]) == "and"  # what a token gives alone
    assert token_texts(words, [0, 1, 2, 3]) == ["Two", " and", " 2", "."]


def test_characters_of_several_tokens() -> None:
    """Byte tokens, as byte-level tokenizers have them: e, the two bytes of é, the three of the euro sign."""
    bytes_of = {"e": "e", "é": "Ã©", "€": "âĤ¬"}
    pieces = tokenizer([*bytes_of["e"], *bytes_of["é"], *bytes_of["€"]], decoders.ByteLevel())
    assert token_texts(pieces, [0, 1, 2, 0]) == ["e", "", "é", "e"]
    assert token_texts(pieces, [3, 4, 5, 1, 2]) == ["", "", "€", "", "é"]
    cut = token_texts(pieces, [0, 3, 4])  # a response that was cut off within a character
    assert cut[:2] == ["e", ""] and "".join(cut) == pieces.decode([0, 3, 4])
    assert token_texts(pieces, []) == []


def test_tables_are_joined(tmp_path: Path) -> None:
    schema = pa.schema([("x", pa.int32())])
    for number in range(3):
        pq.write_table(pa.table({"x": pa.array([number] * number, pa.int32())}), tmp_path / f"{number}.parquet")
    join_tables(tmp_path / "all.parquet", [tmp_path / f"{number}.parquet" for number in range(3)], schema)
    assert pq.read_table(tmp_path / "all.parquet")["x"].to_pylist() == [1, 2, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"0.parquet", "1.parquet", "2.parquet", "all.parquet"}
