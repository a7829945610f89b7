"""Readers for text: words (Penn Treebank format), characters, and the token ids of TinyStories.

A language model's example is a window: `length` ids, and the `length` ids that follow each of them. Windows do not overlap in their
targets. Training windows of `words` run as `batch_size` parallel streams; everywhere else they follow one another.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from spectrim.errors import FormatError, SettingError
from spectrim.zoo.data import Batches, Splits, data_file, data_folder

__all__ = ["characters", "ptb", "stories", "story_tokens", "vocabulary", "words"]

END, UNKNOWN = "<eos>", "<unk>"
STORY_START, STORY_VOCAB = 1, 512
Tokens = Int64[Tensor, " tokens"]


def vocabulary(train: str | Path) -> dict[str, int]:
    """Number the words of a text in order of first appearance, with ``<eos>`` at each line's end; ``<unk>`` is always included.

    Args:
        train: text file, one sentence a line, words separated by blanks; relative to `data_folder`, or absolute.

    Raises:
        FormatError: the file is missing, empty or not UTF-8.
    """
    return {word: number for number, word in enumerate(dict.fromkeys([*_read_words(train), UNKNOWN]))}


def words(
    train: str | Path,
    val: str | Path,
    test: str | Path,
    batch_size: int = 20,
    length: int = 35,
    shuffle: bool = False,
    seed: int = 0,
    limit: int | None = None,
) -> Splits:
    """Windows of word ids from three text files in Penn Treebank format (also WikiText's); the vocabulary is the training file's.

    The training text is cut into `batch_size` contiguous streams; batch i holds window i of each stream, and the ends of the streams
    that fill no window (or no batch) are left out. Validation and test text is read from front to back; at most `length` words at the
    very end are left out. Words that the training text lacks become ``<unk>``.

    Args:
        train: text file, one sentence a line; relative to `data_folder`, or absolute.
        val: same for validation.
        test: same for the test.
        batch_size: windows in a batch, >= 1.
        length: words in a window, >= 1.
        shuffle: draw the training windows in random order instead (for models that carry no state).
        seed: of that order, >= 0.
        limit: keep at most this many windows of each split, >= 1; None keeps all.

    Raises:
        FormatError: a file is missing, empty, not UTF-8 or shorter than a window.
        SettingError: an argument outside these ranges.
    """
    _check("words", batch_size, length, limit)
    numbers = vocabulary(train)
    streams = _windows(train, _word_ids(train, numbers), length, batch_size)
    evaluation = [_windows(path, _word_ids(path, numbers), length) for path in (val, test)]
    return Splits(
        _batches(streams, batch_size, limit, shuffle, seed),
        *(_batches(windows, batch_size, limit) for windows in evaluation),
    )


def ptb(batch_size: int = 20, length: int = 35, shuffle: bool = False, seed: int = 0, limit: int | None = None) -> Splits:
    """Penn Treebank as prepared by Mikolov: 929,589 / 73,760 / 82,430 words, a vocabulary of 10,000; arguments as `words`.

    Reads ``text/ptb/ptb.{train,valid,test}.txt`` in the data folder.
    """
    train, val, test = (f"text/ptb/ptb.{split}.txt" for split in ("train", "valid", "test"))
    return words(train, val, test, batch_size, length, shuffle, seed, limit)


def characters(
    path: str | Path = "text/tinyshakespeare.txt", batch_size: int = 32, length: int = 128, seed: int = 0, limit: int | None = None
) -> Splits:
    """Windows of character ids of one text (by default tiny Shakespeare, 65 different characters), split 90/5/5 from front to back.

    Ids number the text's different characters in code-point order. Training windows are shuffled.

    Args:
        path: text file; relative to `data_folder`, or absolute.
        batch_size: windows in a batch, >= 1.
        length: characters in a window, >= 1.
        seed: of the training order, >= 0.
        limit: keep at most this many windows of each split, >= 1; None keeps all.

    Raises:
        FormatError: the file is missing, not UTF-8, or so short that a split has no window.
        SettingError: an argument outside these ranges.
    """
    _check("characters", batch_size, length, limit)
    text = _read_text(path)
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[character] for character in text], dtype=torch.int64)
    parts = ids.tensor_split((len(ids) * 90 // 100, len(ids) * 95 // 100))
    train, val, test = (_windows(path, part, length) for part in parts)
    return Splits(_batches(train, batch_size, limit, True, seed), _batches(val, batch_size, limit), _batches(test, batch_size, limit))


def story_tokens() -> list[Tokens]:
    """Return the 2,316 TinyStories as token ids in ``[0, 512)``, each beginning with 1, in the file's order.

    Reads ``stories260K/tinystories_tok512_uint16.npy`` in the data folder.

    Raises:
        FormatError: the file is missing or does not hold such ids.
    """
    file = data_file("stories260K/tinystories_tok512_uint16.npy", "NumPy array of uint16 token ids, 1 at the start of each story")
    try:
        ids = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise FormatError(file, f"is not a whole .npy file: {error}") from error
    if (
        not isinstance(ids, np.ndarray)
        or ids.dtype != np.uint16
        or ids.ndim != 1
        or len(ids) == 0
        or ids[0] != STORY_START
        or ids.max() >= STORY_VOCAB
    ):
        raise FormatError(file, f"expected uint16 ids below {STORY_VOCAB} in one dimension, starting with {STORY_START}")
    tokens = torch.from_numpy(ids.astype(np.int64))
    starts = (tokens == STORY_START).nonzero().flatten()
    return list(tokens.tensor_split(starts[1:]))


def stories(batch_size: int = 16, length: int = 256, seed: int = 0, limit: int | None = None) -> Splits:
    """Windows of TinyStories token ids, 80 % / 10 % / 10 % of the stories: the first tenth is the test, the second validation.

    Within a split the stories follow one another, each beginning with id 1, and windows are cut through them as in the model's own
    training. The loss on such windows is higher than the 1.2958 nats per token of whole stories (see `stories260k`), because a window
    that starts inside a story has not seen its beginning.

    Args:
        batch_size: windows in a batch, >= 1.
        length: tokens in a window, >= 1; at most 512 for `stories260k`.
        seed: of the training order, >= 0.
        limit: keep at most this many windows of each split, >= 1; None keeps all.

    Raises:
        FormatError: the file is missing or not in this format.
        SettingError: an argument outside these ranges.
    """
    _check("stories", batch_size, length, limit)
    texts = story_tokens()
    tenth = len(texts) // 10
    parts = texts[2 * tenth :], texts[tenth : 2 * tenth], texts[:tenth]
    train, val, test = (_windows("stories", torch.cat(part), length) for part in parts)
    return Splits(_batches(train, batch_size, limit, True, seed), _batches(val, batch_size, limit), _batches(test, batch_size, limit))


def _check(owner: str, batch_size: int, length: int, limit: int | None) -> None:
    for name, value in (("batch_size", batch_size), ("length", length), ("limit", limit)):
        if value is not None and value < 1:
            raise SettingError(owner, name, got=value, rule="an integer >= 1")


def _read_text(path: str | Path) -> str:
    file = data_file(path, "plain text in UTF-8")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(file, f"is not UTF-8 text: {error}") from error


def _read_words(path: str | Path) -> list[str]:
    text = _read_text(path)
    if not text.strip():
        raise FormatError(data_folder() / path, "holds no words")
    return [word for line in text.removesuffix("\n").split("\n") for word in (*line.split(), END)]


def _word_ids(path: str | Path, numbers: Mapping[str, int]) -> Tokens:
    unknown = numbers[UNKNOWN]
    return torch.tensor([numbers.get(word, unknown) for word in _read_words(path)], dtype=torch.int64)


def _windows(
    source: str | Path, tokens: Tokens, length: int, streams: int = 1
) -> tuple[Int64[Tensor, "windows time"], Int64[Tensor, "windows time"]]:
    """Cut into streams, each into windows; row ``i * streams + s`` is window i of stream s."""
    count = (len(tokens) // streams - 1) // length
    if count < 1:
        raise FormatError(source, f"{len(tokens)} tokens are too few for {streams} stream(s) of one window of {length} and a target")
    rows = tokens[: len(tokens) // streams * streams].view(streams, -1)
    inputs, targets = (
        rows[:, shift : shift + count * length].reshape(streams, count, length).transpose(0, 1).reshape(-1, length) for shift in (0, 1)
    )
    return inputs, targets


def _batches(windows: tuple[Tensor, Tensor], batch_size: int, limit: int | None, shuffle: bool = False, seed: int = 0) -> Batches:
    inputs, targets = windows
    return Batches(inputs[:limit], targets[:limit], batch_size, shuffle=shuffle, seed=seed)
