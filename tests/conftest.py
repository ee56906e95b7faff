"""Fixtures of the whole suite."""

import concurrent.futures
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may use the network


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic shard set of 6 species: 96 photographs to train on, 12 held out, 36 to test."""
    folder = tmp_path_factory.mktemp("tiny") / "shards"
    command = [Path(sys.executable).parent / "xcon-shards", "build", "synthetic", "--out", folder]
    size = ["--classes", "6", "--per-class", "24", "--val-per-class", "2"]
    subprocess.run([*command, *size], check=True)
    return folder


@pytest.fixture(scope="session")
def forks() -> Iterator[concurrent.futures.Executor]:
    """A process that has imported everything once: `forks.submit(forked.run, ...)`."""
    forked = importlib.import_module("tests.forked")  # here, since it takes what most tests do without
    with forked.host() as executor:
        yield executor
