"""The command: verbs, help without torch, errors, exit codes, completion."""

import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys

import pytest

from brainflow.cli.main import SHELLS, VERBS, main
from brainflow.frameworks import framework_names
from brainflow.frameworks.settings import sections

LAZY = """
import sys
from brainflow.cli.main import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "numpy", "zarr", "matplotlib", "triton", "tyro"} & set(sys.modules))
print("HEAVY", *heavy)
sys.exit(code)
"""


def command(*args, env=None, **more):
    return subprocess.run(
        [sys.executable, "-m", "brainflow", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
        **more,
    )


def imported_by(*args):
    done = subprocess.run([sys.executable, "-c", LAZY, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:], done.stdout


def test_help_lists_every_verb_and_imports_nothing_heavy():
    heavy, text = imported_by("--help")
    assert heavy == []
    assert all(verb in text for verb in VERBS)
    assert "Examples:" in text


@pytest.mark.parametrize("verb", ["pretrain", "sweep", "plot"])
def test_help_of_a_verb_needs_no_torch(verb):
    heavy, text = imported_by(verb, "--help")
    assert set(heavy) <= {"tyro"}
    assert f"usage: brainflow {verb}" in text


@pytest.mark.parametrize("framework", [None, *framework_names()])
@pytest.mark.parametrize("verb", ["pretrain", "sweep"])
def test_every_setting_is_in_the_help_with_an_explanation(capsys, verb, framework):
    assert main([verb, *(["--framework", framework] if framework else []), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(lines)
    for section, fields in sections(framework or "csm").items():
        for field in dataclasses.fields(fields):
            flag = f"--{section}.{field.name.replace('_', '-')}"
            assert f"{flag} " in text or f"{flag}," in text, flag
            # The docstring under the field in the source, which tyro shows.
            source = "".join(inspect.getsource(one) for one in fields.__mro__[:-1])
            assert re.search(rf'\n    {field.name}: [^\n]*\n    """\S', source), f"{flag} is not explained"
    assert "Peak learning rate of AdamW" in text
    assert ("--model.masking" in text) == (framework in (None, "csm"))
    assert ("--model.mask-fill" in text) == (framework == "seq-bert")


def test_no_argument_says_what_to_do_next(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    named = re.findall(r"^  brainflow (\S+)", out, re.MULTILINE)
    assert named[0] == "demo"
    assert set(named) <= set(VERBS)
    assert max(map(len, out.splitlines())) <= 80
    assert main(["--help"]) == 0
    assert "Verbs:" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", [True, False])
def test_no_color_is_obeyed_in_a_terminal(wanted):
    ours, theirs = os.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "PYTHON_TYRO_ANSI_CODES")}
    environment |= {"TERM": "xterm-256color"} | ({} if wanted else {"NO_COLOR": "1"})
    code = "import sys; from brainflow.cli.main import main; sys.exit(main(['split', '--help']))"
    done = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # how a terminal says that nobody writes any more
        pass
    os.close(ours)
    assert done.wait() == 0
    assert b"STORE" in shown
    assert (b"\x1b[" in shown) is wanted


def test_version():
    done = command("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("brainflow ")


@pytest.mark.parametrize(
    ("typed", "hint"), [("pretrian", "'pretrain'"), ("xyzzy", "--help"), ("--colour", "option")]
)
def test_an_unknown_verb_names_the_nearest(capsys, typed, hint):
    assert main([typed]) == 2
    error = capsys.readouterr().err
    assert typed in error
    assert hint in error
    assert "Traceback" not in error


def test_a_wrong_flag_is_a_usage_error(capsys):
    assert main(["pretrain", "store", "--out", "run", "--model.widht", "3"]) == 2
    assert "--model.width" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "word", "usage"),
    [
        ("split a b", "b", "brainflow split STORE --test SHARE|COUNT|sub-NAME …|FILE.json --out FILE"),
        ("info a b", "b", "brainflow info STORE"),
        ("demo here", "here", "brainflow demo"),
        ("verify a --json b", "b", "brainflow verify STORE"),
        ("pretrain a b --train.steps 10", "b", "brainflow pretrain [STORE] --out RUN"),
        ("adapt a b", "b", "brainflow adapt STORE --from CKPT --target COLUMN --out DIR"),
        ("ingest arrays runs.toml store", "store", "brainflow ingest arrays CONFIG.toml --store STORE"),
        ("ingest store a b 'c d'", "'c d'", "brainflow ingest store SRC STORE"),
        ("bench gpu all", "all", "brainflow bench [SUITE]"),
    ],
)
def test_a_word_too_many_is_named_with_what_is_expected(capsys, typed, word, usage):
    assert main(shlex.split(typed)) == 2
    error = capsys.readouterr().err
    assert f"unexpected {word}; expected `{usage}`" in error
    assert len(error.splitlines()) == 1


def test_words_where_any_number_of_them_is_taken_are_none_too_many(capsys):
    assert main(["plot", "a", "b", "c"]) == 1
    assert "a holds no metrics.jsonl" in capsys.readouterr().err
    assert main(["ingest", "a", "b"]) == 2
    assert "tar, arrays" in capsys.readouterr().err


def test_an_impossible_combination_is_a_usage_error(capsys):
    assert main(["pretrain", "store", "--out", "run", "--model.width", "100"]) == 2
    assert "not divisible by" in capsys.readouterr().err


def test_a_users_error_is_one_line_and_exit_code_1(tmp_path):
    done = command("plot", tmp_path / "absent")
    assert done.returncode == 1
    assert done.stderr.startswith("brainflow plot: error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("args", "env"), [(["-v"], {}), ([], {"BRAINFLOW_DEBUG": "1"})])
def test_verbose_shows_the_traceback(tmp_path, args, env):
    done = command("plot", tmp_path / "absent", *args, env=env)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "brainflow plot: error: " in done.stderr.splitlines()[-1]


FAULTS = """
import sys, types
from dataclasses import dataclass
from brainflow.cli import main as cli

@dataclass
class Args:
    pass

def run(args):
    raise {error}

module = types.ModuleType("faulty")
module.Args, module.run = Args, run
sys.modules["faulty"] = module
cli.VERBS["faulty"] = ("faulty", "")
sys.exit(cli.main(["faulty"]))
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("KeyboardInterrupt", 130, "interrupted"),
        ("ValueError('x: got 1,\\n expected 2')", 1, "x: got 1, expected 2"),
        ("ValueError('\\x1b[2J')", 1, r"\x1b[2J"),
        ("FileNotFoundError(2, 'No such file or directory', 'x')", 1, "x: No such file or directory; check"),
        (
            "OSError(28, 'No space left on device', '/proc/x')",
            1,
            "/proc/x: the disk is full (0.0 MiB free); free",
        ),
        ("OSError('the checkpoint could not be written')", 1, "the checkpoint could not be written"),
        ("MemoryError()", 1, "out of memory"),
        ("RecursionError()", 1, "nested too deeply"),
        ("ZeroDivisionError('ours')", 1, "ZeroDivisionError: ours. This is a fault of brainflow"),
    ],
)
def test_exit_codes(error, code, said):
    command = [sys.executable, "-c", FAULTS.format(error=error)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("brainflow faulty: ")
    assert said in line


def test_a_fault_of_ours_has_a_traceback_for_those_who_ask():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(error="ZeroDivisionError('ours')")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "BRAINFLOW_DEBUG": "1"},
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: ours" in done.stderr.splitlines()[-1]


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -c '{PIPE}' | head -1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""


RICH = FAULTS.replace("raise {error}", "import rich; rich.get_console().print('line\\n' * 100_000)")


@pytest.mark.parametrize("arguments", [["-c", RICH], ["-m", "brainflow", "--help"]])
def test_a_reader_that_never_came_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


PIPE = FAULTS.replace("raise {error}", 'print("line\\n" * 100_000)')


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_verbs_and_flags(shell, capsys):
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert "import-checkpoint" in script
    assert "--model.width" in script


def test_completion_for_an_unknown_shell(capsys):
    assert main(["--print-completion", "cmd"]) == 2
    assert "bash" in capsys.readouterr().err
