"""gencli info."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gencli.commands.options import Json

__all__ = ["about_model", "bibtex", "info"]


def info(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="A model, a run (folder or number), a checkpoint or a .safetensors file."),
    ],
    cite: Annotated[bool, typer.Option("--bibtex", help="The paper of the model, for a bibliography.")] = False,
    json: Json = False,
) -> None:
    """gencli info pixelcnn

    Say all about a model (paper, configuration, how it works), a run (what was run where, and its recipe) or a
    checkpoint (its tensors, and the model, data and versions that made it). --bibtex prints the paper to cite.
    """
    path = _path(what)
    if path is None:
        if cite:
            print(bibtex(what), end="")
        else:
            about_model(what, json)
    elif path.is_dir() and not (path / "model.safetensors").exists():
        _about_run(path, cite, json)
    else:
        _about_checkpoint(path, cite, json)


def _path(what: str) -> Path | None:
    """The run or checkpoint that ``what`` names, or None where it is a model. UsageError where it is neither."""
    from gencli import run
    from gencli.console import DataError, UsageError, nearest
    from gencli.models import MAPS, TABLE, plugins

    path = Path(what)
    if path.is_dir() and any((path / name).exists() for name in ("run.json", "model.safetensors", "recipe.yaml")):
        return path
    if path.exists() and not path.is_dir():
        return path
    if what in TABLE or what in MAPS:
        return None
    try:
        found = run.find(what)
    except DataError:
        if what in (offered := plugins()[0]):
            return None
        runs = [str(r["path"].name) for r in run.list_runs()]
        names = nearest(what, [*TABLE, *MAPS, *offered, *runs])
        raise UsageError(f"no model, run or checkpoint {what!r}{names}", hint="gencli models; gencli runs") from None
    if found.is_dir() and not (found / "run.json").exists():
        raise DataError(f"{found} is neither a run nor a checkpoint", hint="gencli runs")
    return found


# ---------------------------------------------------------------------------------------------- models


def about_model(name: str, json: bool) -> None:
    """Print what is known of model ``name``, from the table and from its source, which is read and not run."""
    from gencli import console
    from gencli.models import entry as find_entry
    from gencli.recipe import list_recipes

    entry = find_entry(name)
    source, doc, fields = _source(entry.path)
    facts: dict[str, Any] = {
        "name": entry.name,
        "title": entry.title or None,
        "authors": entry.authors or None,
        "year": entry.year or None,
        "arxiv": entry.arxiv or None,
        "family": entry.family or None,
        "capabilities": list(entry.capabilities),
        "recipes": [r.name for r in list_recipes() if r.model == name],
        "origin": entry.origin,
        "source": str(source) if source else None,
    }
    if json or not sys.stdout.isatty():
        console.table([facts | {"config": fields, "doc": doc}], json=True)
        return
    for key, value in facts.items():
        print(f"{key:<12}  {', '.join(value) if isinstance(value, list) else value or '-'}")
    if fields:
        print()
        rows = [{f"model.{key}" if key == "key" else key: value for key, value in field.items()} for field in fields]
        console.table(rows)
    if doc:
        print(f"\n{doc}")


def _source(path: str) -> tuple[Path | None, str, list[dict[str, Any]]]:
    """(file, its docstring and its class's, fields of its Config) of ``module:Class``, without importing it."""
    from importlib.util import find_spec

    module, _, name = path.partition(":")
    try:
        spec = find_spec(module)
        if spec is None or not spec.origin:
            return None, "", []
        tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    except Exception:  # a broken plugin, which loading it names
        return None, "", []
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = classes.get(name)
    if found is None:
        return Path(spec.origin), ast.get_docstring(tree) or "", []
    config = None
    for node in found.body:  # class Config(Config): ..., or Config = ThatConfig
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            config = node
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "Config":
            config = classes.get(ast.unparse(node.value))
    docs = [ast.get_docstring(tree), ast.get_docstring(found)]
    return Path(spec.origin), "\n\n".join(d for d in docs if d), _fields(config) if config else []


def _fields(config: ast.ClassDef) -> list[dict[str, Any]]:
    rows = []
    for node in config.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        default, about = node.value, None
        if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("Field"):
            words = {word.arg: word.value for word in default.keywords}
            default = default.args[0] if default.args else words.get("default")
            about = words.get("description")
        rows.append(
            {
                "key": node.target.id,
                "type": ast.unparse(node.annotation),
                "default": ast.unparse(default) if default else None,
                "about": about.value if isinstance(about, ast.Constant) else None,
            }
        )
    return rows


def bibtex(name: str) -> str:
    """A BibTeX entry for the paper of model ``name``; UsageError if the table has no such model."""
    from gencli.console import UsageError, nearest
    from gencli.models import MAPS, TABLE

    known = TABLE | MAPS
    if name not in known:
        raise UsageError(f"no model {name!r} to cite{nearest(name, known)}", hint="gencli models")
    entry = known[name]
    authors = [author.strip() for author in entry.authors.split(",")]
    key = "".join(c for c in f"{authors[0].split()[-1]}{entry.year}{name}".lower() if c.isascii() and c.isalnum())
    fields = {"title": f"{{{_tex(entry.title)}}}", "author": _tex(" and ".join(authors)), "year": str(entry.year)}
    if entry.arxiv:
        fields |= {"eprint": entry.arxiv, "archivePrefix": "arXiv"}
    lines = [f"  {field} = {{{value}}}," for field, value in fields.items()]
    return "\n".join([f"@{'misc' if entry.arxiv else 'article'}{{{key},", *lines, "}"]) + "\n"


def _tex(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_" else c for c in text)


# ---------------------------------------------------------------------------------------------- runs and checkpoints


def _about_run(path: Path, cite: bool, json: bool) -> None:
    from gencli import checkpoint, console
    from gencli.commands.runs import last_metrics
    from gencli.run import list_runs, read_record

    record = read_record(path)
    if cite:
        print(bibtex(str(record.get("model"))), end="")
        return
    # only the list knows whether a run that says "running" is alive
    alive = {r["path"].resolve(): r for r in list_runs(path.resolve().parent)}.get(path.resolve(), {})
    facts = {"run": str(path), **record, "state": alive.get("state", record.get("state"))}
    facts |= {"last": last_metrics(path), "checkpoints": [folder.name for _, folder in checkpoint.steps(path)]}
    recipe = path / "recipe.yaml"
    text = recipe.read_text("utf-8", errors="replace") if recipe.is_file() else None
    if json or not sys.stdout.isatty():
        console.table([facts | {"recipe": text}], json=True)
        return
    _print_facts(facts)
    print(f"\n{text or ''}", end="")


def _about_checkpoint(path: Path, cite: bool, json: bool) -> None:
    from math import prod

    from gencli import console
    from gencli.header import read_header

    file = path / "model.safetensors" if path.is_dir() else path
    meta, tensors = read_header(file)
    if cite:
        print(bibtex(str(meta.get("model"))), end="")
        return
    dtypes: dict[str, int] = {}
    for dtype, _ in tensors.values():
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    raw = {name: shape for name, (_, shape) in tensors.items() if not name.startswith("ema/")}
    facts: dict[str, Any] = {
        "checkpoint": str(file),
        "bytes": file.stat().st_size,
        "tensors": len(raw),
        "averaged": len(tensors) - len(raw),
        "numbers": sum(map(prod, raw.values())),
        "dtypes": dtypes,
        **{key: value for key, value in meta.items() if key != "recipe"},
    }
    if json or not sys.stdout.isatty():
        console.table([facts | {"recipe": meta.get("recipe")}], json=True)
        return
    _print_facts(facts)


def _print_facts(facts: dict[str, Any], indent: str = "") -> None:
    """``facts`` on a terminal, one a line; mappings below their name."""
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{key}")
            _print_facts(value, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else "-" if value in (None, {}) else value
            print(f"{indent}{key:<{14 - len(indent)}}  {shown}")
