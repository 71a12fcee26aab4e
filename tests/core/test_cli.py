"""The command line: exit codes, one clear message, and nothing heavy imported before need."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pegboard.cli import main
from pegboard.launch_errors import is_speaker, show_error, write_error_file

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "trl", "datasets")

PROBE = """
import json, sys
from pegboard.cli import main
code = main(sys.argv[1:])
sys.stdout.flush()
print("\\nPROBE" + json.dumps([code, sorted(n for n in sys.modules if "." not in n)]))
"""


def _probe(*words: str, code: str = PROBE, **environ: str) -> tuple[int, set[str], str]:
    """Exit code, top-level modules and stdout of one command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={
            **os.environ,
            **environ,
            "PYTHONPATH": f"{ROOT / 'core'}{os.pathsep}{ROOT / 'plugins'}",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    output, _, found = done.stdout.rpartition("PROBE")
    exit_code, modules = json.loads(found)
    return exit_code, set(modules), output


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["plugins", "--no-third-party"], 0),
        (["schema", "--no-third-party"], 0),
        (["check", "BAD", "--no-third-party"], 2),
        (["train", "BAD", "--no-third-party"], 2),
    ],
)
def test_nothing_heavy_is_imported_before_a_config_is_valid(
    words: list[str], code: int, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"model": {"class_name": "NoSuchModel"}}')
    words = [str(bad) if word == "BAD" else word for word in words]
    exit_code, modules, _ = _probe(*words)
    assert exit_code == code
    assert not modules.intersection(HEAVY)


def test_checking_a_valid_config_imports_no_torch() -> None:
    config = ROOT / "configs" / "quickstart.json"
    exit_code, modules, output = _probe("check", str(config))
    assert exit_code == 0
    assert output.startswith(f"ok: {config}: model ")
    assert not modules.intersection(HEAVY)


def test_help_costs_what_argparse_costs() -> None:
    # What the command line itself imports: the package's __init__ (the plugin API) is not run.
    code = (
        "import sys, types; package = types.ModuleType('pegboard');"
        f"package.__path__ = [{str(ROOT / 'core' / 'pegboard')!r}];"
        "sys.modules['pegboard'] = package\n"
    ) + PROBE
    for words in (["train", "--help"], ["check", "--help"]):
        exit_code, modules, output = _probe(*words, code=code)
        assert exit_code == 0
        assert "usage: pegboard" in output
        assert not modules.intersection({*HEAVY, "pydantic", "pluggy", "jsonschema", "loguru"})


def test_the_overview_lists_the_commands_of_plugins_and_imports_nothing_heavy() -> None:
    for words in (["--help"], []):
        exit_code, modules, output = _probe(*words)
        assert exit_code == 0
        assert "usage: pegboard" in output
        assert re.search(r"^ +train +\w", output, flags=re.MULTILINE)
        assert re.search(r"^ +prepare +\w", output, flags=re.MULTILINE)
        assert not modules.intersection({*HEAVY, "jsonschema", "loguru"})


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pegboard ")


def test_plugins_prints_kind_name_plugin_and_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--no-third-party"]) == 0
    [line] = [row for row in capsys.readouterr().out.splitlines() if " ChunkedCrossEntropy " in row]
    kind, name, plugin, summary = line.split(maxsplit=3)
    assert (kind, name, plugin) == ("loss", "ChunkedCrossEntropy", "losses")
    assert summary.startswith("Cross-entropy")


def test_plugins_json_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--json", "--no-third-party"]) == 0
    plugins = json.loads(capsys.readouterr().out)
    [losses] = [plugin for plugin in plugins if plugin["name"] == "losses"]
    assert "ChunkedCrossEntropy" in [part["class_name"] for part in losses["parts"]]


def test_a_reader_that_stops_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "core" / "run.py"), "plugins", "--no-third-party"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_blocking_takes_the_parts_of_a_built_in_away(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--no-third-party", "--block", "losses"]) == 0
    output = capsys.readouterr().out
    assert "ChunkedCrossEntropy" not in output
    assert "blocked: losses (built-in)" in output


def test_a_broken_plugin_is_a_warning_and_not_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "peg_cli_broken.py"
    file.write_text("import no_such_module_x")
    assert main(["plugins", "--no-third-party", "--plugin", str(file)]) == 0
    captured = capsys.readouterr()
    assert "warning: plugin 'peg_cli_broken'" in captured.err
    assert "broken: peg_cli_broken" in captured.out


@pytest.mark.parametrize("words", [["check"], ["train"], []])
def test_a_config_that_is_not_there_is_one_message_and_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "no/such.json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = [row for row in captured.err.splitlines() if not row.startswith("warning:")]
    assert line.startswith("no/such.json: no such file")


def test_a_config_alone_means_train_also_after_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--set", "seed=1", "no/such.json"]) == 2
    assert "no/such.json: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["chekc", "x.json"], ["check"], ["check", "x.json", "--sett"]])
def test_a_wrong_command_line_is_code_2_with_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert "usage: pegboard" in capsys.readouterr().err


def test_every_problem_of_a_config_is_printed_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"model": {"class_name": "Qwen"}, "loss": {"class_name": "CrossEntrpy"}}')
    assert main(["check", str(bad), "--no-third-party"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean 'CrossEntropy'?" in error
    assert f"{bad}:1:" in error
    assert "Traceback" not in error


def test_an_override_reaches_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "quickstart.json")
    assert main(["check", config, "--set", "optimizer.lr=fast"]) == 2
    assert "--set optimizer.lr=fast" in capsys.readouterr().err


def test_the_schema_is_json_and_names_the_installed_parts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["schema", "--no-third-party"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["type"] == "object"
    assert '"ChunkedCrossEntropy"' in text


def test_an_interrupt_is_code_130(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "peg_cli_interrupt.py"
    file.write_text("raise KeyboardInterrupt")
    assert main(["plugins", "--no-third-party", "--plugin", str(file)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_run_py_is_train_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "core" / "run.py"), "missing.json"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "missing.json: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_goes_to_the_file_that_torchrun_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["check", "missing.json", "--no-third-party"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    message = json.loads(path.read_text())["message"]
    assert message["message"] == line
    assert int(message["extraInfo"]["timestamp"]) > 0


def test_another_local_rank_waits_before_it_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not is_speaker()
    start = time.monotonic()
    show_error("error: x", wait_s=0.2)
    assert time.monotonic() - start >= 0.2
    assert capsys.readouterr().err == "[local rank 1] error: x\n"


def test_without_torchrun_no_error_file_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    write_error_file("x")


@pytest.mark.slow
def test_under_torchrun_two_ranks_print_one_error_and_it_is_the_root_cause(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
            ),
            *(str(ROOT / "core" / "run.py"), "missing.json"),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith("missing.json")]) == 1
    assert "[local rank 1]" not in done.stderr
    assert "missing.json" in done.stderr.partition("Root Cause")[2]
