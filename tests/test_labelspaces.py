"""Coarser label spaces by hand: four plumages of two species, a bird without a hierarchy."""

import numpy as np
import pytest

from xcon import evaluation, labelspaces, records
from xcon.records import ClassInfo

NAMES = [
    ("Mallard (Male)", ("Ducks", "Dabblers")),
    ("Mallard  (Female/Eclipse male)", ("Ducks",)),
    ("Osprey", ()),
    ("Gadwall (Male)", ("Ducks",)),
]
CLASSES = [
    ClassInfo(class_id=n, raw_class_id=n, name=name, scientific_name=None, hierarchy=tops, counts={})
    for n, (name, tops) in enumerate(NAMES)
]
# Mallard (Male) is taken for the female (image 0), Gadwall for a Mallard (1), Osprey for itself (2).
SCORES = np.array([[0.3, 0.4, 0.2, 0.1], [0.5, 0.1, 0.1, 0.3], [0.1, 0.2, 0.6, 0.1]])
LABELS = np.array([0, 3, 2])


def test_plumages_are_one_species_and_the_top_of_the_hierarchy_a_group() -> None:
    """Sorted: Gadwall 0, Mallard 1, Osprey 2; Ducks 0 and, for want of a hierarchy, Osprey 1."""
    spaces = labelspaces.label_spaces(CLASSES)
    assert spaces["species"].tolist() == [1, 1, 2, 0]
    assert spaces["groups"].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Osprey", ("Osprey", "")),
        ("Mallard  (Adult  male)", ("Mallard", "Adult male")),
        ("Tit (Great) Major", ("Tit (Great) Major", "")),  # not at the end: part of the name
        ("(Male)", ("(Male)", "")),  # nothing would be left
    ],
)
def test_the_plumage_is_the_parenthesis_at_the_end(name: str, parts: tuple[str, str]) -> None:
    assert records.split_plumage(name) == parts


def test_a_coarser_label_has_the_sum_of_its_classes() -> None:
    found = labelspaces.coarsen(SCORES, np.array([1, 1, 2, 0]))
    assert found == pytest.approx(np.array([[0.1, 0.7, 0.2], [0.3, 0.6, 0.1], [0.1, 0.3, 0.6]]))


def test_judged_in_every_space_and_control() -> None:
    """As classes one image of three is right, as species two (the Mallard), as groups all three.

    The control is always sure of class 0: right on the first image, as groups on the first two.
    """
    sure = np.eye(4)[[0, 0, 0]]
    found = evaluation.judge({"scores": SCORES, "without_meta": sure}, LABELS, CLASSES)
    assert (found["n"], found["n_labels"], found["top1"]) == (3, 4, pytest.approx(1 / 3))
    species, groups = found["label_spaces"]["species"], found["label_spaces"]["groups"]
    assert (species["n_labels"], species["top1"]) == (3, pytest.approx(2 / 3))
    assert (groups["n_labels"], groups["top1"], groups["mean_per_class"]) == (2, 1.0, 1.0)
    # Groups are right with probability 0.8, 0.9 and 0.6: each in a bin of its own, 0.2, 0.1 and 0.4.
    assert groups["ece"] == pytest.approx(0.7 / 3)
    control = found["without_meta"]
    assert control["top1"] == pytest.approx(1 / 3)
    assert control["label_spaces"]["groups"]["top1"] == pytest.approx(2 / 3)
    assert sum(found["reliability"]["count"]) == 3
