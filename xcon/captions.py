"""Tokens of the pseudo-captions. The captions themselves are written by `records.caption`.

A shard set has few distinct captions, one per class as a rule: each is tokenised once.
"""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of BERT's kind whose vocabulary is that of the captions.

    The vocabulary is the sorted characters, then the sorted words, so that all processes agree: the trainer
    of the tokenizers library does not give the same vocabulary twice.

    Args:
        captions: the captions of a shard set; what else is tokenised later falls back to pieces of them.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    characters = sorted({character for word in words for character in word})
    pieces = [*characters, *(f"##{c}" for c in characters), *sorted(w for w in words if len(w) > 1)]
    vocabulary = {piece: number for number, piece in enumerate([*_SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def tokenise(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Tensor:
    """Token ids, padded to the longest caption.

    Args:
        tokenizer: any Hugging Face tokenizer; without a padding token its end token pads.
        captions: K texts.

    Returns:
        `[K, L]` int64; padding is `pad_id(tokenizer)`.
    """
    rows = [torch.tensor(ids) for ids in tokenizer(list(captions))["input_ids"]]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id(tokenizer))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up short captions; no caption may contain it.

    Raises:
        ValueError: the tokenizer has neither a padding nor an end token.
    """
    number = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if number is None:
        raise ValueError("the text model's tokenizer has neither a padding nor an end token")
    return int(number)
