"""Batches against the tar itself, between workers, processes and interruptions; and damaged shard sets."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from xcon import captions, images
from xcon.images import ImageSpec
from xcon.loader import Batch, ClassCaptions, Records, Share, evaluation_loader, make_loader, to_device
from xcon.records import year_fraction
from xcon.sampler import Order
from xcon.shardset import ShardSet

SPEC = ImageSpec("test_resnet", {}, 32, (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear")
EVERYTHING = ("image", "text", "meta")


def members(shards: Path, split: str) -> list[dict[str, bytes]]:
    """The records of a split as the standard library reads them: ending of the name -> bytes."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(shards.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, ending = member.name.split(".", 1)
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[ending] = file.read()
    return list(found.values())


def all_modalities(shards: ShardSet, **changes: object) -> Records:
    tokens = captions.tokenise(captions.build_tokenizer(shards.captions), shards.captions)
    settings = {"transform": images.train_transform(SPEC, crop_scale=0.35), "tokens": tokens, **changes}
    return Records(shards.split("train"), EVERYTHING, **settings)


def same(one: Batch, two: Batch) -> bool:
    """Equal bit by bit; unknown numbers equal each other."""
    return one.keys() == two.keys() and all(
        np.array_equal(one[name].numpy(), two[name].numpy(), equal_nan=one[name].is_floating_point())
        for name in one
    )


@pytest.fixture(scope="module")
def shards(tiny_shards: Path) -> ShardSet:
    return ShardSet(tiny_shards)


@pytest.fixture(scope="module")
def many_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose training split is spread over several tars."""
    folder = tmp_path_factory.mktemp("many") / "shards"
    command = [Path(sys.executable).parent / "xcon-shards", "build", "synthetic", "--out", folder]
    size = ["--classes", "3", "--per-class", "8", "--val-per-class", "1", "--samples-per-shard", "4"]
    subprocess.run([*command, *size, "--missing", "0.4"], check=True)
    assert len(list(folder.glob("train-*.tar"))) > 2
    return folder


# ---- what a batch holds


@pytest.mark.parametrize("split", ["train", "test"])
def test_batches_hold_what_the_tars_hold(many_tars: Path, split: str) -> None:
    """Photograph, class, place, date and caption of every record, in the order of the tars."""
    whole = ShardSet(many_tars)
    tokenizer = captions.build_tokenizer(whole.captions)
    tokens = captions.tokenise(tokenizer, whole.captions)
    records = Records(whole.split(split), EVERYTHING, images.eval_transform(SPEC), tokens)
    expected = members(many_tars, split)
    (batch,) = evaluation_loader(records, Share(), batch_size=len(expected))
    assert batch["index"].tolist() == list(range(len(expected)))
    assert batch["weight"].tolist() == [1] * len(expected)
    assert any(math.isnan(lon) for lon in batch["meta"][:, 0])
    for i, record in enumerate(expected):
        facts = json.loads(record["json"])
        nan = math.nan
        place = [nan if facts[n] is None else facts[n] for n in ("lon", "lat")]
        assert batch["label"][i] == facts["class_id"]
        assert batch["meta"][i].tolist() == pytest.approx(
            [*place, year_fraction(facts["date"])], rel=1e-6, nan_ok=True
        )
        row = captions.tokenise(tokenizer, [record["txt"].decode()])[0]
        assert batch["text"][i][batch["text"][i] != 0].tolist() == row.tolist()
        assert torch.equal(batch["image"][i], images.eval_transform(SPEC)(images.decode(record["jpg"])))


def test_photographs_are_the_bytes_of_the_tar(many_tars: Path) -> None:
    split = ShardSet(many_tars).split("train")
    expected = members(many_tars, "train")
    for i in (5, 0, len(split) - 1, *range(len(split))):  # in any order
        assert split.photo(i) == expected[i]["jpg"]
    assert len(split) == len(expected)


def test_class_captions_are_those_of_the_class(shards: ShardSet, tiny_shards: Path) -> None:
    said = {json.loads(r["json"])["class_id"]: r["txt"].decode() for r in members(tiny_shards, "train")}
    assert [shards.captions[i] for i in shards.class_captions] == [said[c] for c in sorted(said)]
    assert list(shards.captions) == sorted(set(said.values()))


def test_only_the_modalities_asked_for_are_delivered(shards: ShardSet) -> None:
    records = Records(shards.split("train"), ("meta",))
    assert set(records[(0, 0, 1.0)]) == {"meta", "label", "index", "weight"}


# ---- the same batches whoever makes them


def test_workers_make_no_difference(shards: ShardSet) -> None:
    records, order = all_modalities(shards, meta_dropout=0.3, seed=4), Order(96, 20, seed=4)
    alone = list(make_loader(records, order, Share(), steps=range(3, 8)))
    helped = list(make_loader(records, order, Share(workers=2), steps=range(3, 8)))
    assert len(alone) == 5
    assert all(same(one, two) for one, two in zip(alone, helped, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_have_the_global_batch(shards: ShardSet, world_size: int) -> None:
    records, order = all_modalities(shards, meta_dropout=0.3), Order(96, 20, seed=0)
    whole = make_loader(records, order, Share(), steps=range(4, 6))
    parts = [make_loader(records, order, Share(r, world_size), steps=range(4, 6)) for r in range(world_size)]
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert same({n: torch.cat([piece[n] for piece in pieces]) for n in batch}, batch)


def test_resumed_batches_are_those_that_remain(shards: ShardSet) -> None:
    records, order = all_modalities(shards, meta_dropout=0.3), Order(96, 40, seed=0)
    whole = list(make_loader(records, order, Share(), steps=range(5)))
    tail = list(make_loader(records, order, Share(), steps=range(2, 5)))
    assert all(same(one, two) for one, two in zip(whole[2:], tail, strict=True))


def test_draws_depend_on_seed_epoch_and_record_alone(shards: ShardSet) -> None:
    def photo(seed: int, epoch: int, index: int) -> Tensor:
        return all_modalities(shards, seed=seed)[(epoch, index, 1.0)]["image"]

    first = photo(0, 0, 7)
    torch.manual_seed(99)  # what the process has drawn before makes no difference
    assert torch.equal(first, photo(0, 0, 7))
    assert not torch.equal(first, photo(1, 0, 7))
    assert not torch.equal(first, photo(0, 1, 7))
    assert torch.equal(first, all_modalities(shards)[(0, 7, 0.0)]["image"])


def test_the_crop_of_a_record_does_not_move_with_the_modalities(shards: ShardSet) -> None:
    """So that a run with metadata sees the photographs of one without."""
    alone = Records(shards.split("train"), ("image",), images.train_transform(SPEC, crop_scale=0.35))
    assert torch.equal(alone[(1, 3, 1.0)]["image"], all_modalities(shards, meta_dropout=0.5)[(1, 3, 1.0)]["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_not_moved(shards: ShardSet, workers: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for _ in make_loader(all_modalities(shards), Order(96, 48, seed=0), Share(workers=workers), steps=range(2)):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failing_photograph_leaves_the_generator_too(shards: ShardSet) -> None:
    def fail(_: Tensor) -> Tensor:
        torch.rand(())
        raise ValueError("no")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no"):
        all_modalities(shards, transform=fail)[(0, 0, 1.0)]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_last_epochs_have_a_transform_of_their_own(shards: ShardSet) -> None:
    """Of three epochs the last is larger; the first ones are as if there were no other."""
    larger = images.train_transform(dataclasses.replace(SPEC, size=48), crop_scale=0.35)
    records, plain = all_modalities(shards, late=(2, larger)), all_modalities(shards)
    sides = [tuple(records[(epoch, 5, 1.0)]["image"].shape[1:]) for epoch in range(4)]
    assert sides == [(32, 32), (32, 32), (48, 48), (48, 48)]
    assert torch.equal(records[(1, 5, 1.0)]["image"], plain[(1, 5, 1.0)]["image"])
    order = Order(96, 48, seed=0)  # two steps in an epoch
    batches = make_loader(records, order, Share(), steps=range(3, 5))
    assert [batch["image"].shape[2] for batch in batches] == [32, 48]


def test_places_of_training_are_moved_record_by_record(shards: ShardSet) -> None:
    """By the draws of the record and epoch; what was hidden or unknown stays so, and photographs do not change."""
    split = shards.split("train")
    still, moving = all_modalities(shards), all_modalities(shards, meta_jitter_km=50.0, meta_jitter_days=5.0)
    index = int(np.flatnonzero(~np.isnan(split.place).any(axis=1))[0])
    first, again, later = (moving[(epoch, index, 1.0)] for epoch in (0, 0, 1))
    assert same(first, again)
    assert not torch.equal(first["meta"], later["meta"])
    assert torch.equal(first["image"], still[(0, index, 1.0)]["image"])
    assert not torch.equal(first["meta"], still[(0, index, 1.0)]["meta"])
    assert (first["meta"] - still[(0, index, 1.0)]["meta"]).abs().max() < 5  # degrees; 50 km are half of one
    dropped = all_modalities(shards, meta_jitter_km=50.0, meta_dropout=0.999)
    assert dropped[(0, index, 1.0)]["meta"].isnan().all()


def test_metadata_is_hidden_in_its_share_of_records(shards: ShardSet) -> None:
    """96 records in 20 epochs, a quarter hidden: 480 less those unknown anyway, standard deviation 19."""
    split = shards.split("train")
    known = ~np.isnan(split.place).all(axis=1)
    records = Records(split, ("meta",), meta_dropout=0.25)
    hidden = sum(
        int(records[(epoch, i, 1.0)]["meta"].isnan().all())
        for epoch in range(20)
        for i in range(len(split))
        if known[i]
    )
    assert abs(hidden - 0.25 * 20 * known.sum()) < 4 * 19
    never = Records(split, ("meta",))
    assert all(never[(0, i, 1.0)]["meta"].isnan().all().item() == (not known[i]) for i in range(len(split)))


def test_views_are_crops_of_one_photograph_one_after_the_other(shards: ShardSet) -> None:
    """The first is the one that a record of a single view has; the next goes on with its draws."""
    crop = images.train_transform(SPEC, crop_scale=0.35)
    one, three = (Records(shards.split("train"), ("image",), crop, views=v, seed=2)[(1, 5, 1.0)] for v in (1, 3))
    assert three["image"].shape == (3, 3, 32, 32)
    assert torch.equal(three["image"][0], one["image"])
    assert not torch.equal(three["image"][0], three["image"][1])
    assert not torch.equal(three["image"][1], three["image"][2])


def test_captions_of_a_template_are_those_of_the_card(tiny_shards: Path, shards: ShardSet) -> None:
    told = ShardSet(tiny_shards, "{name}, one of the {family}")
    expected = [f"{' '.join(c.name.split())}, one of the {c.hierarchy[0]}" for c in shards.card.classes]
    for split in ("train", "val", "test"):
        said = [told.captions[i] for i in told.split(split).caption]
        assert said == [expected[c] for c in told.split(split).class_id]
    assert [told.captions[i] for i in told.class_captions] == expected
    assert told.one_caption_per_class
    assert told.split("test").photo(3) == shards.split("test").photo(3)


def test_a_template_that_names_what_a_class_has_not_is_refused(tiny_shards: Path) -> None:
    with pytest.raises(
        ValueError, match=r"caption template 'a {order}': class .* has no 'order', only name, species"
    ):
        ShardSet(tiny_shards, "a {order}")


def test_evaluation_has_every_record_once_for_any_number_of_processes(shards: ShardSet) -> None:
    """36 records; batches of 16 become 18 for three processes."""
    records = Records(shards.split("test"), ("meta",))
    parts = [evaluation_loader(records, Share(rank, 3), batch_size=16) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    rows = [(i, w) for part in parts for b in part for i, w in zip(b["index"].tolist(), b["weight"], strict=True)]
    assert sorted(i for i, weight in rows if weight == 1) == list(range(36))


def test_to_device_keeps_every_tensor(shards: ShardSet) -> None:
    batch = next(iter(make_loader(all_modalities(shards), Order(96, 4, seed=0), Share(), steps=range(1))))
    assert same(to_device(batch, torch.device("cpu")), batch)


# ---- damaged sets


@pytest.fixture
def copy(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "set"))


def truncate_tar(folder: Path) -> None:
    path = folder / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-5000])


def lengthen_tar(folder: Path) -> None:
    with (folder / "train-000000.tar").open("ab") as file:
        file.write(bytes(512))


def drop_column(folder: Path) -> None:
    path = folder / "train-000000.index.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["lon"]), path)


def drop_row(folder: Path) -> None:
    path = folder / "train-000000.index.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)


def other_format(folder: Path) -> None:
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace("xcon-shards/1", "xcon-shards/9"))


def halve(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate_tar, r"train-000000.tar: \d+ bytes, the card says \d+: truncated or edited; build"),
        (lengthen_tar, r"train-000000.tar: \d+ bytes, the card says \d+: truncated or edited; build"),
        (lambda f: (f / "val-000000.tar").unlink(), "val-000000.tar: named by the card but missing"),
        (halve("train-000000.index.parquet"), "train-000000.index.parquet: not an index"),
        (drop_column, "train-000000.index.parquet: not an index"),
        (drop_row, "train-000000.index.parquet: 95 records, the card says 96"),
        (halve("dataset.json"), "dataset.json: not a card of xcon"),
        (other_format, "dataset.json: not a card of xcon .*format is not xcon-shards/1"),
        (lambda f: (f / "dataset.json").unlink(), "no dataset.json here"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_set_is_refused(copy: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ShardSet(copy)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_photograph_is_named(copy: Path, workers: int) -> None:
    """The middle of the third photograph of the shard is zeros; the tar has its old length."""
    split = ShardSet(copy).split("train")
    start, size = int(split.offset[2]), int(split.size[2])
    with (copy / "train-000000.tar").open("r+b") as tar:
        tar.seek(start + size // 2)
        tar.write(bytes(size - size // 2))
    name = f"{copy / 'train-000000.tar'}: {split.image_id[2]}.jpg: .*decode"
    loader = evaluation_loader(all_modalities(ShardSet(copy)), Share(workers=workers), batch_size=96)
    with pytest.raises(ValueError, match=name):
        list(loader)


def test_a_split_that_is_not_there_is_refused(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"no records in split 'extra'; it has train \(96\), val \(12\), test"):
        shards.split("extra")
    assert shards.has("val")
    assert not shards.has("extra")


def test_the_photographs_of_the_set_are_jpegs_of_their_size(tiny_shards: Path) -> None:
    """What `describe` and the index say of a record, read by Pillow."""
    whole = ShardSet(tiny_shards).split("val")
    record = members(tiny_shards, "val")[0]
    facts = json.loads(record["json"])
    assert whole.describe(0) == f"{tiny_shards / 'val-000000.tar'}: {facts['image_id']}.jpg"
    with Image.open(io.BytesIO(whole.photo(0))) as image:
        assert images.decode(whole.photo(0)).shape == (3, image.height, image.width)


# ---- captions shared by class


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_each_class_of_the_global_batch_has_its_caption_on_one_process(shards: ShardSet, world_size: int) -> None:
    """Whatever process has the record; what fills up the shares belongs to class -1."""
    split = shards.split("train")
    texts = torch.arange(len(shards.card.classes))[:, None] * 10
    order = Order(len(split), 10, seed=3)
    records = Records(split, ("meta",))
    shared = ClassCaptions(texts, split.class_id)
    loaders = [
        make_loader(records, order, Share(rank, world_size), steps=range(2, 5), captions=shared)
        for rank in range(world_size)
    ]
    for batches in zip(*loaders, strict=True):
        assert len({len(batch["text_class"]) for batch in batches}) == 1
        classes = torch.cat([batch["text_class"] for batch in batches]).tolist()
        labels = torch.cat([batch["label"] for batch in batches]).unique().tolist()
        assert sorted(set(classes) - {-1}) == labels
        assert len([c for c in classes if c != -1]) == len(labels)
        assert len(classes) < len(labels) + world_size
        for batch in batches:
            real = batch["text_class"] >= 0
            assert torch.equal(batch["text"][real, 0], 10 * batch["text_class"][real])
