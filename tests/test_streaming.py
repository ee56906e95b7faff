"""Streams from a server on this machine: records as the loader has them, and sources that fail."""

import contextlib
import functools
import http.server
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from shards import cli
from tests import commands
from xcon import images, streaming
from xcon.images import ImageSpec
from xcon.loader import Records, Share
from xcon.sampler import Order
from xcon.shardset import ShardSet
from xcon.streaming import Stream, make_loader, open_stream

SPEC = ImageSpec("test_resnet", {}, 32, (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear")
EVERYTHING = ("image", "text", "meta")


class Server(http.server.SimpleHTTPRequestHandler):
    """A folder, some of its files spoilt: `cut` ends in the middle, `stuck` after its header."""

    cut: frozenset[str] = frozenset()
    stuck: frozenset[str] = frozenset()
    patience = threading.Event()

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def copyfile(self, source, outputfile) -> None:
        name = Path(self.path).name
        data = source.read()
        if name in self.stuck:
            outputfile.write(data[:100])
            outputfile.flush()
            self.patience.wait(30)
        with contextlib.suppress(BrokenPipeError):  # given up by then
            outputfile.write(data[: len(data) // 2] if name in self.cut else data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven shards to train on, of 4 photographs but for the last."""
    out = tmp_path_factory.mktemp("streamed") / "set"
    size = ["--classes", "3", "--per-class", "11", "--val-per-class", "0", "--samples-per-shard", "4"]
    assert commands.run(cli.main, ["build", "synthetic", "--out", str(out), *size]) == 0
    return out


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(folder)))
    socketserver.ThreadingMixIn.block_on_close = False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        Server.patience.set()
        server.shutdown()
        server.server_close()
        thread.join()
        Server.patience.clear()


def rows(stream: Stream) -> Records:
    return records_of(stream.split("train"))


def records_of(split) -> Records:
    tokens = torch.arange(3)[:, None]  # of a caption its number, which is that of its class in both
    return Records(
        split, EVERYTHING, images.train_transform(SPEC, crop_scale=0.35), tokens, meta_dropout=0.3, seed=2
    )


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_records_are_those_of_the_loader(folder: Path, url: str, ranks: int, workers: int) -> None:
    """Photograph, crop, place, caption, label and weight of each; as many steps on all processes."""
    stream = open_stream(url, "train")
    exact = ShardSet(folder).split("train")
    exact.caption = exact.class_id
    expected, order = records_of(exact), Order(len(exact), 18, 0)
    assert order.steps_per_epoch == 2
    steps = range(1, 4)
    weights = np.zeros(len(steps))
    for rank in range(ranks):
        found = list(make_loader(stream, rows(stream), order, Share(rank, ranks, workers), steps=steps, buffer=5))
        assert len(found) == len(steps)
        for number, (step, batch) in enumerate(zip(steps, found, strict=True)):
            weights[number] += batch["weight"].sum().item()
            for i, index in enumerate(batch["index"].tolist()):
                record = expected[step // 2, index, 1.0]
                for name in ("image", "text", "meta", "label"):
                    np.testing.assert_array_equal(batch[name][i].numpy(), record[name].numpy())
    assert weights.tolist() == [order.rows(step) for step in steps]


def test_one_reader_has_each_record_once_in_an_epoch(url: str) -> None:
    """Mixed over shards, and in another order in the next epoch and with another seed."""
    stream = open_stream(url, "train")

    n = stream.samples

    def indices(seed: int, steps: range) -> list[int]:
        batches = make_loader(stream, rows(stream), Order(n, 6, seed), Share(), steps=steps)
        return [i for b in batches for i, w in zip(b["index"].tolist(), b["weight"], strict=True) if w]

    epoch = Order(n, 6, 0).steps_per_epoch
    first, second = indices(0, range(epoch)), indices(0, range(epoch, 2 * epoch))
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second
    assert first != indices(1, range(epoch))
    assert first == indices(0, range(epoch))
    assert len({i // 4 for i in first[:6]}) > 2


def test_a_command_is_a_source_too(folder: Path) -> None:
    stream = open_stream(f"pipe:cat {folder}", "train")
    exact = ShardSet(folder).split("train")
    found = list(streaming.read(stream, 1))
    assert [(index, row.image_id) for index, row, _ in found] == [(i, exact.image_id[i]) for i in range(4, 8)]
    assert [image for *_, image in found] == [exact.photo(i) for i in range(4, 8)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_breaks_off_is_named(url: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(url, "train")
    monkeypatch.setattr(Server, "cut", frozenset({"train-000002.tar"}))
    batches = make_loader(stream, rows(stream), Order(24, 6, 0), Share(workers=workers), steps=range(4))
    with pytest.raises(OSError, match=rf"^{url}/train-000002.tar: breaks off after \d of 4 records") as told:
        list(batches)
    assert "\n" not in str(told.value)


def test_a_server_that_goes_silent_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(url, "train")
    monkeypatch.setattr(Server, "stuck", frozenset({"train-000003.tar"}))
    monkeypatch.setattr(streaming, "TIMEOUT", 0.5)
    with pytest.raises(OSError, match=f"{url}/train-000003.tar: .*timed out"):
        list(streaming.read(stream, 3))


def test_a_command_that_goes_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "TIMEOUT", 0.5)
    with pytest.raises(OSError, match=r"pipe:sleep 30 #/dataset.json: no byte came for 0.5 s"):
        open_stream("pipe:sleep 30 #", "train")


def test_sources_that_are_not_there(url: str, folder: Path) -> None:
    for source, message in (
        (f"{url}/no", f"{url}/no/dataset.json: HTTP Error 404"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1/dataset.json: .*refused"),
        ("pipe:false #", "pipe:false #/dataset.json: the command ended with status 1"),
        (str(folder), "a URL begins with"),
        ("pipe:echo '{}' #", "not a card of xcon"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            open_stream(source, "train")
    with pytest.raises(ValueError, match="no records in split 'val'; it has train, test"):
        open_stream(url, "val")


def test_more_readers_than_shards(url: str) -> None:
    stream = open_stream(url, "train")
    with pytest.raises(ValueError, match="7 shards for 8 readers, each needs one; fewer --workers do"):
        make_loader(stream, rows(stream), Order(24, 8, 0), Share(0, 4, 2), steps=range(1))
