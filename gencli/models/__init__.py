"""The table of models: what exists, where, from which paper; and the models of installed plugins. Imports no torch."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gencli.console import GencliError, UsageError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from gencli.contract import Model

__all__ = ["GROUP", "MAPS", "TABLE", "Entry", "entry", "listing", "model_class", "plugins"]

GROUP = "gencli.models"  # of entry points, by which a package offers a model


@dataclass(frozen=True)
class Entry:
    """One model. ``path`` is ``module:Class``; ``capabilities`` are those of ``contract.CAPABILITIES``.

    A plugin's has its package as ``origin``, the package's summary as ``title``, and nothing in the other fields.
    """

    name: str
    path: str
    family: str
    title: str
    authors: str
    year: int
    arxiv: str
    capabilities: tuple[str, ...]
    origin: str = "gencli"


TABLE: dict[str, Entry] = {
    e.name: e
    for e in [
        Entry(
            "cdf-flow",
            "gencli.models.flows.cdf_flow:CDFFlow",
            "flows",
            "Neural Autoregressive Flows",
            "Chin-Wei Huang, David Krueger, Alexandre Lacoste, Aaron Courville",
            2018,
            "1804.00779",
            ("samples", "likelihood", "latents", "encodes", "inverts"),
        ),
        Entry(
            "ffjord",
            "gencli.models.flows.ffjord:FFJORD",
            "flows",
            "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models",
            "Will Grathwohl, Ricky T. Q. Chen, Jesse Bettencourt, Ilya Sutskever, David Duvenaud",
            2018,
            "1810.01367",
            ("samples", "likelihood", "latents", "encodes", "inverts"),
        ),
        Entry(
            "glow",
            "gencli.models.flows.glow:Glow",
            "flows",
            "Glow: Generative Flow with Invertible 1x1 Convolutions",
            "Diederik P. Kingma, Prafulla Dhariwal",
            2018,
            "1807.03039",
            ("samples", "likelihood", "latents", "encodes", "inverts"),
        ),
        Entry(
            "iaf",
            "gencli.models.flows.iaf:IAF",
            "flows",
            "Improving Variational Inference with Inverse Autoregressive Flow",
            "Diederik P. Kingma, Tim Salimans, Rafal Jozefowicz, Xi Chen, Ilya Sutskever, Max Welling",
            2016,
            "1606.04934",
            ("samples", "likelihood", "latents", "encodes", "inverts"),
        ),
        Entry(
            "maf",
            "gencli.models.flows.maf:MAF",
            "flows",
            "Masked Autoregressive Flow for Density Estimation",
            "George Papamakarios, Theo Pavlakou, Iain Murray",
            2017,
            "1705.07057",
            ("samples", "likelihood", "latents", "encodes", "inverts"),
        ),
        Entry(
            "nice",
            "gencli.models.flows.nice:NICE",
            "flows",
            "NICE: Non-linear Independent Components Estimation",
            "Laurent Dinh, David Krueger, Yoshua Bengio",
            2014,
            "1410.8516",
            ("samples", "likelihood", "latents", "encodes", "inverts"),
        ),
        Entry(
            "classifier",
            "gencli.models.supervised.classifier:Classifier",
            "supervised",
            "Deep Residual Learning for Image Recognition",
            "Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun",
            2015,
            "1512.03385",
            ("features", "classes"),
        ),
        Entry(
            "pixelcnn",
            "gencli.models.autoregressive.pixelcnn:PixelCNN",
            "autoregressive",
            "Conditional Image Generation with PixelCNN Decoders",
            "Aäron van den Oord, Nal Kalchbrenner, Oriol Vinyals, Lasse Espeholt, Alex Graves, Koray Kavukcuoglu",
            2016,
            "1606.05328",
            ("samples", "likelihood", "completes"),
        ),
        Entry(
            "pixelcnnpp",
            "gencli.models.autoregressive.pixelcnnpp:PixelCNNPP",
            "autoregressive",
            "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications",
            "Tim Salimans, Andrej Karpathy, Xi Chen, Diederik P. Kingma",
            2017,
            "1701.05517",
            ("samples", "likelihood", "completes"),
        ),
        Entry(
            "realnvp",
            "gencli.models.flows.realnvp:RealNVP",
            "flows",
            "Density estimation using Real NVP",
            "Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio",
            2016,
            "1605.08803",
            ("samples", "likelihood", "latents", "encodes", "inverts"),
        ),
        Entry(
            "rnn",
            "gencli.models.autoregressive.rnn:RNN",
            "autoregressive",
            "Pixel Recurrent Neural Networks",
            "Aäron van den Oord, Nal Kalchbrenner, Koray Kavukcuoglu",
            2016,
            "1601.06759",
            ("samples", "likelihood", "completes"),
        ),
        Entry(
            "linear-vae",
            "gencli.models.latent.linear_vae:LinearVAE",
            "latent",
            "Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse",
            "James Lucas, George Tucker, Roger Grosse, Mohammad Norouzi",
            2019,
            "1911.02469",
            ("samples", "likelihood", "bounds", "latents", "encodes"),
        ),
        Entry(
            "mixture",
            "gencli.models.latent.mixture:Mixture",
            "latent",
            "Variational Inference: A Review for Statisticians",
            "David M. Blei, Alp Kucukelbir, Jon D. McAuliffe",
            2016,
            "1601.00670",
            ("samples", "likelihood", "bounds"),
        ),
        Entry(
            "vae",
            "gencli.models.latent.vae:VAE",
            "latent",
            "Auto-Encoding Variational Bayes",
            "Diederik P. Kingma, Max Welling",
            2013,
            "1312.6114",
            ("samples", "likelihood", "bounds", "latents", "encodes"),
        ),
        Entry(
            "wavenet",
            "gencli.models.autoregressive.wavenet:WaveNet",
            "autoregressive",
            "WaveNet: A Generative Model for Raw Audio",
            "Aäron van den Oord, Sander Dieleman, Heiga Zen, Karen Simonyan, Oriol Vinyals, Alex Graves, "
            "Nal Kalchbrenner, Andrew Senior, Koray Kavukcuoglu",
            2016,
            "1609.03499",
            ("samples", "likelihood", "completes"),
        ),
        Entry(
            "gan",
            "gencli.models.gans.gan:GAN",
            "gans",
            "Generative Adversarial Nets",
            "Ian Goodfellow, Jean Pouget-Abadie, Mehdi Mirza, Bing Xu, David Warde-Farley, Sherjil Ozair, "
            "Aaron Courville, Yoshua Bengio",
            2014,
            "1406.2661",
            ("samples", "latents"),
        ),
        Entry(
            "dcgan",
            "gencli.models.gans.dcgan:DCGAN",
            "gans",
            "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks",
            "Alec Radford, Luke Metz, Soumith Chintala",
            2015,
            "1511.06434",
            ("samples", "latents"),
        ),
        Entry(
            "improved-gan",
            "gencli.models.gans.improved_gan:ImprovedGAN",
            "gans",
            "Improved Techniques for Training GANs",
            "Tim Salimans, Ian Goodfellow, Wojciech Zaremba, Vicki Cheung, Alec Radford, Xi Chen",
            2016,
            "1606.03498",
            ("samples", "latents"),
        ),
        Entry(
            "wgan",
            "gencli.models.gans.wgan:WGAN",
            "gans",
            "Wasserstein GAN",
            "Martin Arjovsky, Soumith Chintala, Léon Bottou",
            2017,
            "1701.07875",
            ("samples", "latents"),
        ),
        Entry(
            "wgan-gp",
            "gencli.models.gans.wgan_gp:WGANGP",
            "gans",
            "Improved Training of Wasserstein GANs",
            "Ishaan Gulrajani, Faruk Ahmed, Martin Arjovsky, Vincent Dumoulin, Aaron Courville",
            2017,
            "1704.00028",
            ("samples", "latents"),
        ),
        Entry(
            "sngan",
            "gencli.models.gans.sngan:SNGAN",
            "gans",
            "Spectral Normalization for Generative Adversarial Networks",
            "Takeru Miyato, Toshiki Kataoka, Masanori Koyama, Yuichi Yoshida",
            2018,
            "1802.05957",
            ("samples", "latents"),
        ),
        Entry(
            "word2vec",
            "gencli.models.words.word2vec:Word2vec",
            "words",
            "Distributed Representations of Words and Phrases and their Compositionality",
            "Tomas Mikolov, Ilya Sutskever, Kai Chen, Greg Corrado, Jeffrey Dean",
            2013,
            "1310.4546",
            ("vectors",),
        ),
    ]
}


# Maps between word vectors: a dictionary's pairs and one decomposition, no data set, recipe, steps or run. They are no
# Model of the contract; the verb that fits and applies them is their one capability.
MAPS: dict[str, Entry] = {
    e.name: e
    for e in [
        Entry(
            "linear",
            "gencli.models.translation.linear:Linear",
            "translation",
            "Exploiting Similarities among Languages for Machine Translation",
            "Tomas Mikolov, Quoc V. Le, Ilya Sutskever",
            2013,
            "1309.4168",
            ("translate-embeddings",),
        ),
        Entry(
            "procrustes",
            "gencli.models.translation.procrustes:Procrustes",
            "translation",
            "Normalized Word Embedding and Orthogonal Transform for Bilingual Word Translation",
            "Chao Xing, Dong Wang, Chao Liu, Yiye Lin",
            2015,
            "",
            ("translate-embeddings",),
        ),
    ]
}


def entry(name: str) -> Entry:
    """What is known of model ``name``, built in or installed as a plugin, without importing it.

    :raises UsageError: if there is no such model.
    """
    if name in TABLE or name in MAPS:
        return TABLE.get(name) or MAPS[name]
    found, _ = plugins()
    if name in found:
        return _listed(found[name])
    raise UsageError(f"no model {name[:100]!r}{nearest(name, [*TABLE, *MAPS, *found])}", hint="gencli models")


def model_class(name: str) -> type[Model]:
    """The class of model ``name``. Imports its module, and so torch; of the plugins, only the one named.

    :raises UsageError: if there is no such model, or it is a map, which no recipe trains.
    :raises GencliError: if the plugin of that name is broken.
    """
    listed = entry(name)
    if name in MAPS:
        raise UsageError(f"{name} maps word vectors", hint=f"gencli translate-embeddings SRC TGT --map {name}")
    if name not in TABLE:
        return _load(plugins()[0][name], listed.origin)
    module, _, attribute = listed.path.partition(":")
    found: type[Model] = getattr(importlib.import_module(module), attribute)
    return found


# ---------------------------------------------------------------------------------------------- plugins


def plugins() -> tuple[dict[str, EntryPoint], list[str]]:
    """The models that installed packages offer, by name, and what is wrong with their names; imports none of them.

    A package offers a model by an entry point of the group ``gencli.models``: ``name = "module:Class"``. There is no
    other way in: no folder is searched and no file names a module. A built-in model cannot be replaced, and of two
    packages that offer one name neither is believed. ``GENCLI_NO_PLUGINS=1``: none.
    """
    if os.environ.get("GENCLI_NO_PLUGINS", "0") not in ("", "0"):
        return {}, []
    from importlib import metadata

    try:
        points = sorted(metadata.entry_points(group=GROUP), key=lambda p: (p.name, _origin(p)))
    except Exception as error:  # one package with a malformed list of entry points
        return {}, [f"plugins are left out: the installed packages' entry points cannot be read ({_line(error)})"]
    offers: dict[str, list[EntryPoint]] = {}
    for point in points:
        offers.setdefault(point.name, []).append(point)
    problems: list[str] = []
    for name, offered in list(offers.items()):
        origins = " and ".join(map(_origin, offered))
        if name in TABLE or name in MAPS:
            problems.append(f"model {name!r} of {origins} is left out: gencli has a model of that name")
        elif len(offered) > 1:
            problems.append(f"model {name!r} is left out: {origins} both offer it")
    return {n: o[0] for n, o in offers.items() if n not in TABLE and n not in MAPS and len(o) == 1}, problems


def listing() -> tuple[list[Entry], list[str]]:
    """All models, the built-in ones first, and what is wrong with the plugins' names."""
    found, problems = plugins()
    return [*TABLE.values(), *MAPS.values(), *map(_listed, found.values())], problems


def _listed(point: EntryPoint) -> Entry:
    """What a plugin's package says of itself: the rest is in its source, which only :func:`model_class` runs."""
    about = point.dist.metadata.get_all("Summary") if point.dist else None
    return Entry(point.name, point.value, "", about[0] if about else "", "", 0, "", (), _origin(point))


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _load(point: EntryPoint, origin: str) -> type[Model]:
    from gencli.contract import Model

    hint = f"install another version of {origin.split(maxsplit=1)[0]}, or leave plugins out: GENCLI_NO_PLUGINS=1"
    try:
        found = point.load()
    except Exception as error:  # a stranger's module may raise anything
        raise GencliError(f"model {point.name!r} of {origin} cannot be loaded: {_line(error)}", hint=hint) from error
    if not (isinstance(found, type) and issubclass(found, Model)):
        raise GencliError(f"model {point.name!r} of {origin}: {point.value} is no subclass of Model", hint=hint)
    return found
