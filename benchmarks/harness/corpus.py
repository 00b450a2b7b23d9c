"""What language models are trained on: a text's words as numbers, or numbers drawn at random.

Either comes in batches of all ranks together, of which a rank takes its rows: so every strategy
sees the same sequences, and no two ranks have the same one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from text import read_text

#: The number of every word that is not in the vocabulary.
UNKNOWN = 0
#: At most so much of a file is read: all of WikiText-2, the beginning of WikiText-103.
FILE_BYTES = 16 << 20
#: About a million words of the standard library.
BUILT_IN_BYTES = 4 << 20
_WORD = re.compile(r"\w+|[^\w\s]")


def read_words(file: Path | None) -> list[str]:
    """What white space separates in ``file``, as in WikiText's token files.

    Without a file, the words and punctuation marks of the standard library's sources.
    """
    if file is not None:
        return read_text(file, FILE_BYTES).decode(errors="replace").split()
    return _WORD.findall(read_text(None, BUILT_IN_BYTES).decode(errors="replace"))


class Corpus:
    """A text with a vocabulary of ``vocab_size``: its most frequent words, and one for all others.

    Raises ``ValueError`` for a vocabulary that has no room for a word.
    """

    def __init__(self, words: Sequence[str], vocab_size: int) -> None:
        if vocab_size < 2:
            raise ValueError(
                f"a vocabulary of {vocab_size} has no word besides the unknown one: --vocab_size 2 "
                f"is the least"
            )
        frequent = [word for word, _ in Counter(words).most_common(vocab_size - 1)]
        self.numbers = {word: number for number, word in enumerate(frequent, UNKNOWN + 1)}
        self.tokens = torch.tensor([self.numbers.get(word, UNKNOWN) for word in words])

    def batches(self, size: int, seq_len: int) -> Iterator[Tensor]:
        """The text from its beginning: [size, seq_len + 1], the last token is the next one's first.

        Raises ``ValueError``, at once, if it is too short for a single batch.
        """
        step = size * seq_len
        count = (len(self.tokens) - 1) // step
        if count < 1:
            raise ValueError(
                f"the text has {len(self.tokens)} words and a batch of all ranks, {size} sequences "
                f"of {seq_len}, takes {step + 1}: give a longer text as --data, or a smaller "
                f"--batch_size or --seq_len"
            )
        starts = (step * index for index in range(count))
        return (
            self.tokens[start : start + step + 1].unfold(0, seq_len + 1, seq_len)
            for start in starts
        )


def synthetic(size: int, seq_len: int, vocab_size: int) -> Iterator[Tensor]:
    """Tokens without a meaning, for ever and each time the same: [size, seq_len + 1]."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocab_size, (size, seq_len + 1), generator=generator)
