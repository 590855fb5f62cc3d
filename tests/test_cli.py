"""The command line and the demo."""

from __future__ import annotations

import importlib.util

import pytest

from incoherence_monitor import History, __version__
from incoherence_monitor.cli import main


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"incoherence-monitor {__version__}\n"


@pytest.mark.parametrize("words", [[], ["dance"], ["demo", "--fast"]])
def test_wrong_usage_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_demo_does_not_write_into_a_folder_with_something_in_it(tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("package", ["transformers", "tensorboard", "matplotlib"])
def test_the_demo_names_a_missing_package(package, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest)
    )
    assert main(["demo", "-o", str(tmp_path / "demo")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'incoherence-monitor[" in error
    assert len(error.strip().splitlines()) == 1


def test_the_demo(tmp_path, capsys):
    for package in ("transformers", "accelerate", "tensorboard", "matplotlib"):
        pytest.importorskip(package)
    folder = tmp_path / "demo"
    assert main(["demo", "-o", str(folder)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "The healthy half raised no alert",
        "picture:",
        "history:",
        f"tensorboard --logdir {folder / 'tensorboard'}",
    ):
        assert words in printed
    alerts = History.open(folder).alerts
    assert 120 <= alerts[0].step <= 140
    assert (alerts[0].layer_index, alerts[0].kind, alerts[0].head) == (2, "key", 1)
    assert alerts[0].layer == "model.layers.2.self_attn"
    assert (folder / "incoherence" / "heads_map.png").is_file()
    assert list((folder / "tensorboard").glob("events*"))
