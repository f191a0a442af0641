"""The projection of ``gencli doctor scale``: its formulas by hand, its bytes by counting, its rows by its formulas."""

from __future__ import annotations

import json
import math
import sys
from functools import partial

import pytest

from gencli import cli, console, processes
from gencli.console import UsageError
from gencli.training import scaling
from gencli.training.scaling import Fit, Link, Message
from tests.benchmarks.scaling import contention
from tests.contract_cases import CASES
from tests.test_trainer import start
from tests.tiny import session, tiny, words

LINK = Link(bandwidth=1e9, latency=1e-3)


# --- the model of time


def test_an_all_reduce_takes_what_its_steps_and_its_bytes_take():
    seconds = {1: 0, 2: 2e-3 + 3, 3: 4e-3 + 4, 4: 4e-3 + 4.5, 512: 18e-3 + 6 * 511 / 512}
    for world, expected in seconds.items():
        assert scaling.all_reduce(3e9, world, LINK) == pytest.approx(expected, rel=1e-12)


def test_the_figure_of_158_million_weights():
    """632 MB at 400 Gb/s: 1.26 GB through every link, 25 ms."""
    link = Link(scaling.bandwidth("400Gb/s"), 0.0)
    assert scaling.all_reduce(4 * 158e6, 512, link) == pytest.approx(25.2e-3, rel=2e-3)


def test_communication_is_the_sum_over_messages():
    messages = [Message(10**9, 5), Message(2 * 10**9, 0.5)]
    assert scaling.communication(messages, 2, LINK) == pytest.approx(5 * (2e-3 + 1) + 0.5 * (2e-3 + 2), rel=1e-12)
    assert scaling.communication(messages, 1, LINK) == 0


def test_the_fit_recovers_what_times_were_made_of():
    for fixed, row in ((4e-3, 1e-4), (0.0, 2e-3), (5e-2, 0.0)):
        for rows in ([32, 16], [64, 8, 1]):
            found = scaling.fit(rows, [fixed + row * b for b in rows])
            assert found == pytest.approx((fixed, row), rel=1e-9, abs=1e-12)
            assert found.seconds(7) == pytest.approx(fixed + 7 * row, rel=1e-9)


def test_the_fit_is_by_relative_squares_and_never_negative():
    rows, seconds = [1, 10, 100], [1.0, 3.0, 20.0]

    def cost(a: float, c: float) -> float:
        return sum(((a + c * b) / t - 1) ** 2 for b, t in zip(rows, seconds))

    a, c = scaling.fit(rows, seconds)
    assert all(cost(a, c) < cost(a + da, c + dc) for da in (-1e-3, 0, 1e-3) for dc in (-1e-4, 0, 1e-4) if da or dc)
    assert scaling.fit([1, 2], [1.0, 3.0]) == pytest.approx((0, (1 + 2 / 3) / (1 + 4 / 9)))
    assert scaling.fit([1, 2], [3.0, 1.0]) == pytest.approx(((1 / 3 + 1) / (1 / 9 + 1), 0))
    assert scaling.fit([8, 8], [2.0, 4.0]) == (3.0, 0.0)


def test_rows_of_strong_and_weak_scaling():
    compute, messages = Fit(0.1, 0.01), [Message(10**8, 1)]
    project = partial(scaling.project, compute, messages, LINK, batch=40)
    one, four = project(worlds=[1, 4], weak=False)
    assert (one["step_ms"], one["speedup"], one["efficiency"]) == pytest.approx((500, 1, 1))
    assert one["examples_per_s"] == pytest.approx(80)
    assert (four["rows_each"], four["batch"]) == (10, 40)
    assert four["compute_ms"] == pytest.approx(200) and four["communication_ms"] == pytest.approx(4 + 150)
    assert four["step_ms"] == pytest.approx(354) and four["examples_per_s"] == pytest.approx(40 / 0.354)
    assert four["speedup"] == pytest.approx(500 / 354) and four["efficiency"] == pytest.approx(500 / 354 / 4)
    (four,) = project(worlds=[4], weak=True)
    assert (four["rows_each"], four["batch"], four["compute_ms"]) == (40, 160, pytest.approx(500))
    assert four["speedup"] == pytest.approx(4 * 500 / 654) and four["efficiency"] == pytest.approx(500 / 654)


def test_processes_take_turns_where_cores_are_few():
    assert [contention(world, 1, 2) for world in (1, 2, 4)] == [1, 1, 2]
    assert contention(4, 2, 2) == 4 and contention(1, 1, 64) == 1


# --- what a person writes


def test_bits_and_bytes_are_told_apart():
    assert scaling.bandwidth("400Gb/s") == 50e9 == scaling.bandwidth("50GB/s")
    assert scaling.bandwidth("500 Mb/s") == 62.5e6 == scaling.bandwidth("62.5MB/s")
    assert [scaling.latency(t) for t in ("2s", "3ms", "10us", "1.5ns", "0us")] == pytest.approx(
        [2, 3e-3, 1e-5, 1.5e-9, 0]
    )


BAD = [
    "400",
    "400Gbps",
    "400gb/s",
    "Gb/s",
    "-4Gb/s",
    "0Gb/s",
    "nanGB/s",
    "infGB/s",
    "1e3GB/s",
    "",
    "4Gb/s 5Gb/s",
    "٤Gb/s",
]


@pytest.mark.parametrize("text", [*BAD, "9" * 400 + "GB/s", "400Gb/s\n\nx"])
def test_other_bandwidths_are_refused_in_one_line(text):
    with pytest.raises(UsageError, match=r"^--bandwidth '.{0,45}': a number and Gb/s, GB/s, Mb/s, MB/s") as caught:
        scaling.bandwidth(text)
    assert "\n" not in str(caught.value)


def test_other_latencies_are_refused():
    with pytest.raises(UsageError, match=r"^--latency '10': a number and s, ms, us, ns, such as 10us"):
        scaling.latency("10")


# --- what is counted and measured


def sent(name: str, world: int, *more: str) -> list[Message]:
    with session(tiny(name, *more)) as made:
        made.trainer.step()
        with processes.rehearsal(world) as listed:
            made.trainer.step()
    return scaling.messages(listed)


def size(name: str, part: str = "", *overrides: str) -> int:
    with session(tiny(name, *overrides)) as made:
        return sum(p.numel() for n, p in made.model.named_parameters() if n.startswith(part))


def test_bytes_of_one_phase():
    """Gradients of every parameter in float32, then loss and bits/dim in float64."""
    for world in (2, 4):
        assert sent("pixelcnn", world) == [Message(4 * size("pixelcnn"), 1), Message(2 * 8, 1)]
    twice = sent("pixelcnn", 2, "train.precision=float64", "train.accumulate=2")
    assert twice == [Message(8 * size("pixelcnn"), 1), Message(2 * 8, 1)]


def test_bytes_of_a_game():
    """Two moves of the critic (loss, its two outputs, penalty), then one of the generator (loss)."""
    plain = "model.norm_G=none"  # statistics of a batch are sent too
    critic, generator = 4 * size("wgan-gp", "D.", plain), 4 * size("wgan-gp", "G.", plain)
    assert [m.size for m in sent("wgan-gp", 2, plain)] == [critic, 32, critic, 32, generator, 8]
    assert critic != generator


def test_bytes_that_a_loss_gathers():
    """Free bits gather each example's KL, 8 rows of 2 float32 in all, and sum what flows back."""
    plain, bits = sent("vae", 2), sent("vae", 2, "model.free_bits=0.5")
    assert bits == [Message(8 * 2 * 4, 0.5), Message(8 * 2 * 4, 1), *plain]


def test_one_process_sends_nothing_and_nothing_is_left_behind():
    assert sent("vae", 1) == []
    with pytest.raises(ZeroDivisionError), processes.rehearsal(2):
        assert processes.world() == 2
        raise ZeroDivisionError
    assert processes.world() == 1


def test_lazy_phases_count_as_often_as_they_come():
    name = next(name for name, case in CASES.items() if any(callable(p.repeat) for p in start(case).model.phases()))
    trainer = start(CASES[name])
    steps = trainer.train.steps
    shares = scaling.rehearse(start(CASES[name]), [1, 2], seconds=0, least=1)
    assert shares[0].messages == [] and all(share.seconds > 0 for share in shares)
    with processes.rehearsal(2) as listed:
        for trainer.number in range(1, steps):
            if trainer.number == 1:
                trainer.step()
                listed.clear()
                trainer.number = 1
            trainer.step()
    expected = sum(m.size * m.times for m in scaling.messages(listed)) / (steps - 1)
    assert sum(m.size * m.times for m in shares[1].messages) == pytest.approx(expected)


def test_memory_of_what_every_process_holds():
    plain = "model.norm_G=none"  # running averages are state too
    with session(tiny("wgan-gp", "train.ema=0.9", plain)) as made:
        made.trainer.step()
        found = scaling.memory(made.trainer)
    critic, generator = size("wgan-gp", "D.", plain), size("wgan-gp", "G.", plain)
    assert found["weights"] == 4 * (critic + generator) and found["gradients"] == 4 * max(critic, generator)
    assert found["averages"] == 4 * generator
    moments = 2 * 4 * (critic + generator)
    assert moments <= found["optimiser"] <= moments + 4 * 100  # and a counter for each tensor


def test_calibration_measures_the_ends_and_the_middle():
    with session(tiny("vae", "train.batch_size=32")) as made:
        found = scaling.calibrate(made.trainer, [1, 2, 4, 8, 16, 32, 64, 100])
    assert found.strong == [1, 2, 4, 8, 16, 32]
    assert [share.rows for share in found.shares] == [32, 4, 1]
    assert found.messages[0].size == 4 * size("vae")
    with session(tiny("vae", "train.batch_size=9")) as made:
        found = scaling.calibrate(made.trainer, [1, 2, 4])
    assert found.strong == [1] and [share.world for share in found.shares] == [1, 3]
    with session(tiny("vae", "train.batch_size=1")) as made, pytest.raises(UsageError, match=r"train\.batch_size=1 "):
        scaling.calibrate(made.trainer, [1, 2])


# --- the command line


@pytest.fixture
def gencli(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "rehearse", partial(scaling.rehearse, seconds=0, least=2))

    def call(*given: str) -> tuple[int, str, str]:
        argv = sys.argv
        try:
            code = console.run(cli.app, list(given))
        finally:
            sys.argv = argv
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize("before", [[], ["--json"]])
def test_rows_of_the_command_line_follow_the_formula(gencli, before):
    plain = "model.norm_G=none"
    line = ["doctor", *before, "scale", "wgan-gp", *words("wgan-gp"), plain, "--devices", "12", "--bandwidth", "2Gb/s"]
    code, out, err = gencli(*line, "--latency", "50us", *([] if before else ["--json"]))
    rows = [json.loads(text) for text in out.splitlines()]
    assert code == 0
    assert [r["processes"] for r in rows] == [1, 2, 4, 8, 1, 2, 4, 8, 12]
    assert [r["scaling"] for r in rows] == ["strong"] * 4 + ["weak"] * 5
    total = 4 * (2 * size("wgan-gp", "D.", plain) + size("wgan-gp", "G.", plain)) + 32 + 32 + 8
    alone = rows[0]["examples_per_s"]
    for r in rows:
        p = r["processes"]
        assert r["bytes"] == total and r["messages"] == 6 and r["batch"] == r["rows_each"] * p
        assert r["rows_each"] == (8 // p if r["scaling"] == "strong" else 8)
        milliseconds = 6 * 2 * math.ceil(math.log2(p)) * 0.05 + 2 * (p - 1) / p * total / 250e6 * 1e3
        assert r["communication_ms"] == pytest.approx(milliseconds, rel=1e-9)
        assert r["step_ms"] == pytest.approx(r["compute_ms"] + r["communication_ms"])
        assert r["examples_per_s"] == pytest.approx(r["batch"] / r["step_ms"] * 1e3)
        assert r["speedup"] == pytest.approx(r["examples_per_s"] / alone)
        assert r["efficiency"] == pytest.approx(r["speedup"] / p)
        assert r["basis"].startswith("projection, not a measurement") and "measured steps of 8, " in r["basis"]
    computing = {r["rows_each"]: r["compute_ms"] for r in rows}
    slope = (computing[8] - computing[1]) / 7
    assert slope >= 0 and all(ms == pytest.approx(computing[1] + slope * (b - 1)) for b, ms in computing.items())
    assert err.startswith("projection, not a measurement") and "strong scaling ends at 8" in err


def test_wrong_words_are_refused_before_anything_is_measured(gencli):
    for given, said in [
        (["--devices", "4", "--bandwidth", "400Gbps"], "--bandwidth '400Gbps'"),
        (["--devices", "4", "--bandwidth", "1Gb/s", "--latency", "1"], "--latency '1'"),
        (["--devices", "0", "--bandwidth", "1Gb/s"], "--devices"),
        (["--bandwidth", "1Gb/s"], "--devices"),
        (["--devices", "4", "--bandwidth", "1Gb/s", "model.latnets=3"], "latents"),
    ]:
        code, out, err = gencli("doctor", "scale", "vae", *given)
        assert (code, out) == (2, "") and said in err and "Traceback" not in err
    assert gencli("doctor", "scael")[0] == 2


def test_the_doctor_alone_is_as_before(gencli):
    code, out, _ = gencli("doctor", "--json")
    assert code == 0 and "torch" in [json.loads(line)["check"] for line in out.splitlines()]
