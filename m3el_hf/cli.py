"""The command line. Heavy imports wait until a command needs them, so that help and mistakes answer at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from m3el_hf import __version__
from m3el_hf.errors import M3ELError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 2 for what the user can mend, 130 for an interrupt."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (M3ELError, OSError) as error:
        print(f"m3el-hf: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("m3el-hf: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("m3el-hf", description="Multimodal entity linking on the Hugging Face Hub.")
    parser.add_argument("--version", action="version", version=f"m3el-hf {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_quickstart(commands)
    _add_data(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_link(commands)
    _add_push(commands)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: not that an option is off or unset."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is None or action.default is False  # 0 is a default worth showing
        return action.help if unsaid else super()._get_help_string(action)


def _hush() -> None:
    """Silences the libraries' own progress bars, which would cut through ours."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _command(commands: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary, formatter_class=_HelpFormatter)
    parser.set_defaults(run=run)
    return parser


def _add_quickstart(commands: Any) -> None:
    parser = _command(
        commands, "quickstart", "data, baselines, training, figures, a saved model: all at once", _quickstart
    )
    parser.add_argument("--data-dir", type=Path, help="a raw M3EL release or a built folder; default: generated data")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for all that is written")
    parser.add_argument("--minutes", type=float, default=4.0, help="about how long it may take in all")
    parser.add_argument("--base", help="a CLIP to start from, folder or Hub id; default: a tiny one from scratch")
    parser.add_argument("--head", choices=("clip", "matching"), default="clip", help="how pairs are scored")
    parser.add_argument("--lora", action="store_true", help="train adapters instead of all weights")
    parser.add_argument("--seed", type=int, default=0, help="seeds splits, order, draws and weights")


def _quickstart(options: argparse.Namespace) -> None:
    from rich.console import Console

    from m3el_hf.quickstart import QuickstartOptions, quickstart

    _hush()
    values = {field.name: getattr(options, field.name) for field in fields(QuickstartOptions)}
    quickstart(QuickstartOptions(**values), Console())


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="build a dataset repository", description="Build a dataset repository.")
    parser = _command(
        data.add_subparsers(metavar="COMMAND", required=True),
        "build",
        "write a folder that plain load_dataset reads",
        _data_build,
    )
    parser.add_argument("--reader", default="m3el", help="raw format: m3el, or mini for generated data")
    parser.add_argument("--input", type=Path, help="folder of the raw release")
    parser.add_argument("--output", type=Path, default=Path("m3el"), help="folder to write")
    parser.add_argument("--instances", type=int, help="how many instances mini generates; default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="seeds splits and the order of candidates")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")


def _data_build(options: argparse.Namespace) -> None:
    from m3el_hf.data.store import build

    extra = {}
    if options.instances is not None:
        if options.reader != "mini":
            raise M3ELError(f"--instances is for the mini reader; the {options.reader} reader takes all there are")
        extra["instances"] = options.instances
    collection = build(
        options.reader, options.input, options.output, seed=options.seed, overwrite=options.overwrite, **extra
    )
    report = collection.report
    print(f"{report.read} instances read, {len(collection.records)} written to {options.output}")
    for line in report.skipped[:5]:
        print(f"  skipped: {line}")
    if len(report.skipped) > 5:
        print(f"  skipped: {len(report.skipped) - 5} more")
    for file, reason in list(report.unusable_images.items())[:5]:
        print(f"  picture {file} {reason}")
    if len(report.unusable_images) > 5:
        print(f"  {len(report.unusable_images) - 5} more pictures are missing or broken")
    for name, count in report.counts.items():
        print(f"  {name}: {count}")


def _add_train(commands: Any) -> None:
    from m3el_hf.training.arguments import TrainingArguments

    parser = _command(commands, "train", "train a model on a built dataset", _train)
    parser.add_argument("--data", required=True, help="folder or Hub id of a built dataset")
    parser.add_argument("--base", help="a CLIP to start from, folder or Hub id; default: a tiny one from scratch")
    parser.add_argument("--head", choices=("clip", "matching"), default="clip", help="how pairs are scored")
    for field in fields(TrainingArguments):
        flag, help_text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", help=help_text)
        else:
            kind = float if field.default is None else type(field.default)
            parser.add_argument(flag, type=kind, default=field.default, help=help_text)


def _train(options: argparse.Namespace) -> None:
    from m3el_hf.sources import load_built
    from m3el_hf.training.arguments import TrainingArguments
    from m3el_hf.training.loop import train
    from m3el_hf.training.start import start_model

    arguments = TrainingArguments(**{field.name: getattr(options, field.name) for field in fields(TrainingArguments)})
    _hush()
    data = load_built(options.data)
    missing = [split for split in ("train", "validation") if split not in data]
    if missing:
        raise M3ELError(f"{options.data} has no {missing[0]} split: it needs train and validation")
    model, processor = start_model(options.base, options.head, data["train"], arguments.seed)
    model, result = train(model, processor, data["train"], data["validation"], arguments)
    model.save_pretrained(arguments.output_dir / "model")
    processor.save_pretrained(arguments.output_dir / "model")
    print(f"best of {result.steps} steps: {result.best_step}, validation MRR {result.best_mrr:.3f}")
    print(f"saved to {arguments.output_dir / 'model'}")


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", "measure a model beside the baselines on the nine tasks", _evaluate)
    parser.add_argument("model", help="folder or Hub id of a saved model")
    parser.add_argument("--data", required=True, help="folder or Hub id of a built dataset")
    parser.add_argument("--split", default="test", help="which rows")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluate"), help="folder for the report")


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from m3el_hf.data.collator import LinkingCollator
    from m3el_hf.evaluation.baselines import BASELINES
    from m3el_hf.evaluation.evaluator import ModelSystem, average_mention, evaluate
    from m3el_hf.evaluation.report import RunReport, software
    from m3el_hf.sources import load_built, load_model

    _hush()
    model, processor = load_model(options.model)
    data = load_built(options.data)
    if options.split not in data:
        raise M3ELError(f"{options.data} has no split {options.split!r}: it has {', '.join(data)}")
    rows, collator = data[options.split], LinkingCollator(processor)
    control = ModelSystem("mention-blind control", model, collator, average_mention(model, collator, rows))
    table = evaluate([*BASELINES, ModelSystem("model", model, collator), control], rows, progress=True)
    provenance = {"data": options.data, "split": options.split, "model": options.model, **software()}
    report = RunReport(f"{options.model} on {options.data}, {options.split}", table, provenance)
    report.save(options.output)
    Console().print(report.to_rich())
    print(f"report: {options.output / 'report.html'}")


def _add_link(commands: Any) -> None:
    parser = _command(commands, "link", "link one mention to the entities of a built dataset", _link)
    parser.add_argument("--model", required=True, help="folder or Hub id of a saved model")
    parser.add_argument("--knowledge-base", required=True, help="folder or Hub id of a built dataset")
    parser.add_argument("--name", help="the mention's name")
    parser.add_argument("--context", help="its sentence")
    parser.add_argument("--image", type=Path, help="its picture")
    parser.add_argument("--top-k", type=int, default=5, help="how many entities to show")


def _link(options: argparse.Namespace) -> None:
    from m3el_hf.linking.linker import EntityLinker

    if not (options.name or options.context or options.image):
        raise M3ELError("nothing to link: pass --name, --context, --image, or some of them")
    _hush()
    linker = EntityLinker.from_pretrained(options.model, knowledge_base=options.knowledge_base)
    try:
        links = linker(name=options.name, context=options.context, image=options.image, top_k=options.top_k)
    except ValueError as error:
        raise M3ELError(str(error)) from error
    for link in links:
        print(f"{link.score:9.3f}  {link.qid:<10}  {link.name or ''}: {link.description or ''}")


def _add_push(commands: Any) -> None:
    parser = _command(commands, "push", "publish a saved model, with its card", _push)
    parser.add_argument("folder", type=Path, help="folder of a saved model")
    parser.add_argument("repo_id", help="user/name on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def _push(options: argparse.Namespace) -> None:
    from m3el_hf.hub.push import push_folder

    print(push_folder(options.folder, options.repo_id, private=options.private))


if __name__ == "__main__":
    sys.exit(main())
