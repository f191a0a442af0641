"""Runs of GANs: they go on exactly, their averages have batch-norm statistics of their own, they warn."""

import json

import pytest
import torch

from gencli.nn.norm import BatchNorm
from gencli.rng import Keys
from gencli.run import Run
from gencli.streams import Samples
from gencli.training.worries import Worries, spread
from tests.contract_cases import points
from tests.test_gans import build
from tests.tiny import session, tiny


def test_batch_norm_of_averaged_weights_is_measured_with_these_weights():
    with session(tiny("dcgan", "train.ema=0.5", "train.batch_size=32", "train.lr=0.05")) as made:
        for _ in range(4):
            made.trainer.step()
        raw = {k: v.clone() for k, v in made.model.state_dict().items()}
        with made.trainer.evaluating() as model:
            norm = next(m for m in model.modules() if isinstance(m, BatchNorm))
            want = []
            for k in range(20):  # the layer's input is linear in z: its plain mean and variance
                rng = Keys(made.recipe.seed).open("settle", k)
                rng.n = 32
                want.append(model.G[:2](model._z(rng, 32)).detach())
            mean = torch.stack([x.mean((0, 2, 3)) for x in want]).mean(0)
            var = torch.stack([x.var((0, 2, 3)) for x in want]).mean(0)
            torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-6)
            assert not torch.equal(norm.running_var, raw["G.2.running_var"]) and norm.momentum == 0.1
        assert all(torch.equal(v, raw[k]) for k, v in made.model.state_dict().items())  # and put back
        averages = made.trainer.averages()
        torch.testing.assert_close(averages["G.2.running_mean"], mean, rtol=1e-4, atol=1e-6)


def test_a_model_worries_about_certainty_and_collapse():
    model = build("gan")
    signs = {"discriminator.real": 0.999, "discriminator.fake": 0.001}
    assert list(model.worry(signs)) == ["saturation"] and "D(G(z)) = 0.001" in model.worry(signs)["saturation"]
    assert not model.worry(signs | {"discriminator.fake": 0.3}) and not build("sngan").worry(signs)
    had = {"smoothing": 0.1, "minibatch_kernels": 4}  # nothing is proposed that is there, or would be refused
    told = build("gan", tricks=had).worry(signs | {"spread": 0.1})
    assert told["saturation"].endswith("try a smaller train.phases.discriminator.lr or model.norm_D=spectral")
    assert told["collapse"].endswith("try a smaller --lr or wgan-gp")
    assert build("wgan-gp").worry({"spread": 0.1})["collapse"].endswith("try a smaller --lr")
    assert list(model.worry({"spread": 0.1})) == ["collapse"] and not model.worry({"spread": 0.9})


def test_a_worry_is_told_once():
    told = []
    worries = Worries(build("gan"), points(40), told.append)
    x = points(40).x.numpy()
    worries.about_samples(1, [Samples(x[:20], None, 0), Samples(x[20:] * 0.99, None, 20)])
    assert not told
    for step in (2, 3):
        worries.about_samples(step, [Samples(x * 0.01, None, 0)])
    assert len(told) == 1 and told[0].startswith("step 2: samples hardly differ (0.01 of")
    worries.about_samples(4, [Samples(x[:3], None, 0)])
    late = Worries(build("gan"), points(40), told.append, since=5)
    for step in (4, 5):  # of random weights nothing is said
        late.about_samples(step, [Samples(x * 0.01, None, 0)])
    assert len(told) == 2 and told[1].startswith("step 5: ")
    assert spread(x * 3, x) == pytest.approx(3) and spread(x, x * 0) == 1


def test_a_run_tells_its_model_s_worries_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gencli.nn.gan.CERTAIN", -1.0)  # every log is one to worry about
    with session(tiny("gan", "train.steps=4")) as made, Run.create(out=tmp_path / "run") as run:
        made.start(run)
        made.fit(preview=False)
        assert run.path.joinpath("log.txt").read_text().count("D is certain of everything") == 1
    assert "step 1: D is certain of everything" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "gan model.updates=simultaneous model.conditional=true model.tricks.historical_averaging=0.1 train.ema=0.9",
        "improved-gan model.tricks.feature_matching=true model.tricks.historical_averaging=0.1 train.ema=0.9",
        "wgan model.first_steps=2 model.every=3 train.schedule=linear",
        "sngan model.network=resnet model.penalty=1 model.penalty_kind=zero-centred model.conditional=true",
    ],
)
def test_a_game_goes_on_exactly(words, tmp_path):
    name, *more = words.split()
    recipe = tiny(name, *more, "train.steps=6", "train.evaluate=[]")
    with session(recipe) as whole:
        for _ in range(6):
            last = whole.trainer.step()
    with session(recipe) as half, Run.create(out=tmp_path / "run") as folder:
        half.start(folder)
        for _ in range(3):
            half.trainer.step()
        half.save()
    with session(recipe) as half, Run.open(tmp_path / "run") as folder:
        half.resume(folder)
        assert half.trainer.number == 3
        assert [half.trainer.step() for _ in range(3)][-1] == last
        for part in ("model.state_dict", "trainer.tensors", "trainer.averages"):
            one, other = whole, half
            for key in part.split("."):
                one, other = getattr(one, key), getattr(other, key)
            one, other = one(), other()
            assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    "words",
    ["dcgan", "wgan-gp", "sngan", "sngan model.network=resnet model.conditional=true model.penalty=1", "improved-gan"],
)
def test_a_game_in_bfloat16(words):
    name, *more = words.split()
    with session(tiny(name, *more, "train.precision=bf16")) as made:
        logs = [made.trainer.step() for _ in range(2)][-1]
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in made.model.parameters())
    assert {"discriminator.loss", "generator.loss"} <= logs.keys()


def test_a_run_on_points_logs_both_players_and_the_modes_found(tmp_path):
    recipe = tiny("wgan-gp", "data.name=points/25-gaussians", "train.steps=2", "train.evaluate=[modes]")
    with session(recipe) as made, Run.create(out=tmp_path / "run") as folder:
        made.start(folder)
        made.fit(preview=False)
        # a generator that gives what it learns from has them all
        made.model.sample = lambda rng, labels=None: made.train_data.rows(torch.tensor(rng.rows))["x"]
        ((name, value, _),) = made.evaluate()
    assert (name, value) == ("modes@10000", 25)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [event for event in events if event["event"] == "train"]
    players = {f"{p}.gradient_norm" for p in ("discriminator", "generator")}
    assert len(trained) == 2 and players | {"discriminator.real", "discriminator.fake"} <= trained[0].keys()
    assert any("modes@10000" in event for event in events)
