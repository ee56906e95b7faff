"""Coarser label spaces: which classes are one species, and which species one group.

NABirds' 555 classes are plumages of about 400 species in 22 groups: a male taken for a female of its species is
wrong as a class and right as a species.

N: records, C: classes, G: labels of a coarser space.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xcon.records import ClassInfo, split_plumage


def label_spaces(classes: Sequence[ClassInfo]) -> dict[str, NDArray[np.int64]]:
    """Class -> label in each coarser space.

    A class of a source without a hierarchy is in the group of its own species.

    Args:
        classes: C, in order of class id.

    Returns:
        `species` and `groups` (the top of the hierarchy), `[C]` each, numbered 0 .. G-1 by their sorted names.
    """
    names = [split_plumage(info.name)[0] for info in classes]
    tops = [info.hierarchy[0] if info.hierarchy else own for info, own in zip(classes, names, strict=True)]
    return {"species": _numbered(names), "groups": _numbered(tops)}


def _numbered(names: Sequence[str]) -> NDArray[np.int64]:
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)


def coarsen(probabilities: NDArray[np.floating], space: NDArray[np.int64]) -> NDArray[np.float64]:
    """The probability of a coarser label is the sum of its classes' probabilities.

    Args:
        probabilities: `[N, C]`.
        space: `[C]` label of each class, 0 .. G-1, all of them taken.

    Returns:
        `[N, G]`.
    """
    members = np.eye(space.max() + 1)[space]  # [C, G]
    return probabilities.astype(np.float64) @ members
