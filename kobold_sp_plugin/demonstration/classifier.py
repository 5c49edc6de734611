"""Which genre a text is in: multinomial naive Bayes over words, fitted on the grammar's own text."""

import re
from typing import Dict, List, Sequence, Tuple

import numpy as np

from .grammar import stories
from .lexicon import GENRES

_WORD = re.compile(r"[a-z']+")


class Classifier:
    """Naive Bayes with add-one smoothing and equal priors; words never seen while fitting count nothing.

    ``texts``: for every genre, the texts to fit on.
    """

    def __init__(self, texts: Dict[str, List[str]]) -> None:
        self.genres = tuple(texts)
        counted = [_words(" ".join(texts[genre])) for genre in self.genres]
        self.vocabulary = {w: i for i, w in enumerate(sorted({w for ws in counted for w in ws}))}
        counts = np.ones((len(self.genres), len(self.vocabulary)))
        for row, words in zip(counts, counted):
            np.add.at(row, [self.vocabulary[word] for word in words], 1)
        self.log_likelihood = np.log(counts / counts.sum(axis=1, keepdims=True))

    @classmethod
    def fitted(cls, count: int = 300, seed: int = 11) -> "Classifier":
        """A classifier fitted on ``count`` stories of every genre."""
        return cls({genre: [s.text for s in stories(genre, count, seed)] for genre in GENRES})

    def genre(self, text: str) -> str:
        """The likeliest genre; of a text without a known word, the first."""
        known = [self.vocabulary[word] for word in _words(text) if word in self.vocabulary]
        return self.genres[int(self.log_likelihood[:, known].sum(axis=1).argmax())]

    def share(self, texts: Sequence[str], genre: str) -> float:
        """The share of ``texts`` that classify as ``genre``."""
        return sum(self.genre(text) == genre for text in texts) / len(texts)

    def accuracy(self, count: int = 200, seed: int = 12) -> Tuple[float, float]:
        """Accuracy on first paragraphs, and on whole stories, of unseen stories of the grammar."""
        first = whole = 0.0
        for genre in self.genres:
            held_out = stories(genre, count, seed)
            first += self.share([s.paragraphs[0] for s in held_out], genre)
            whole += self.share([s.text for s in held_out], genre)
        return first / len(self.genres), whole / len(self.genres)


def _words(text: str) -> List[str]:
    return _WORD.findall(text.lower())
