"""Models are fetched from a hub that is served here, and trained on with the network refused."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from tests import commands, hubserver, training
from tests.hubserver import COMMIT, Hub
from xcon import encoders, hub, prefetch

IMAGE, TEXT = "timm/test_resnet.r160_in1k", "distilbert/distilbert-base-uncased"
OLD_NAME = "distilbert-base-uncased"  # as recipe paper calls it


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """A timm network and a DistilBERT, each as its library saves it, and what else real repositories hold."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(1234)  # not that of any training here: it must load these weights, not draw them again
    timm.models.save_for_hf(timm.create_model("test_resnet"), folder / "image", safe_serialization="both")
    captions = [f"This is a photograph of a bird called Western {word} Lark" for word in ("Marsh", "Hill", "Wood")]
    encoder, tokenizer = encoders.build_text("small-distilbert", captions)
    encoder.network.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    (folder / "text/tf_model.h5").write_bytes(b"for another library")
    return {
        repo: {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        for repo, name in ((IMAGE, "image"), (TEXT, "text"))
    }


@pytest.fixture
def served(repos: dict[str, dict[str, bytes]]) -> Hub:
    return Hub(repos, {OLD_NAME: TEXT})


@pytest.fixture
def cache(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, for this process, whose hub is the one served here."""
    with hubserver.serving(served) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
        yield tmp_path / "home"


def fetch(*arguments: str) -> int:
    return commands.run(prefetch.main, arguments)


def complaint(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line that a wrong call says."""
    capsys.readouterr()
    assert fetch(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xcon prefetch: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.slow
def test_fetched_on_a_login_node_a_job_trains_without_a_network(
    cache: Path, served: Hub, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In a namespace without network. With rates of zero the run has the weights that were served, to the bit."""
    refused = ["unshare", "--net"]
    if subprocess.run([*refused, "true"], check=False, capture_output=True).returncode:
        pytest.skip("kernel namespaces are needed to refuse the network, and this container has none")
    assert fetch("paper", "--image-backbone", "test_resnet") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in (IMAGE, OLD_NAME, str(cache / "xcon-prefetch.json")))
    repos = served.repos
    once = [*(name for name in repos[TEXT] if name != "tf_model.h5"), "model.safetensors", "config.json"]
    assert sorted(served.sent) == sorted(once)  # no second format, nothing of other libraries, nothing twice

    run = tmp_path / "run"
    zero = [f for name in ("image", "text", "meta", "head") for f in (f"--{name}-lr", "0")]
    small = ["--image-size", "32", "--epochs", "1", "--patience", "0", "--workers", "0", "--precision", "fp32"]
    done = subprocess.run(
        [*refused, sys.executable, "-m", "xcon", "pretrain", "paper", "--shards", tiny_shards, "--out", run,
         "--image-backbone", "test_resnet", *zero, *small],
        cwd=training.ROOT, env=training.environment() | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained = load_file(run / "model.safetensors")
    for repo, prefix in ((IMAGE, "towers.image.encoder.network."), (TEXT, "towers.text.encoder.network.")):
        (tmp_path / "served").write_bytes(repos[repo]["model.safetensors"])
        given = {prefix + name: tensor for name, tensor in load_file(tmp_path / "served").items()}
        compared = [n for n in given if n in trained and "running" not in n and "num_batches" not in n]
        assert len(compared) >= 20
        assert all(torch.equal(trained[name], given[name]) for name in compared)


def test_the_manifest_names_what_the_hub_has(cache: Path, repos: dict[str, dict[str, bytes]]) -> None:
    """Sizes and hashes as of the bytes that were served; fetched again, nothing is sent again."""
    assert fetch("--image-backbone", "test_resnet") == 0
    written = json.loads((cache / "xcon-prefetch.json").read_text())
    data = {name: repos[IMAGE][name] for name in ("model.safetensors", "config.json")}
    (model,) = written["models"]
    assert (model["repo"], model["revision"]) == (IMAGE, COMMIT)
    expected = [{"name": n, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in data.items()]
    assert model["files"] == expected


def test_fetched_again_nothing_is_sent_again_and_what_was_damaged_is(cache: Path, served: Hub) -> None:
    assert fetch("--text-model", OLD_NAME, "--image-backbone", "test_resnet") == 0
    assert set(hub.fetched()) == {OLD_NAME, IMAGE}
    served.sent.clear()
    assert fetch("paper", "--image-backbone", "test_resnet") == 0
    assert served.sent == []
    place = cached(cache, "model.safetensors", IMAGE)
    place.write_bytes(bytes(place.stat().st_size))
    assert fetch("--image-backbone", "test_resnet") == 0
    assert served.sent == ["model.safetensors"]
    assert fetch("--check") == 0


def cached(cache: Path, name: str, repo: str) -> Path:
    return cache / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT / name


def test_a_check_names_what_is_missing_changed_or_cut(cache: Path, capsys: pytest.CaptureFixture) -> None:
    assert complaint(capsys, "--check").endswith("xcon-prefetch.json: no such file; xcon prefetch makes it")
    assert fetch("paper", "--image-backbone", "test_resnet") == 0
    assert fetch("--check") == 0
    assert "test_vit" in complaint_lines(capsys, "--check", "--image-backbone", "test_vit")
    weights, vocabulary = cached(cache, "model.safetensors", IMAGE), cached(cache, "tokenizer.json", OLD_NAME)
    whole = weights.read_bytes()
    weights.write_bytes(b"x" + whole[1:])
    vocabulary.unlink()
    said = complaint_lines(capsys, "--check")
    assert f"{weights}: its bytes are not those that were fetched (sha256 differs)" in said
    assert f"{OLD_NAME}: tokenizer.json is missing" in said
    weights.write_bytes(whole[:-1])
    size = len(whole)
    assert f"{weights}: {size - 1:,} bytes, fetched were {size:,}: cut" in complaint_lines(capsys, "--check")
    (cache / "xcon-prefetch.json").write_text("{}")
    assert "not a manifest of xcon prefetch" in complaint(capsys, "--check")


def complaint_lines(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    capsys.readouterr()
    assert fetch(*arguments) == 2
    return capsys.readouterr().out


def test_another_revision_in_the_cache_is_found(cache: Path, served: Hub, capsys: pytest.CaptureFixture) -> None:
    """Another tool moved `main` on: what was checked is not what a job would load."""
    assert fetch("--image-backbone", "test_resnet") == 0
    (cache / "hub" / f"models--{IMAGE.replace('/', '--')}" / "refs/main").write_text("f" * 40)
    assert f"jobs would load another revision than {COMMIT}" in complaint_lines(capsys, "--check")


@pytest.mark.parametrize("sent", ["other", "short"])
def test_a_download_that_is_wrong_never_stands_as_whole(
    sent: str, cache: Path, served: Hub, repos: dict[str, dict[str, bytes]], capsys: pytest.CaptureFixture
) -> None:
    """Of the right size with other bytes, or cut: there is nothing to load afterwards, and no manifest."""
    data = repos[IMAGE]["model.safetensors"]
    served.instead["model.safetensors"] = bytes(len(data)) if sent == "other" else data[:1000]
    line = complaint(capsys, "--image-backbone", "test_resnet")
    assert ("came twice with another hash" if sent == "other" else "was not fetched into") in line
    assert not cached(cache, "model.safetensors", IMAGE).exists()
    assert not (cache / "xcon-prefetch.json").exists()
    served.instead.clear()
    assert fetch("--image-backbone", "test_resnet") == 0  # goes on
    assert fetch("--check") == 0


def test_a_newer_revision_that_is_cut_leaves_the_earlier_one_in_use(
    cache: Path, served: Hub, capsys: pytest.CaptureFixture
) -> None:
    assert fetch("--image-backbone", "test_resnet") == 0
    served.commit = "f" * 40
    other = {**served.repos[IMAGE], "model.safetensors": b"newer weights"}
    served.repos = {**served.repos, IMAGE: other}
    served.instead["model.safetensors"] = b"cut"
    complaint(capsys, "--image-backbone", "test_resnet")
    assert fetch("--check") == 0  # whole, and what a job would load


def test_a_wrong_call_is_one_line(
    cache: Path, served: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert "RECIPE...: name at least one" in complaint(capsys)
    assert "RECIPE papre: no such recipe; there are paper, clip" in complaint(capsys, "papre")
    assert "--image-backbone resnot: timm has no such network" in complaint(capsys, "--image-backbone", "resnot")
    line = complaint(capsys, "--image-backbone", "legacy_senet154")
    assert "legacy_senet154: timm has no weights of it on the hub" in line
    line = complaint(capsys, "--text-model", "nobody/nothing")
    assert f"--text-model nobody/nothing: {constants.ENDPOINT} has no model nobody/nothing" in line
    served.repos = {**served.repos, "some/bin": {"config.json": b"{}", "pytorch_model.bin": b""}}
    assert "no model.safetensors, which xcon loads" in complaint(capsys, "--text-model", "some/bin")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in complaint(capsys, "--image-backbone", "test_resnet")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    line = complaint(capsys, "--image-backbone", "test_resnet")
    assert "http://127.0.0.1:9 cannot be reached" in line
    assert "login node" in line


def test_what_is_here_already_is_not_fetched(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fetch("--text-model", str(tmp_path)) == 0
    assert f"--text-model {tmp_path}: a folder here, nothing to fetch" in capsys.readouterr().out
    for check in ([], ["--check"]):
        assert fetch("demo", *check) == 0
        assert "demo: nothing of the hub is needed" in capsys.readouterr().out
    assert not cache.exists()


def test_a_full_disk_is_one_line(
    cache: Path, repos: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A file system of 200 KB, and weights of 3 MB."""
    folder = cache.parent / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", folder]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        with pytest.warns(UserWarning, match="Not enough free disk space"):
            line = complaint(capsys, "--image-backbone", "test_resnet")
        assert f"was not fetched into {folder}/hub (No space left on device)" in line
        assert not list(folder.rglob("model.safetensors"))
    finally:
        subprocess.run(["umount", folder], check=True)


def test_needs_follow_recipes_and_settings() -> None:
    """By the sentences of the recipes: both trainers of a recipe, each model once, nothing untrained."""
    resnet, text = ("--image-backbone", "resnet50"), ("--text-model", "distilbert-base-uncased")
    needs = {
        ("paper",): [resnet, text],
        ("paper", "clip", "best", "image"): [resnet, text],
        ("supcon", "inception"): [("--image-backbone", "inception_v3")],
        ("laptop",): [("--image-backbone", "mobilenetv2_100")],
        ("demo",): [],
    }
    for names, expected in needs.items():
        assert hub.needs(names) == expected
    other = hub.needs(["paper"], text_model="my/text", image_backbone="my_net")
    assert other == [("--image-backbone", "my_net"), ("--text-model", "my/text")]
