"""Tokens of pseudo-captions: the vocabulary by hand, the way there and back."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from xcon import captions

BIRDS = ("A photo of a Barn Owl", "A photo of an Osprey", "A photo of a Snow Goose (White morph)")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_vocabulary_by_hand() -> None:
    """Words "ab" and "b": sorted characters, the same as word ends, then the words of more than one."""
    vocabulary = captions.build_tokenizer(["Ab b", "b"]).get_vocab()
    assert sorted(vocabulary, key=vocabulary.__getitem__) == [*SPECIAL, "a", "b", "##a", "##b", "ab"]
    assert sorted(vocabulary.values()) == list(range(10))


def test_vocabulary_does_not_depend_on_the_order_of_the_captions() -> None:
    expected = captions.build_tokenizer(BIRDS).get_vocab()
    for seed in range(5):
        shuffled = [*random.Random(seed).sample(BIRDS, k=3), BIRDS[seed % 3]]
        assert captions.build_tokenizer(shuffled).get_vocab() == expected


def test_captions_come_back_in_lower_case() -> None:
    tokenizer = captions.build_tokenizer(BIRDS)
    for row, text in zip(captions.tokenise(tokenizer, BIRDS), BIRDS, strict=True):
        words = tokenizer.convert_ids_to_tokens(row.tolist())
        assert [w for w in words if w not in SPECIAL] == text.lower().replace("(", "( ").replace(")", " )").split()
        assert "[UNK]" not in words


def test_tokens_by_hand() -> None:
    """Ids as in the vocabulary by hand; [CLS] first, [SEP] last, padded at the end."""
    tokenizer = captions.build_tokenizer(["Ab b", "b"])
    assert captions.tokenise(tokenizer, ["Ab b", "b"]).tolist() == [[2, 9, 6, 3], [2, 6, 3, 0]]


def test_other_words_fall_into_pieces_and_unseen_characters_are_unknown() -> None:
    tokenizer = captions.build_tokenizer(["Ab b"])
    assert tokenizer.convert_ids_to_tokens(captions.tokenise(tokenizer, ["BABA"])[0].tolist()) == [
        "[CLS]", "b", "##a", "##b", "##a", "[SEP]",
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(captions.tokenise(tokenizer, ["b z"])[0].tolist()) == [
        "[CLS]", "b", "[UNK]", "[SEP]",
    ]  # fmt: skip


def test_a_saved_tokenizer_gives_the_same_tokens(tmp_path) -> None:
    tokenizer = captions.build_tokenizer(BIRDS)
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert torch.equal(captions.tokenise(again, BIRDS), captions.tokenise(tokenizer, BIRDS))


def plain(**special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")), **special
    )


def test_without_a_padding_token_the_end_token_pads() -> None:
    assert captions.pad_id(plain(eos_token="<end>")) == 1


def test_a_tokenizer_that_cannot_pad_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        captions.pad_id(plain())
