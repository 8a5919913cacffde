"""
What ``train_net.py`` does besides training: comparing a model with itself on fewer tokens, predicting, calibrating a
plan, and searching for one.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig
from torch import nn

from hourglass import waterfall
from hourglass.data.images import read_image
from hourglass.data.opening import (
    FIT_IMAGES,
    load_test,
    open_search,
    open_search_records,
    open_test,
    search_dataset,
)
from hourglass.data.unlabelled import register_folder
from hourglass.encoders import Plan, expedite, find_encoder
from hourglass.encoders.calibration import Calibration
from hourglass.errors import InputError
from hourglass.evaluation import (
    Comparison,
    InstanceEvaluator,
    Subject,
    compare,
    to_json,
    to_text,
    write_report,
)
from hourglass.evaluation.agreement import OutputRecorder, recording
from hourglass.evaluation.environment import describe_environment
from hourglass.evaluation.journal import (
    digest,
    digest_code,
    digest_data,
    digest_weights,
    members,
    open_journal,
    to_plain,
)
from hourglass.files import write_whole
from hourglass.fitting import calibrate
from hourglass.launch import build_evaluator, warn
from hourglass.report import FAINT
from hourglass.search.goal import Goal
from hourglass.search.measured import Measured
from hourglass.search.report import describe as describe_search
from hourglass.search.report import draw, to_table, write_plan
from hourglass.search.run import Images, Outcome, Search

# COCO's small, medium and large objects.
SIDES = (32, 96)
# Images of a search, where search.images says nothing.
SEARCH_IMAGES = 180
# Of these a sixth calibrates plans, at most so many: more hardly help.
MOST_FIT_IMAGES = 48
# Batches in which a second size of images is looked for, before a compiled model is timed.
TRIED = 16


class Options(NamedTuple):
    """
    Of a comparison.

    Attributes:
        agreement: also how far what each finds is what the unmodified model finds, which takes no labels.
        control: also without the plan's blocks, and with an affine map in their place.
        only: the one model to run; None: all.
        by_class: also tables by class.
        resume: go on from the images that the output folder has.
        journal: whether finished images are kept there.
        report: also a page that shows what the plan changes.
    """

    agreement: bool = False
    control: bool = False
    only: str | None = None
    by_class: bool = False
    resume: bool = False
    journal: bool = False
    report: bool = False


def run_comparison(cfg: DictConfig, model: nn.Module, plan: Plan, options: Options) -> dict[str, Any]:
    """Compare and report; returns the content of ``comparison.json``, empty in all but the main process."""
    plans = {"unmodified": Plan(), "fast attention": Plan(attention="fast"), "expedited": plan}
    if not plan.fast or plan.reducer is None and plan.keys == 1:
        del plans["fast attention"]
    records = open_test(cfg, model, cfg.evaluation.max_images)
    if options.control:
        plans |= make_controls(cfg, model, plan)
    if options.only:
        plans = {options.only: plans[options.only]}
    subjects = {}
    for name, model_plan in plans.items():
        view = expedite(model, model_plan)
        evaluator = build_evaluator(cfg, name)
        reported = options.report and name in ("unmodified", "expedited")
        if reported:
            keep_sizes(members(evaluator))
        if options.agreement or reported:
            # What the page does not look at need not be kept.
            lowest = 0.0 if options.agreement else FAINT * cfg.evaluation.report.score
            evaluator = recording(members(evaluator), options.agreement, lowest)
        subjects[name] = Subject(view, find_encoder(view)[1], evaluator)
    journal = open_journal(cfg, subjects, plans, records, options.resume) if options.journal else None
    remaining = records if journal is None else [record for record in records if record["image_id"] not in journal.done]
    comparison = compare(
        subjects,
        load_test(cfg, model, remaining),
        device=cfg.train.device,
        dtype=getattr(torch, cfg.evaluation.dtype),
        warmup=cfg.evaluation.warmup,
        journal=journal,
    )
    if comparison is None:
        return {}
    document = to_json(
        comparison,
        dataset=str(cfg.dataloader.test.dataset.names),
        device=cfg.train.device,
        dtype=cfg.evaluation.dtype,
        plan=plan.describe(),
    )
    print(f"\n{to_text(document, by_class=options.by_class)}\n")
    for line in document["warnings"]:
        warn(line)
    write_report(document, cfg.train.output_dir, options.by_class)
    print(f"written to {os.path.join(cfg.train.output_dir, 'comparison.json')}, .csv and .md", flush=True)
    if options.report:
        page = make_page(cfg, model, plan, subjects, comparison, document, records)
        print(f"written to {page}, for a browser", flush=True)
    if journal is not None:
        journal.remove()
    return document


def run_waterfall(cfg: DictConfig, model: nn.Module, plan: Plan, with_agreement: bool = False) -> dict[str, Any]:
    """
    Run the model with each part of what makes it faster, and with all of them, and report. On the first
    :data:`hourglass.waterfall.IMAGES` images, unless ``evaluation.max_images`` is set.

    Returns:
        the content of ``waterfall.json``.

    Raises:
        InputError: for several processes, and for a type that all models are to run in.
    """
    if comm.get_world_size() > 1:
        raise InputError("--waterfall runs in one process only, as it times models in turn")
    if cfg.evaluation.dtype != "float32":
        raise InputError(
            "with --waterfall, which has bfloat16 in rows of its own, evaluation.dtype must be 'float32', got "
            f"{cfg.evaluation.dtype!r}"
        )
    records = open_test(cfg, model, cfg.evaluation.max_images or waterfall.IMAGES)
    rows = waterfall.steps(plan)
    if cfg.evaluation.max_images is None and len(records) == waterfall.IMAGES:
        warn(f"only the first {waterfall.IMAGES} images run: evaluation.max_images sets another number")
    print(f"{len(rows)} rows, each of {len(records)} images", flush=True)
    trials = waterfall.attempt(rows, model, _two_batch_sizes(cfg, model, records), cfg.train.device)
    subjects = {}
    for row, trial in zip(rows, trials):
        if trial.view is None or trial.problem:
            warn(f"{row.name} cannot run here: {trial.problem}")
            continue
        evaluator = build_evaluator(cfg, row.name)
        subjects[row.name] = row.subject(trial.view, recording(members(evaluator)) if with_agreement else evaluator)
    images = load_test(cfg, model, records)
    title = f"{len(subjects)} models in turn"
    comparison = compare(subjects, images, device=cfg.train.device, warmup=cfg.evaluation.warmup, title=title)
    assert comparison is not None  # there is one process
    dataset = str(cfg.dataloader.test.dataset.names)
    document = waterfall.to_json(rows, trials, comparison, plan, dataset=dataset, device=cfg.train.device)
    print(f"\n{waterfall.to_text(document)}\n")
    for line in document["warnings"]:
        warn(line)
    waterfall.write_waterfall(document, cfg.train.output_dir)
    print(f"written to {os.path.join(cfg.train.output_dir, 'waterfall.json')}, .csv and .md", flush=True)
    return document


def _two_batch_sizes(cfg: DictConfig, model: nn.Module, records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The first batch and, of the next ones, one of another size: torch compiles anew for the second size it sees."""
    candidates = records[: TRIED * cfg.evaluation.batch_size]
    batches: list[list[dict[str, Any]]] = []
    for batch in load_test(cfg, model, candidates):
        sizes = [[record["image"].shape for record in known_batch] for known_batch in batches]
        if [record["image"].shape for record in batch] not in sizes:
            batches.append(batch)
        if len(batches) == 2:
            break
    return batches


def predict(cfg: DictConfig, **request: Any) -> int:
    """
    Draw and write what the expedited model finds in images and videos.

    Args:
        cfg: of the model.
        request: see :class:`hourglass.prediction.run.Request`.

    Returns:
        the command's exit code.
    """
    try:
        from hourglass.prediction.run import Request, run_prediction  # matplotlib is for this alone
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise InputError("--predict draws with matplotlib, which is missing: pip install matplotlib") from error
    seed_all_rng(cfg.train.seed)
    return run_prediction(cfg, Request(**request))


def keep_sizes(evaluators: Sequence[DatasetEvaluator]) -> None:
    """Let evaluators also record AP by COCO's sizes of objects, unless they have sizes of their own."""
    for evaluator in evaluators:
        if isinstance(evaluator, InstanceEvaluator) and not evaluator.sides:
            evaluator.set_sides(SIDES)
            evaluator.reset()


def make_page(
    cfg: DictConfig,
    model: nn.Module,
    plan: Plan,
    subjects: dict[str, Subject],
    comparison: Comparison,
    document: dict[str, Any],
    records: list[dict[str, Any]],
) -> Path:
    """Write the report of a comparison that has run; returns the path of its page."""
    from hourglass.report.page import Material, write_page
    from hourglass.report.tokens import Tokens, find_tokens

    pair = [members(subjects[name].evaluator) for name in ("unmodified", "expedited")]
    first, second = (
        evaluator for evaluators in pair for evaluator in evaluators if isinstance(evaluator, OutputRecorder)
    )

    def read(record: dict[str, Any]) -> np.ndarray:
        return read_image(record["file_name"], "RGB", cfg.dataloader.image_scaling)

    def find(record: dict[str, Any]) -> Tokens | None:
        (inputs,) = next(iter(load_test(cfg, model, [record])))
        dtype = getattr(torch, cfg.evaluation.dtype)
        with torch.autocast(cfg.train.device, dtype, enabled=dtype != torch.float32):
            return find_tokens(subjects["expedited"].model, plan, inputs)

    material = Material(
        document,
        comparison,
        (pair[0], pair[1]),
        (first, second),
        records,
        MetadataCatalog.get(cfg.dataloader.test.dataset.names),
        read,
        find,
        cfg.evaluation.report.score,
        cfg.evaluation.report.images,
    )
    return write_page(cfg.train.output_dir, material)


def use_folder(cfg: DictConfig, folder: str) -> None:
    """Let a config run on a folder of images without labels, in the place of its data sets."""
    name = register_folder(folder)
    labelled = cfg.dataloader.test.dataset.get("names")
    if isinstance(labelled, str) and labelled in DatasetCatalog.list():
        # The model's classes keep their names where these are known without the data.
        for key in ("thing_classes", "stuff_classes"):
            with contextlib.suppress(InputError, OSError):
                if (names := MetadataCatalog.get(labelled).get(key)) is not None:
                    MetadataCatalog.get(name).set(**{key: list(names)})
    cfg.dataloader.test.dataset.names = name
    cfg.dataloader.evaluator = []
    cfg.search.dataset = name


def make_controls(cfg: DictConfig, model: nn.Module, plan: Plan) -> dict[str, Plan]:
    """
    The plan's blocks left out, and an affine map in their place, which is fitted to images of ``cfg.search``; without
    those images, with a warning, the first alone.
    """
    plans = {"control": plan.control()}
    if plan.reducer is None:
        return plans
    try:
        images = open_search(cfg, model)
    except InputError as error:
        warn(f"no linear control, as its affine map cannot be fitted to images of search.dataset: {error}")
        return plans
    linear = plan.linear_control()
    return {**plans, "linear control": linear.calibrated(calibrate(model, linear, images, search_dataset(cfg)))}


def run_calibration(cfg: DictConfig, model: nn.Module, plan: Plan) -> str:
    """Calibrate the plan on images of ``cfg.search``; returns the path of the file that is written."""
    calibration = calibrate(model, plan, open_search(cfg, model), search_dataset(cfg))
    path = os.path.join(cfg.train.output_dir, "calibration.pth")
    if comm.is_main_process():
        os.makedirs(cfg.train.output_dir, exist_ok=True)
        calibration.save(path)
        print(f"\n{describe_fit(calibration)}\nwritten to {path}, for plan.calibration={path}", flush=True)
    return path


def describe_fit(calibration: Calibration) -> str:
    """The images of a calibration, and for each stage a line with the error before and after correction."""
    fitted = calibration.seen
    lines = [
        f"{fitted['images']} images of {fitted['about']}; squared error of the blocks' output, in % of its variance:"
    ]
    for i, stage in enumerate(fitted["stages"]):
        prefix = f"stage {i + 1} of the plan: " if len(fitted["stages"]) > 1 else ""
        before, remaining = (f"{100 * stage[key]:.2f} %" for key in ("left without", "left"))
        method = f"form {stage['form']}, ridge {stage['ridge']:g}, rank {stage['rank']}"
        lines.append(f"  {prefix}{before} without, {remaining} with it, on images that were left out ({method})")
    return "\n".join(lines)


def run_search(cfg: DictConfig, model: nn.Module, goal: Goal, config_file: str, overrides: list[str]) -> Outcome:
    """
    Search for a plan on images of ``cfg.search``, print and write what is found, and the plan as a config.

    Raises:
        InputError: for a model that cannot be searched, and images that cannot be read.
    """
    if comm.get_world_size() > 1:
        raise InputError("--search runs in one process only, as it times blocks in turn")
    folder, about = Path(cfg.train.output_dir), search_dataset(cfg)
    records, load = open_search_records(cfg, model, cfg.search.images or SEARCH_IMAGES)
    records = [records[i] for i in np.random.default_rng(goal.seed).permutation(len(records))]
    labels = _label_evaluators(cfg, model) if goal.labels == "auto" else None
    fit_count = min(max(FIT_IMAGES, len(records) // 6), MOST_FIT_IMAGES, len(records) // 4)
    middle = fit_count + 3 * (len(records) - fit_count) // 4
    fit, rank, check = (
        Inputs(part, load) for part in (records[:fit_count], records[fit_count:middle], records[middle:])
    )
    measured = Measured(folder / "search.json", search_settings(cfg, model, records))
    if measured.resumed:
        _print_line(f"continuing with the measurements in {measured.path}")
    elif measured.differing:
        warn(f"{measured.path} was measured with other {', '.join(measured.differing)}: it is replaced")
    dtype = getattr(torch, cfg.evaluation.dtype)
    images = Images(fit, rank, check, about)
    outcome = Search(model, images, goal, measured, labels, cfg.train.device, dtype, _print_line).run()
    table, text = to_table(outcome), describe_search(outcome, goal, about)
    _print_line(f"\n{table}\n\n{text}")
    measured.conclude(goal=str(goal), plan=outcome.plan.describe(), reached=outcome.reached, why=outcome.why)
    write_whole(folder / "search.md", f"{to_table(outcome, 'github')}\n\n{text}\n")
    picture = folder / "search.png"
    if outcome.rows:
        draw(outcome, goal, picture)
    else:
        picture.unlink(missing_ok=True)  # an earlier search's
    kept = [
        override for override in overrides if not override.startswith(("plan.", "plan=", "search.", "train.output_dir"))
    ]
    name = f"The plan of --search {goal} for {os.path.basename(config_file)}."
    write_plan(folder / "plan.py", outcome.plan, config_file, kept, [str(name) for name in cfg], name)
    others = ", .md and .png" if outcome.rows else " and .md"
    _print_line(f"written to {measured.path}{others}; the plan is {folder / 'plan.py'}, for --config-file")
    return outcome


def search_settings(cfg: DictConfig, model: nn.Module, records: list[dict[str, Any]]) -> dict[str, str]:
    """What the figures of a search on the images of these records depend on."""
    loader = to_plain(cfg.dataloader.test)
    for key in ("dataset", "num_workers"):  # the records are known, and images are read before the clock starts
        loader.pop(key, None)
    return {
        "weights": digest_weights([model]),
        "model": digest(to_plain(cfg.model)),
        "data": digest_data(records),
        "loader": digest([loader, cfg.dataloader.image_scaling]),
        "evaluator": digest(to_plain(cfg.dataloader.get("evaluator"))),
        "dtype": cfg.evaluation.dtype,
        "environment": digest(describe_environment(cfg.train.device)),
        "code": digest_code([model]),
    }


def _label_evaluators(cfg: DictConfig, model: nn.Module) -> Callable[[str], DatasetEvaluator] | None:
    """The function that builds evaluators of the search's labels; None, with a warning, where there are none."""
    names = cfg.search.dataset or cfg.dataloader.train.dataset.get("names")
    problem = "the config has no evaluator of them"
    if cfg.dataloader.get("evaluator") and isinstance(names, str):
        of_search = copy.deepcopy(cfg)
        of_search.dataloader.test.dataset.names = names
        try:
            open_test(of_search, model, 1)
            return partial(build_evaluator, of_search)
        except InputError as error:
            problem = str(error)
    warn(f"plans are ranked by agreement alone, without labels: {problem}")
    return None


class Inputs:
    """The model's inputs for some records, read again on each iteration."""

    def __init__(self, records: list[dict[str, Any]], load: Callable[[list[dict[str, Any]]], Any]):
        self.records, self.load = records, load

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return iter(self.load(self.records))


def _print_line(line: str) -> None:
    print(line, flush=True)
