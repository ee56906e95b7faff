"""The house rules that no linter knows: names that shadow nothing, entry scripts that answer, and their size."""

import ast
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from xcon import __main__ as xcon_command

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("xcon/*.py"), *ROOT.glob("shards/*.py")])
ENTRIES = {name: ROOT / f"{module.replace('.', '/')}.py" for name, module in xcon_command.COMMANDS.items()}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, with what it imports from them."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_no_module_has_the_name_of_another_importable_thing() -> None:
    """A script's own folder comes first on sys.path: xcon/random.py would be everybody's `random`."""
    ours = {path.stem for path in MODULES} - {"__init__", "__main__"}
    installed = set(importlib.metadata.packages_distributions())
    assert {"torch", "PIL", "datasets"} <= installed  # import names, not those of projects
    assert ours & (sys.stdlib_module_names | installed) == set()


def test_every_script_is_a_command_and_every_command_a_script() -> None:
    guarded = {path for path in ROOT.glob("xcon/*.py") if 'if __name__ == "__main__":' in path.read_text()}
    assert guarded - {ROOT / "xcon/__main__.py"} == set(ENTRIES.values())


@pytest.mark.parametrize("name", ENTRIES)
def test_entry_scripts_are_short(name: str) -> None:
    assert len(ENTRIES[name].read_text().splitlines()) <= 250


def test_nothing_imports_an_entry_script() -> None:
    entries = set(xcon_command.COMMANDS.values())
    assert {path.name: found for path in MODULES if (found := imported(path) & entries)} == {}


def test_the_shard_builder_knows_records_and_shards_and_not_the_trainer() -> None:
    """It shares with xcon the record, the reader, the command line and the drawing of maps, which know no more."""
    shared = {"xcon.records", "xcon.tarindex", "xcon.commandline", "xcon.shardset", "xcon.cartography"}
    for path in [*ROOT.glob("shards/*.py"), *(ROOT / f"{name.replace('.', '/')}.py" for name in shared)]:
        modules = {".".join(name.split(".")[:2]) for name in imported(path) if name.startswith("xcon.")}
        assert modules <= shared, path.name


@pytest.mark.slow
@pytest.mark.parametrize("script", [*ENTRIES.values(), ROOT / "shards/cli.py"], ids=lambda path: path.stem)
def test_scripts_answer_by_path(script: Path, tmp_path: Path) -> None:
    """From anywhere; the script's folder is then first on sys.path."""
    done = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: xcon")


def answer(
    arguments: list[str], module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> str:
    """What `python -m MODULE` prints with these arguments; it ends well."""
    monkeypatch.setattr(sys, "argv", arguments)
    for name in (module, *xcon_command.COMMANDS.values()):
        monkeypatch.delitem(sys.modules, name, raising=False)  # runpy warns of what another test imported
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert stop.code in (None, 0)  # noqa: PT017 - not every entry raises
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ENTRIES)
def test_scripts_answer_by_module_and_as_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The same words either way, under the name of the command."""
    by_module = answer([name, "--help"], xcon_command.COMMANDS[name], monkeypatch, capsys)
    as_command = answer(["xcon", name, "--help"], "xcon.__main__", monkeypatch, capsys)
    assert re.match(rf"usage: xcon {name}\b", by_module)
    assert as_command == by_module


def test_the_command_lists_its_entries(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    text = answer(["xcon", "--help"], "xcon.__main__", monkeypatch, capsys)
    assert all(name in text for name in ENTRIES)


def test_an_unknown_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["xcon", "pretrian"])
    with pytest.raises(SystemExit) as stop:
        xcon_command.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("xcon: no command 'pretrian': one of pretrain")
