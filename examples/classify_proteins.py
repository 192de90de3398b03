"""Compare a linear classifier on embeddings with one on one-hot features, and plot both.

    python examples/classify_proteins.py model=x.nemo input=deeploc.fasta label='(\\S+)-[MSU]$' output=localization

`label` is a regular expression. Its first group, matched in the header of a FASTA record, is the class of the protein.
The features of a protein are means over its residues: of the last layer's hidden states, and, as the baseline, of
one-hot vectors, which is its composition. The same logistic regression (scikit-learn) classifies both standardised
features, scored by five-fold cross-validation on the same folds. Random folds put similar proteins into training and
test, for both kinds of features. For scores to publish, split by identity. The outputs are report.json, and
classes.png: the first two principal components of each, with the accuracy. In Jupyter, import `classify` and `draw`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bionemo_esm import ProteinModel
from bionemo_esm.alphabet import FIRST_RESIDUE_ID, NUM_STANDARD_RESIDUES, encode
from bionemo_esm.data.fasta import read_fasta
from bionemo_esm.errors import UserError
from bionemo_esm.plotting import MUTED, WIDTH, styled, write_png
from bionemo_esm.statistics import percentile_interval, resampled_indices

Features = NDArray[np.float64]  # [proteins, features]
KEYS = {"model", "input", "label", "output"}
FOLDS, SEED, RESAMPLES = 5, 0, 1000
FEWEST = 2 * FOLDS  # minimum proteins in a class; rarer classes are omitted
SHOWN = 9  # classes with their own colour in the plot


class Estimate(NamedTuple):
    """A score with its 95% bootstrap interval over proteins."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


def classify(features: Features, classes: NDArray[np.str_]) -> dict[str, Estimate]:
    """Return accuracy and macro F1 of a logistic regression in five-fold cross-validation.

    The folds depend on the classes only.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    predicted = cross_val_predict(model, features, classes, cv=folds)
    scores = {"accuracy": accuracy_score, "macro F1": partial(f1_score, average="macro")}
    return {name: estimated(score, classes, predicted) for name, score in scores.items()}


def estimated(score: Callable[..., float], classes: NDArray[np.str_], predicted: NDArray[np.str_]) -> Estimate:
    drawn = resampled_indices(len(classes), RESAMPLES, SEED)
    interval = percentile_interval(np.array([score(classes[some], predicted[some]) for some in drawn]))
    return Estimate(float(score(classes, predicted)), *interval)


def verdict(baseline: Estimate, embeddings: Estimate) -> str:
    """Return a sentence on the gain in accuracy, and whether the two intervals overlap."""
    apart = embeddings.low > baseline.high or baseline.low > embeddings.high
    where = "beyond the intervals" if apart else "within the intervals: no difference is shown"
    return f"embeddings: {embeddings.value - baseline.value:+.3f} accuracy, {where}"


def composition(sequences: list[str]) -> Features:
    """Return the mean of one-hot vectors over the residues of each protein: [proteins, 20]."""
    counts = [np.bincount(encode(sequence), minlength=33) for sequence in sequences]
    standard = np.array(counts)[:, FIRST_RESIDUE_ID : FIRST_RESIDUE_ID + NUM_STANDARD_RESIDUES]
    features: Features = standard / np.array([[len(sequence)] for sequence in sequences])
    return features


def read_classes(path: Path, pattern: str) -> tuple[dict[str, str], NDArray[np.str_]]:
    """Return sequences by id, and the class of each, omitting classes of fewer than `FEWEST` proteins."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"label={pattern} is no regular expression with a group ({error})") from error
    if not expression.groups:
        raise UserError(f"label={pattern} is no regular expression with a group: put the class into parentheses")
    sequences, classes = {}, {}
    for record in read_fasta(path):
        if (found := expression.search(record.header)) is None:
            raise UserError(f"{path}, record {record.number}: label={pattern} finds nothing in {record.header!r}")
        sequences[record.id], classes[record.id] = record.sequence.decode(), found[1]
    frequent = {name for name, count in Counter(classes.values()).items() if count >= FEWEST}
    if len(frequent) < 2:
        raise UserError(f"{path}: {len(frequent)} classes of {FEWEST} or more proteins; two are needed at least")
    kept = [identifier for identifier, name in classes.items() if name in frequent]
    return {identifier: sequences[identifier] for identifier in kept}, np.array([classes[kept_id] for kept_id in kept])


def draw(panels: dict[str, Features], classes: NDArray[np.str_], path: Path) -> Path:
    """Plot the first two principal components of each set of features, with a colour for each class."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = [name for name, _ in Counter(classes.tolist()).most_common(SHOWN)]
    with styled():
        figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
        for axes, (title, features) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            components = PCA(2, random_state=SEED)
            places = components.fit_transform(StandardScaler().fit_transform(features))
            rest = ~np.isin(classes, shown)
            axes.scatter(*places[rest].T, s=5, color=MUTED, alpha=0.3, linewidths=0)
            for index, name in enumerate(shown):
                colour = colormaps["tab10"](index)
                axes.scatter(*places[classes == name].T, s=9, color=colour, alpha=0.7, linewidths=0, label=name)
            axes.margins(0.05)  # keeps points inside the axes
            axes.set_title(title, loc="left", weight="bold", fontsize="medium")
            first, second = components.explained_variance_ratio_
            axes.set_xlabel(f"first component, {first:.0%} of the variance")
            axes.set_ylabel(f"second, {second:.0%}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        return write_png(figure, path)


def main(settings: dict[str, str]) -> None:
    for key in settings.keys() - KEYS:
        raise UserError(f"{key} is not a key; --help lists every key")
    for key in KEYS - settings.keys():
        raise UserError(f"{key} must be given: {key}=...")
    sequences, classes = read_classes(Path(settings["input"]), settings["label"])
    model = ProteinModel.load(settings["model"])
    sets = {
        "one-hot": composition(list(sequences.values())),
        "embeddings": model.embed(sequences).mean.astype(np.float64),
    }
    report: dict[str, Any] = {"proteins": len(classes), "classes": dict(Counter(classes.tolist()).most_common())}
    print(f"{len(classes):,} proteins of {len(report['classes'])} classes")
    panels, accuracies = {}, []
    for name, features in sets.items():
        scores = classify(features, classes)
        accuracies.append(scores["accuracy"])
        panels[f"{name}: accuracy {scores['accuracy']}"] = features
        report[name] = {"features": features.shape[1], **{key: score._asdict() for key, score in scores.items()}}
        print(f"  {name:<12}" + "".join(f"{key} {score}   " for key, score in scores.items()).rstrip())
    print(f"  {verdict(*accuracies)}")
    folder = Path(settings["output"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {folder / 'report.json'} and {draw(panels, classes, folder / 'classes.png')}")


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv):
        print(__doc__)
        sys.exit()
    try:
        main({key: value for key, _, value in (argument.partition("=") for argument in sys.argv[1:])})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
