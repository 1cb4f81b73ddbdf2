"""The independent judge: a linear Bradley-Terry model over hashed n-grams. It is reported and never selects.

Given pairs (c, r), the fit maximises sum log sigmoid(s(c) - s(r)) with s(x) = w . f(x): logistic regression
without an intercept on the differences f(c) - f(r). f(x) marks which word 1-2-grams and character
1-4-grams occur, weighs each by how unevenly it is shared between the two sides (the log-count ratio of
Wang & Manning 2012, "Baselines and Bigrams"), and has unit length, so that a score does not grow with the
text. The weighing is what carries over from one source of reviews to another: it takes the share of IMDB
pairs ranked right from 73 % to 77 %. Characters keep the judge informative on text without words.

Left out on purpose: embeddings and pretrained weights. The judge must share nothing with the reward model.
Letters are lowercased.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.atomic_files import disk_errors, write_json
from alignment.errors import DataError, ModelError
from alignment.types import Message

HASH_SIZE = 2**18
"""Columns per kind of n-gram."""
INVERSE_REGULARISATION = 3.0
"""C of the logistic regression, chosen on IMDB pairs that measure nothing else."""
FORMAT = 1
"""Version of the saved files; another one is refused."""

_WEIGHTS, _CARD = "judge.safetensors", "judge.json"


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """A fitted judge. `scale` and `weights` are float32 of shape (2 * HASH_SIZE,): word columns, then characters."""

    scale: NDArray[np.float32]
    weights: NDArray[np.float32]

    def score(self, texts: Sequence[str]) -> list[float]:
        """One score per text, higher is better; no unit, and only differences mean anything."""
        if not texts:
            return []
        return [float(s) for s in _features(texts, self.scale) @ self.weights]

    def save(self, folder: Path) -> None:
        """Write the judge to `folder`; `judge.json` comes last, so a folder without it holds no judge.

        Raises DiskError.
        """
        from safetensors.numpy import save_file

        with disk_errors(folder / _WEIGHTS):
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"scale": self.scale, "weights": self.weights}, folder / _WEIGHTS)
        write_json(folder / _CARD, {"format": FORMAT, "hash_size": HASH_SIZE})


def train_judge(chosen: Sequence[str], rejected: Sequence[str], *, seed: int) -> Judge:
    """Fit a judge to pairs: `chosen[i]` is preferred to `rejected[i]`.

    `seed` draws which half of the differences enters with the opposite sign: the regression needs both
    classes, and the likelihood does not depend on the choice. Raises DataError for fewer than two pairs or
    sides of unequal length.
    """
    from sklearn.linear_model import LogisticRegression

    if len(chosen) != len(rejected):
        raise DataError(f"the judge's pairs have {len(chosen)} chosen and {len(rejected)} rejected texts")
    if len(chosen) < 2:
        raise DataError(f"the judge needs at least 2 preference pairs, got {len(chosen)}: see judge.train_pairs")
    counts_chosen, counts_rejected = _ngrams(chosen), _ngrams(rejected)
    scale = _log_count_ratio(counts_chosen, counts_rejected)
    differences = _unit_rows(counts_chosen, scale) - _unit_rows(counts_rejected, scale)
    signs = np.random.default_rng(seed).permutation(np.resize([1.0, -1.0], len(chosen)))
    regression = LogisticRegression(C=INVERSE_REGULARISATION, fit_intercept=False, max_iter=1000)
    regression.fit(_scaled_rows(differences, signs), signs)
    return Judge(scale=scale, weights=regression.coef_[0].astype(np.float32))


def load_judge(folder: Path) -> Judge:
    """Read a judge that `save` wrote. Raises ModelError that names the folder."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        card = json.loads((folder / _CARD).read_text())
        tensors = load_file(folder / _WEIGHTS)
        judge = Judge(scale=tensors["scale"], weights=tensors["weights"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder}: holds no readable judge ({error}); train it again by a new run") from error
    if card != {"format": FORMAT, "hash_size": HASH_SIZE} or judge.weights.shape != (2 * HASH_SIZE,):
        raise ModelError(f"{folder}: a judge of another format ({card}); train it again by a new run")
    return judge


def pairwise_accuracy(judge: Judge, chosen: Sequence[str], rejected: Sequence[str]) -> float:
    """Share of pairs whose chosen text scores higher; a tie counts one half. Raises DataError without pairs."""
    if not chosen or len(chosen) != len(rejected):
        raise DataError(
            f"accuracy needs as many chosen as rejected texts, at least one; got {len(chosen)} and {len(rejected)}"
        )
    differences = np.subtract(judge.score(chosen), judge.score(rejected))
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def judge_text(messages: Sequence[Message]) -> str:
    """A conversation as the judge reads it: the messages' contents, one after the other."""
    return "".join(message["content"] for message in messages)


def _ngrams(texts: Sequence[str]) -> Any:
    """Which hashed n-grams occur: a sparse 0/1 matrix of shape (len(texts), 2 * HASH_SIZE)."""
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer

    return sparse.hstack(
        [
            HashingVectorizer(
                analyzer=analyzer,
                ngram_range=ngram_range,
                n_features=HASH_SIZE,
                binary=True,
                norm=None,
                alternate_sign=False,
                dtype=np.float32,
            ).transform(texts)
            for analyzer, ngram_range in (("word", (1, 2)), ("char_wb", (1, 4)))
        ],
        format="csr",
    )


def _log_count_ratio(chosen: Any, rejected: Any) -> NDArray[np.float32]:
    """|log(p/|p|) - log(q/|q|)| per column, p and q being one more than the texts of a side with that n-gram."""
    logs = []
    for side in (chosen, rejected):
        counts = 1.0 + np.asarray(side.sum(axis=0), dtype=np.float64)[0]
        logs.append(np.log(counts / counts.sum()))
    ratio: NDArray[np.float32] = np.abs(logs[0] - logs[1]).astype(np.float32)
    return ratio


def _features(texts: Sequence[str], scale: NDArray[np.float32]) -> Any:
    return _unit_rows(_ngrams(texts), scale)


def _unit_rows(ngrams: Any, scale: NDArray[np.float32]) -> Any:
    """Columns times `scale`, then rows of unit length; a row without n-grams stays zero."""
    from sklearn.preprocessing import normalize

    scaled = ngrams.copy()
    scaled.data *= scale[scaled.indices]
    return normalize(scaled, norm="l2", copy=False)


def _scaled_rows(matrix: Any, factors: NDArray[np.float64]) -> Any:
    scaled = matrix.copy()
    scaled.data *= np.repeat(factors, np.diff(scaled.indptr)).astype(scaled.dtype)
    return scaled
