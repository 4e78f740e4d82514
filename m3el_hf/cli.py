"""The command line. Heavy imports wait until a command needs them, so that help and mistakes answer at once."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3el_hf import __version__
from m3el_hf.errors import M3ELError, one_line

if TYPE_CHECKING:
    from m3el_hf.data.audit import Audit


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 2 for what the user can fix, 130 or 143 for an interrupt."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (M3ELError, OSError) as error:
        process = os.environ.get("RANK", "0")  # of several that train together, each may have its own mistake
        print(f"m3el-hf{f', process {process}' if process != '0' else ''}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("m3el-hf: interrupted", file=sys.stderr)
        return 130


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
    parser.add_argument("--head", choices=("clip", "matching", "pooled"), default="clip", help="how pairs are scored")
    parser.add_argument("--lora", action="store_true", help="train adapters instead of all weights")
    parser.add_argument("--seed", type=int, default=0, help="seeds splits, order, draws and weights")


def _quickstart(options: argparse.Namespace) -> None:
    from rich.console import Console

    from m3el_hf.quickstart import QuickstartOptions, quickstart

    _hush()
    values = {field.name: getattr(options, field.name) for field in fields(QuickstartOptions)}
    quickstart(QuickstartOptions(**values), Console())


def _add_data(commands: Any) -> None:
    summary = "build, audit and publish a dataset repository"
    data = commands.add_parser("data", help=summary, description=f"{summary.capitalize()}.")
    steps = data.add_subparsers(metavar="COMMAND", required=True)
    _add_data_build(steps)
    _add_data_audit(steps)
    _add_data_push(steps)


def _add_data_build(commands: Any) -> None:
    parser = _command(commands, "build", "write a folder that plain load_dataset reads", _data_build)
    parser.add_argument("--reader", default="m3el", help="raw format; an unknown one lists all")
    parser.add_argument("--input", type=Path, help="folder of the raw release; mini needs none")
    parser.add_argument("--output", type=Path, default=Path("m3el"), help="folder to write")
    parser.add_argument(
        "--protocol",
        default="as_released",
        help="as_released, or deleaked: without a mention's picture where it is the gold's own",
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--short-side", type=int, default=256, help="reduce larger pictures to this short side, in pixels"
    )
    sizes.add_argument("--keep-original", action="store_true", help="keep pictures as they are")
    parser.add_argument("--title", help="what the data is called; default: what the reader calls it")
    parser.add_argument("--license", help="its licence, as the Hub abbreviates it, such as cc-by-4.0")
    parser.add_argument("--instances", type=int, help="how many instances mini generates; default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="seeds splits and the order of candidates")
    parser.add_argument("--previous", help="folder or Hub id of an earlier version, whose rows keep their splits")
    parser.add_argument("--num-proc", type=int, default=1, help="processes that open pictures and write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")


def _data_build(options: argparse.Namespace) -> None:
    from m3el_hf.data.manifest import FILE_NAME, UNUSABLE_IMAGES, read_unusable_images
    from m3el_hf.data.schema import SPLITS
    from m3el_hf.data.store import build

    extra = {}
    if options.instances is not None:
        if options.reader != "mini":
            raise M3ELError(f"--instances is for the mini reader; the {options.reader} reader takes all there are")
        extra["instances"] = options.instances
    manifest = build(
        options.reader,
        options.input,
        options.output,
        seed=options.seed,
        protocol=options.protocol,
        short_side=None if options.keep_original else options.short_side,
        title=options.title,
        license_id=options.license,
        previous=options.previous,
        num_proc=options.num_proc,
        overwrite=options.overwrite,
        **extra,
    )
    print(f"{manifest.read:,} instances read, {manifest.total:,} written to {options.output}")
    for topic, splits in manifest.rows.items():
        print(f"  {topic}: {', '.join(f'{split} {splits.get(split, 0):,}' for split in SPLITS)}")
    for split in SPLITS:
        if not any(splits.get(split) for splits in manifest.rows.values()):
            print(f"  no {split} rows: m3el-hf data audit says why")
    if manifest.previous:
        print("  {rows:,} of these rows have the splits of {name} (revision {revision})".format(**manifest.previous))
    unusable = read_unusable_images(options.output)
    _print_some("skipped: ", [*manifest.skipped, *manifest.entities_skipped], FILE_NAME)
    _print_some("picture ", [f"{file} {reason}" for file, reason in unusable.items()], UNUSABLE_IMAGES)
    for name, count in manifest.counts.items():
        print(f"  {count:,} {name}")
    print(f"next: m3el-hf data audit {shlex.quote(str(options.output))}")


def _print_some(label: str, lines: list[str], file: str) -> None:
    for line in lines[:5]:
        print(f"  {label}{line}")
    if len(lines) > 5:
        print(f"  {label}{len(lines) - 5} more, all in {file}")


def _add_data_audit(commands: Any) -> None:
    parser = _command(
        commands, "audit", "count what is missing, leaked, doubled or broken in a built folder", _data_audit
    )
    parser.add_argument("folder", type=Path, help="folder that m3el-hf data build wrote")


def _data_audit(options: argparse.Namespace) -> None:
    from rich.console import Console

    Console().print(_audit(options.folder).to_rich())
    print(f"the whole report: {options.folder / 'audit' / 'audit.html'}; the card has its figures too")


def _audit(folder: Path) -> Audit:
    """Audits a built folder, saves the audit in it and writes its card anew."""
    from m3el_hf.data.audit import audit
    from m3el_hf.data.card import render_dataset_card
    from m3el_hf.data.manifest import Manifest

    result = audit(folder)
    (folder / "README.md").write_text(render_dataset_card(Manifest.load(folder), result), encoding="utf-8")
    result.save(folder)
    return result


def _add_data_push(commands: Any) -> None:
    parser = _command(commands, "push", "publish a built folder as a dataset repository", _data_push)
    parser.add_argument("folder", type=Path, help="folder that m3el-hf data build wrote")
    _add_push_options(parser)
    parser.add_argument("--tag", help="name this version, such as v1.0")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing main")


def _data_push(options: argparse.Namespace) -> None:
    from m3el_hf.data.audit import is_audited
    from m3el_hf.hub.push import check_push, push_folder

    check_push(options.folder, options.repo_id, "dataset", options.create_pr, options.tag)  # before minutes of audit
    if not is_audited(options.folder):
        _audit(options.folder)  # what is published says what is wrong with it
    pushed = push_folder(
        options.folder,
        options.repo_id,
        repo_type="dataset",
        private=options.private,
        tag=options.tag,
        create_pr=options.create_pr,
    )
    print(pushed)


def _add_train(commands: Any) -> None:
    from m3el_hf.training.recipes import add_flags

    add_flags(_command(commands, "train", "train a model on a built dataset, by a YAML file, flags or both", _train))


def _train(options: argparse.Namespace) -> int:
    from m3el_hf.training.recipes import run_arguments

    arguments = run_arguments(options)  # a mistake in it answers before all that training needs is imported
    from m3el_hf.training_run import run_training

    _hush()
    return 0 if run_training(arguments).is_finished else 143


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", "measure models beside the baselines, and write a report", _evaluate)
    parser.add_argument("models", nargs="+", help="folders or Hub ids of saved models, or of plain CLIPs")
    parser.add_argument("--data", required=True, help="folder or Hub id of a built dataset")
    parser.add_argument("--split", default="test", help="which rows")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="which tasks; default: all nine, or it2it in a base")
    parser.add_argument(
        "--against",
        choices=("candidates", "knowledge-base"),
        help="rank among each mention's own candidates (default, where there are some) or among all entities",
    )
    parser.add_argument(
        "--nil", choices=("drop", "miss", "entity"), default="drop", help="what mentions of no entity count as"
    )
    parser.add_argument("--nil-score", type=float, help="the score of NIL, where it is an entity")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/evaluate"), help="folder for the report and all counts"
    )
    parser.add_argument("--cache-dir", type=Path, help="keep encoded entities here for the next time")


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from m3el_hf.evaluation_run import EvaluationOptions, run_evaluation

    _hush()
    values = {field.name: getattr(options, field.name) for field in fields(EvaluationOptions)}
    report = run_evaluation(EvaluationOptions(**values))
    if report is not None:
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
    parser = _command(commands, "push", "publish a saved model with its card, or the metric", _push)
    folder = parser.add_argument("folder", type=Path, help="folder of a saved model")
    repository = _add_push_options(parser)
    parser.add_argument(
        "--metric",
        metavar="user/name",
        action=_InsteadOf,
        replaced=(folder, repository),
        help="publish the package's metric as this Space, for evaluate.load; takes no folder",
    )


class _InsteadOf(argparse.Action):
    """An option that is given instead of positional arguments: made optional, those could not have options between."""

    def __init__(self, *, replaced: Sequence[argparse.Action], **options: Any) -> None:
        super().__init__(**options)
        self.replaced = replaced

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        for action in self.replaced:
            action.required = False


def _add_push_options(parser: argparse.ArgumentParser) -> argparse.Action:
    repository = parser.add_argument("repo_id", help="user/name on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    return repository


def _push(options: argparse.Namespace) -> None:
    from m3el_hf.hub.push import push_folder

    if options.metric is None:
        print(push_folder(options.folder, options.repo_id, private=options.private))
        return
    if options.folder is not None:
        raise M3ELError("push either a folder or the metric: --metric user/name takes no folder")
    from m3el_hf.metrics import LINKING_ACCURACY

    print(push_folder(LINKING_ACCURACY, options.metric, repo_type="space", private=options.private))


if __name__ == "__main__":
    sys.exit(main())
