"""The guard, progress, tables, previews: exit codes and texts, through small programs that import console alone."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys

import numpy as np
import pytest

from gencli import console

PYTHON = [sys.executable, "-c"]


def environment(**extra):
    plain = {
        k: v for k, v in os.environ.items() if not k.startswith(("GENCLI_", "NO_COLOR", "FORCE_COLOR", "COLORTERM"))
    }
    return {**plain, "TERM": "xterm-256color", **extra}


def source(body):
    """The program whose app is ``body``."""
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    return f"import sys\nfrom gencli import console\ndef app():\n{lines}sys.exit(console.run(app))\n"


def program(body, *argv, stdin=subprocess.DEVNULL, **extra):
    """Run ``body`` as a program's app; (exit code, stdout, stderr)."""
    code = source(body)
    done = subprocess.run(
        [*PYTHON, code, *argv], stdin=stdin, capture_output=True, text=True, env=environment(**extra), check=False
    )
    return done.returncode, done.stdout, done.stderr


def on_terminal(body, columns=80, **extra):
    """Run ``body`` with stdout and stderr on terminals of their own; (exit code, stdout, stderr)."""
    code = source(body)
    (out, out_end), (err, err_end) = pty.openpty(), pty.openpty()
    process = subprocess.Popen(
        [*PYTHON, code],
        stdin=subprocess.DEVNULL,
        stdout=out_end,
        stderr=err_end,
        env=environment(COLUMNS=str(columns), **extra),
    )
    os.close(out_end), os.close(err_end)
    texts = {out: b"", err: b""}
    left = {out, err}
    while left:
        for fd in select.select(list(left), [], [])[0]:
            try:
                part = os.read(fd, 65536)
            except OSError:  # the other end is closed
                part = b""
            texts[fd] += part
            if not part:
                left.discard(fd)
    os.close(out), os.close(err)
    return process.wait(), texts[out].decode(), texts[err].decode()


# ------------------------------------------------------------------------------------------------ the guard


def test_import_is_cheap():
    body = "loaded = {'torch', 'numpy', 'rich', 'typer', 'pydantic'} & set(sys.modules)\nprint(sorted(loaded))"
    assert program(body) == (0, "[]\n", "")


@pytest.mark.parametrize(("name", "code"), [("GencliError", 1), ("UsageError", 2), ("DataError", 3), ("Diverged", 4)])
def test_errors_of_ours(name, code):
    body = f"raise console.{name}('no such thing: x', hint='try y')"
    assert program(body) == (code, "", "error: no such thing: x\n  try y\n")
    assert program(f"raise console.{name}('just this')")[2] == "error: just this\n"


@pytest.mark.parametrize(
    ("statement", "code", "text"),
    [
        ("pass", 0, ""),
        ("return 7", 0, ""),
        ("sys.exit(5)", 5, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('bad')", 1, "bad\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise OSError(28, 'No space left on device', 'out/x.npz')", 1, "error: out/x.npz: the disk is full\n"),
        ("raise OSError(28, 'No space left on device')", 1, "error: the disk is full\n"),
        ("raise OSError(27, 'File too large', 'x')", 1, "error: x: the file is too big\n"),
        ("raise OSError(122, 'Disk quota exceeded', 'x')", 1, "error: x: the disk quota is used up\n"),
        ("open('/nowhere/x')", 1, "error: /nowhere/x: No such file or directory\n  --debug shows the traceback\n"),
        ("1 / 0", 1, "error: ZeroDivisionError: division by zero\n  --debug shows the traceback\n"),
        ("raise ValueError('a\\n  b')", 1, "error: ValueError: a b\n  --debug shows the traceback\n"),
        ("raise ValueError", 1, "error: ValueError\n  --debug shows the traceback\n"),
        ("raise console.DataError('name \\x1b[31m')", 3, "error: name \\x1b[31m\n"),
    ],
)
def test_exits(statement, code, text):
    assert program(statement) == (code, "", text)


@pytest.mark.parametrize(
    "statement",
    [
        "raise MemoryError",
        "raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory. Tried to allocate 2.00 GiB')",
        "raise RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory')",
    ],
)
def test_out_of_memory_gives_advice(statement):
    code, out, err = program(statement)
    assert (code, out) == (1, "")
    assert err.startswith("error: out of memory (") and "--batch-size" in err and "train.accumulate" in err
    assert err.count("\n") == 2


def test_debug_shows_the_traceback_and_leaves_argv():
    plain = "print(sys.argv[1:])\nraise console.DataError('bad')"
    assert program(plain, "a", "--debug", "b", "--", "--debug")[1] == "['a', 'b', '--', '--debug']\n"
    for arguments, extra in ((["--debug"], {}), ([], {"GENCLI_DEBUG": "1"})):
        code, _, err = program(plain, *arguments, **extra)
        assert code == 3 and err.startswith("Traceback") and err.endswith("error: bad\n")
    assert "Traceback" not in program(plain, "--", "--debug")[2]
    assert "Traceback" not in program(plain, GENCLI_DEBUG="0")[2]


def test_argv_is_given_to_the_app(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gencli"])
    seen = []
    assert console.run(lambda: seen.extend(sys.argv), ["x", "--debug"]) == 0
    assert seen == ["gencli", "x"]


PIPES = {
    "print": "for i in range(100000):\n    print(i)",
    "at exit": "import time\ntime.sleep(0.3)\nprint(1)",
    "binary": "for i in range(1000):\n    console.stdout_binary().write(bytes(10000))",
    "typer": "import typer\na = typer.Typer(pretty_exceptions_enable=False)\n@a.command()\n"
    "def x():\n    for i in range(100000): print(i)\na()",
}


@pytest.mark.parametrize("name", PIPES)
def test_broken_pipe_is_silent(name):
    code = source(PIPES[name])
    process = subprocess.Popen([*PYTHON, code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    if name != "at exit":
        process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (141, b"")


def test_broken_pipe_elsewhere_is_an_error():
    code, out, err = program("raise BrokenPipeError(32, 'Broken pipe')")
    assert (code, out) == (1, "") and err.startswith("error: Broken pipe\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("body", ["print(1)", "for i in range(100000): print(i)"])
def test_full_disk_on_stdout(body):
    code = source(body)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PYTHON, code], stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False
        )
    assert done.returncode == 1
    assert re.fullmatch(r"error: (standard output: )?the disk is full\n", done.stderr)


def test_interrupt_by_signal():
    code = source("import time\nprint('on', flush=True)\ntime.sleep(20)")
    process = subprocess.Popen(
        [*PYTHON, code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (background jobs ignore it)
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, b"", b"")


TYPER = """import typer
a = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
@a.command()
def train(steps: int = 1): print('trained', steps)
@a.command()
def stop(): raise typer.Exit(4)
@a.command()
def bad(): raise console.DataError('no data')
@a.command()
def ctrl(): raise KeyboardInterrupt
a()"""


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["train", "--steps", "3"], 0, "trained 3\n", ""),
        (["stop"], 4, "", ""),
        (["bad"], 3, "", "error: no data\n"),
        (["ctrl"], 130, "", ""),
        (["--debug", "train"], 0, "trained 1\n", ""),
        (["trian"], 2, "", "No such command 'trian'"),
        (["train", "--steps", "x"], 2, "", "--steps"),
        (["--help"], 0, "Usage", ""),
    ],
)
def test_typer_through_the_guard(argv, code, out, err):
    got = program(TYPER, *argv)
    assert got[0] == code
    assert got[1] == out if code or not out.startswith("Usage") else out in got[1]
    assert err in got[2] and (err or not got[2]) and "Traceback" not in got[2]


def test_say_survives_a_closed_stderr():
    code = "from gencli import console\nconsole.say('talk')\nprint('data')"
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "{code}" 2>&-', sys.executable], capture_output=True, env=environment(), check=False
    )
    assert (done.returncode, done.stdout) == (0, b"data\n")


# ------------------------------------------------------------------------------------------------ progress

LOOP = """import time
now = [0.0]
time.monotonic = lambda: now[0]
with console.Progress({total}, 'train', unit='step', start={start}) as p:
    for i in range({n}):
        now[0] += {dt}
        p.update({start} + i + 1, loss=1 / (i + 1))
"""


def test_progress_lines():
    _, out, err = program(LOOP.format(total=20, start=8, n=12, dt=1.0))
    assert out == ""
    assert err.split("\n") == [
        "train: 13/20 (65%) steps  1.000 steps/s  0:07 left  loss 0.2000",
        "train: 18/20 (90%) steps  1.000 steps/s  0:02 left  loss 0.1000",
        "train: 20/20 (100%) steps  1.000 steps/s  0:12 in all  loss 0.08333",
        "",
    ]


def test_progress_of_slow_and_endless_loops():
    assert program(LOOP.format(total="None", start=0, n=1, dt=4000.0))[2].split("\n")[0] == (
        "train: 1 steps  4000. s/step  1:06:40 in all  loss 1.000".replace("4000.", "4000")
    )


def test_progress_is_quiet_when_asked():
    assert program(LOOP.format(total=20, start=0, n=12, dt=1.0), GENCLI_QUIET="1") == (0, "", "")


def test_progress_does_not_hide_errors():
    code, _, err = program("with console.Progress(3, 'x') as p:\n    p.update(1)\n    raise console.DataError('bad')")
    assert code == 3 and err.split("\n")[0].startswith("x: 1/3 (33%)") and err.endswith("error: bad\n")


BAR = """with console.Progress(3, 'outer [x]') as p:
    p.update(1, loss=0.5)
    with console.Progress(10, 'inner') as q:
        q.update(10)
    console.say('said')
    print('data')
    p.update(3, loss=0.25)
"""


def test_progress_bar_on_a_terminal():
    code, out, err = on_terminal(BAR, columns=100)
    assert (code, out) == (0, "data\r\n")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert "outer [x]" in text and "3/3" in text and "inner" in text and "said\r\n" in text and "loss 0.2500" in text
    assert "\x1b[3" in err  # colours
    bare = on_terminal(BAR, columns=100, NO_COLOR="1")[2]
    assert not re.search(r"\x1b\[[0-9;]*[34]\d[;m]", bare)
    assert "\x1b[" not in on_terminal(BAR, TERM="dumb")[2]


def test_progress_reads_metrics_only_to_show_them():
    class Costly:
        reads = 0

        def tolist(self):
            Costly.reads += 1
            return 1.0

    with console.Progress(1000, "x") as p:
        for i in range(1000):
            p.update(i + 1, loss=Costly())
    assert Costly.reads == 1


# ------------------------------------------------------------------------------------------------ tables

ROWS = [
    {"model": "pixelcnn", "bits": 1.23456789, "n": 12345, "ok": True, "note": None},
    {"model": "maf", "bits": float("nan"), "n": 7, "ok": False, "extra": [1, 2.5]},
]


def test_table_in_a_pipe_is_json_lines(capsys):
    console.table([*ROWS, {"a": np.float64("inf"), "b": np.int64(3), "c": np.arange(2), "d": {"é": (1.5, -np.inf)}}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '{"model": "pixelcnn", "bits": 1.23456789, "n": 12345, "ok": true, "note": null}'
    assert lines[1] == '{"model": "maf", "bits": null, "n": 7, "ok": false, "extra": [1, 2.5]}'
    assert lines[2] == '{"a": null, "b": 3, "c": [0, 1], "d": {"é": [1.5, null]}}'
    assert [json.loads(line)["n"] for line in lines[:2]] == [12345, 7]


def test_table_on_a_terminal():
    body = f"nan = float('nan')\nrows = {ROWS!r}\nconsole.table(rows, title='Results')"
    assert on_terminal(body, NO_COLOR="1")[1].split("\r\n") == [
        "Results",
        "model      bits      n  ok   note  extra",
        "pixelcnn  1.235  12345  yes     -  -",
        "maf         nan      7  no      -  1, 2.500",
        "",
    ]
    assert "\x1b[1mmodel" in on_terminal(body)[1]
    assert on_terminal(body.replace("title='Results'", "json=True"))[1].startswith('{"model": "pixelcnn", "bits": 1.23')


def test_one_wide_row_stands_upright():
    body = "console.table([{'metric': 'fid', 'protocol': 'p' * 60, 'value': 12.5}])"
    assert on_terminal(body, columns=60, NO_COLOR="1")[1].split("\r\n") == [
        "metric    fid",
        "protocol  " + "p" * 60,
        "value     12.50",
        "",
    ]


def test_empty_table(capsys):
    console.table([])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (1234.4, "1234"),
        (12345.6, "12346"),
        (99.999, "100.0"),
        (-0.00012345, "-0.0001234"),
        (1.5e-7, "1.500e-07"),
        (2e12, "2.000e+12"),
        (float("inf"), "inf"),
        (10**9, "1000000000"),
        ("a\x1b[31m\nb", "a\\x1b[31m b"),
    ],
)
def test_cells(value, text):
    assert console._cell(value) == text


# ------------------------------------------------------------------------------------------------ pictures and pipes

PICTURE = """import numpy as np
a = np.zeros((3, 4), np.uint8)
a[0, 0], a[1, 0], a[2, 3] = 255, 100, 9
console.preview({})"""


def test_preview_paints_two_pixels_a_cell():
    _, out, err = on_terminal(PICTURE.format("a"), COLORTERM="truecolor")
    rows = err.split("\r\n")
    black = "\x1b[38;2;0;0;0;48;2;0;0;0m▀"
    assert out == "" and len(rows) == 3
    assert rows[0] == "\x1b[38;2;255;255;255;48;2;100;100;100m▀" + black * 3 + "\x1b[0m"
    assert rows[1] == black * 3 + "\x1b[38;2;9;9;9;48;2;9;9;9m▀\x1b[0m"  # an odd last row is repeated


def test_preview_shrinks_and_shows_colour():
    body = "import numpy as np\na = np.zeros((2, 40, 3), np.uint8)\na[:, ::2, 0] = 200\nconsole.preview(a)"
    _, _, err = on_terminal(body, columns=20, COLORTERM="truecolor")
    assert err == "\x1b[38;2;100;0;0;48;2;100;0;0m▀" * 20 + "\x1b[0m\r\n"


def test_preview_with_256_colours():
    err = on_terminal(PICTURE.format("a"))[2]
    assert err.startswith("\x1b[38;5;231;48;5;241m▀\x1b[38;5;16;48;5;16m▀")
    for rgb, number in [
        ((255, 0, 0), 196),
        ((0, 0, 255), 21),
        ((95, 135, 175), 67),
        ((8, 8, 8), 232),
        ((238,) * 3, 255),
    ]:
        assert console._palette(*rgb) == f"5;{number}"


def test_preview_is_silent_elsewhere():
    assert program(PICTURE.format("a")) == (0, "", "")
    for extra in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"GENCLI_QUIET": "1"}):
        assert on_terminal(PICTURE.format("a"), **extra) == (0, "", "")


def test_binary_stdout():
    assert program("console.stdout_binary().write(b'x')")[:2] == (0, "x")
    code, out, err = on_terminal("console.stdout_binary()")
    assert (code, out) == (2, "") and err.startswith("error: samples go to standard output, but that is a terminal")


def test_binary_stdin():
    body = "print(console.stdin_binary().read())"
    assert program(body)[:2] == (0, "b''\n")
    end, terminal = pty.openpty()
    code, out, err = program(body, stdin=terminal)
    os.close(end), os.close(terminal)
    assert (code, out) == (2, "") and err.startswith(
        "error: samples come from standard input, but that is a terminal\n"
    )
    code, out, err = program("sys.stdin = None\n" + body)
    assert (code, out) == (2, "") and err.startswith("error: samples come from standard input, but it is closed\n")
