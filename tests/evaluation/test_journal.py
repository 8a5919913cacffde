"""A comparison that is killed goes on from what it has finished, with the figures of one that was not."""

import errno
import json
import logging
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from torch import nn

from hourglass import InputError, Plan, TokenClustering, expedite
from hourglass.evaluation import InstanceEvaluator, Subject, compare, journal, to_json, write_report
from hourglass.evaluation.journal import (
    Journal,
    can_dump,
    digest,
    digest_code,
    digest_data,
    digest_weights,
    read_records,
    to_plain,
)
from tests.detections import dataset
from tests.detectors import Detector, tiny_vit

IMAGES = 6
ANNOTATIONS, DETECTIONS = dataset(seed=3, images=IMAGES, digits=6)
NAME = "journal_test"
PLANS = {"unmodified": Plan(), "expedited": Plan(TokenClustering((5, 4)), 1)}


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "annotations.json"
    path.write_text(json.dumps(ANNOTATIONS))
    register_coco_instances(NAME, {}, str(path), str(path.parent))
    DatasetCatalog.get(NAME)  # reads the categories
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


class Finder(Detector):
    """Finds the drawn detections of an image, each model with boxes of its own."""

    def __init__(self, encoder: nn.Module, seed: int):
        super().__init__(encoder)
        self.seed = seed
        self.ran: list[int] = []

    def forward(self, inputs):
        super().forward(inputs)
        return [self.find(record["image_id"]) for record in inputs]

    def find(self, image_id: int) -> dict:
        self.ran.append(image_id)
        detections = [detection for detection in DETECTIONS if detection["image_id"] == image_id]
        shaken = np.random.default_rng((self.seed, image_id)).normal(0, 1.5, (len(detections), 4))
        instances = Instances((100, 100))
        xywh = torch.tensor([detection["bbox"] for detection in detections]).reshape(-1, 4)
        xywh = xywh + torch.from_numpy(shaken).float()
        instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1))
        instances.scores = torch.tensor([detection["score"] for detection in detections])
        instances.pred_classes = torch.tensor([detection["category_id"] - 1 for detection in detections])
        return {"instances": instances}


def make_subjects(evaluator_class=InstanceEvaluator, **options) -> dict[str, Subject]:
    torch.manual_seed(0)
    encoder = tiny_vit()
    models = {name: Finder(expedite(encoder, plan), seed) for seed, (name, plan) in enumerate(PLANS.items())}
    return {
        name: Subject(model, model.encoder, evaluator_class(NAME, tasks=("bbox",), use_fast_impl=False, **options))
        for name, model in models.items()
    }


def run(folder: Path, resume: bool = False, evaluator_class=InstanceEvaluator, size: int = 1) -> tuple[dict, list[int]]:
    """The report, and the images that were run for it."""
    subjects = make_subjects(evaluator_class)
    kept = Journal(folder, {"weights": digest_weights(subject.model for subject in subjects.values())}, resume)
    images = [
        {"image": torch.full((3, 64, 64), i / IMAGES), "image_id": i, "height": 100, "width": 100}
        for i in range(1, IMAGES + 1)
        if i not in kept.done
    ]
    batches = [images[i : i + size] for i in range(0, len(images), size)]
    comparison = compare(subjects, batches, warmup=0, journal=kept)
    document = to_json(comparison, dataset=NAME, device="cpu", dtype="float32", plan=PLANS["expedited"].describe())
    write_report(document, folder)
    kept.remove()
    return document, subjects["unmodified"].model.ran


def figures(document: dict) -> dict:
    """What does not depend on the time."""
    models = document["models"]
    return {
        "retention": document["retention"],
        "images": document["images"],
        **{name: [model[key] for key in ("accuracy", "encoder_gflops", "tokens")] for name, model in models.items()},
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    document, ran = run(tmp_path_factory.mktemp("whole"))
    accuracy = {name: model["accuracy"]["bbox"]["AP"] for name, model in document["models"].items()}
    assert 3 < accuracy["expedited"] != accuracy["unmodified"] > 3 and ran == list(range(1, IMAGES + 1))
    return figures(document)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(patch: pytest.MonkeyPatch, owner, name: str, call: int = 1, after: bool = False) -> None:
    """Kill the process when a function is called for the so-many-th time, or after that call."""
    function, calls = getattr(owner, name), []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            kill()
        result = function(*args, **kwargs)
        if len(calls) == call:
            kill()
        return result

    patch.setattr(owner, name, killed)


class Torn:
    """A file that takes a part of what is written, then the process is killed, or the disk is full."""

    def __init__(self, file, whole_writes: int, share: float = 0.5, ending=kill):
        self.file, self.whole, self.share, self.ending = file, whole_writes, share, ending

    def write(self, line) -> int:
        if self.whole == 0:
            self.file.write(line[: int(len(line) * self.share)])
            self.ending()
        self.whole -= 1
        return self.file.write(line)

    def close(self) -> None:
        self.file.close()


def tear(patch: pytest.MonkeyPatch, **options) -> None:
    opening = Journal._open

    def opened(self):
        opening(self)
        self._file = Torn(self._file, **options)

    patch.setattr(Journal, "_open", opened)


def remove_half(patch: pytest.MonkeyPatch) -> None:
    def removed(self):
        self._path.unlink()
        kill()

    patch.setattr(Journal, "remove", removed)


# What is killed -> how, and how many images are finished then.
MOMENTS = {
    "nothing is written": (lambda patch: kill_at(patch, Journal, "_open"), 0),
    "the settings are written": (lambda patch: kill_at(patch, journal, "write_whole", after=True), 0),
    "the first model has run": (lambda patch: kill_at(patch, InstanceEvaluator, "process"), 0),
    "one model has run, the other has not": (lambda patch: kill_at(patch, InstanceEvaluator, "process", 6), 2),
    "a record is begun": (lambda patch: tear(patch, whole_writes=2, share=0.01), 2),
    "a record is half written": (lambda patch: tear(patch, whole_writes=3), 3),
    "a record lacks its last byte": (lambda patch: tear(patch, whole_writes=4, share=0.9999), 4),
    "a record is written": (lambda patch: kill_at(patch, Journal, "append", 5, after=True), 5),
    "all images are finished": (lambda patch: kill_at(patch, InstanceEvaluator, "evaluate"), 6),
    "the second model is evaluated": (lambda patch: kill_at(patch, InstanceEvaluator, "evaluate", 2, after=True), 6),
    # The settings are the first file that is moved to its place.
    "the report is half written": (lambda patch: kill_at(patch, os, "replace", 3), 6),
    "the journal is half removed": (remove_half, 0),
}


def run_and_be_killed(folder: Path, interruption) -> None:
    """In a child process, which must have been killed."""
    child = os.fork()
    if child == 0:
        try:
            # What a fork leaves of the pools of threads cannot be used.
            torch.set_num_threads(1)
            with pytest.MonkeyPatch.context() as patch:
                interruption(patch)
                run(folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed by POSIX signals")
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_goes_on(tmp_path, moment, uninterrupted):
    interruption, finished = MOMENTS[moment]
    run_and_be_killed(tmp_path, interruption)
    for path in tmp_path.glob("comparison.*"):  # whole, where it is there
        assert path.suffix != ".json" or figures(json.loads(path.read_text())) == uninterrupted
    document, ran = run(tmp_path, resume=True)
    assert ran == list(range(finished + 1, IMAGES + 1))
    assert figures(document) == uninterrupted
    assert figures(json.loads((tmp_path / "comparison.json").read_text())) == uninterrupted
    assert not (tmp_path / "journal").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed by POSIX signals")
def test_killed_again_and_again_it_comes_to_the_end(tmp_path, uninterrupted):
    run_and_be_killed(tmp_path, lambda patch: kill_at(patch, Journal, "append", 2, after=True))
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                with pytest.MonkeyPatch.context() as patch:
                    tear(patch, whole_writes=1)
                    run(tmp_path, resume=True)
            finally:
                os._exit(1)
        os.waitpid(child, 0)
    document, ran = run(tmp_path, resume=True)
    assert ran == [5, 6] and figures(document) == uninterrupted


@pytest.mark.parametrize("evaluator_class", [InstanceEvaluator, COCOEvaluator])
def test_batches_go_on_whole(tmp_path, uninterrupted, evaluator_class):
    """A batch is finished or not, the last one ragged: its figures are those of one image at a time."""
    path = interrupted(tmp_path, 1, evaluator_class=evaluator_class, size=4)
    assert [record["image_ids"] for record, _ in read_records(path)] == [[1, 2, 3, 4]]
    document, ran = run(tmp_path, resume=True, evaluator_class=evaluator_class, size=4)
    assert ran == [5, 6] and document["batch_size"] == 4 and document["images"] == 6
    models = document["models"]
    assert {name: model["accuracy"]["bbox"]["AP"] for name, model in models.items()} == {
        name: uninterrupted[name][0]["bbox"]["AP"] for name in models
    }


def interrupted(folder: Path, finished: int, **options) -> Path:
    """The file of a run that was stopped after so many images."""
    with pytest.MonkeyPatch.context() as patch:
        appending, records = Journal.append, []

        def append(self, record):
            if len(records) == finished:
                raise KeyboardInterrupt
            records.append(record)
            appending(self, record)

        patch.setattr(Journal, "append", append)
        with pytest.raises(KeyboardInterrupt):
            run(folder, **options)
    return next(folder.glob("journal/*/*.msgpack"))


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_torn_last_record_is_dropped(tmp_path, uninterrupted, cut):
    path = interrupted(tmp_path, 4)
    path.write_bytes(path.read_bytes()[:-cut])
    document, ran = run(tmp_path, resume=True)
    assert ran == [4, 5, 6] and figures(document) == uninterrupted


def test_a_record_that_has_changed_is_dropped_with_those_behind_it(tmp_path, uninterrupted):
    path = interrupted(tmp_path, 4)
    ends = [end for _, end in read_records(path)]
    changed = bytearray(path.read_bytes())
    changed[(ends[1] + ends[2]) // 2] ^= 1
    path.write_bytes(changed)
    document, ran = run(tmp_path, resume=True)
    assert ran == [3, 4, 5, 6] and figures(document) == uninterrupted


@pytest.mark.parametrize("junk", [b"\0" * 100, b"\xff" * 100, b"0" * 7])
def test_what_a_disk_leaves_behind_the_last_record_is_dropped(tmp_path, uninterrupted, junk):
    path = interrupted(tmp_path, 4)
    path.write_bytes(path.read_bytes() + junk)
    document, ran = run(tmp_path, resume=True)
    assert ran == [5, 6] and figures(document) == uninterrupted


def test_an_interruption_says_how_to_go_on(tmp_path, uninterrupted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InstanceEvaluator, "process", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt, match="0 finished images are kept in .*journal, --resume goes on"):
            run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, uninterrupted):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        tear(patch, whole_writes=3, ending=full)
        with pytest.raises(InputError, match="cannot be written \\(No space left on device\\); 3 finished images"):
            run(tmp_path)
    document, ran = run(tmp_path, resume=True)
    assert ran == [4, 5, 6] and figures(document) == uninterrupted


def test_without_resume_it_starts_anew_and_says_what_it_drops(tmp_path, uninterrupted, caplog):
    interrupted(tmp_path, 4)
    with caplog.at_level(logging.WARNING):
        document, ran = run(tmp_path)
    assert "4 finished images are dropped: --resume would go on" in caplog.text
    assert len(ran) == IMAGES and figures(document) == uninterrupted


def test_other_settings_start_anew_and_say_why(tmp_path, caplog):
    settings = {"weights": "a", "environment": {"threads": 2, "device": "cpu"}, "plans": {"expedited": {"start": 3}}}
    kept = Journal(tmp_path, settings, resume=False)
    with kept:
        kept.append({"image_ids": ["first"]})
    assert Journal(tmp_path, settings, resume=True).done == {"first"} and not caplog.text
    changed = {**settings, "environment": {"threads": 1, "device": "cpu"}, "plans": {"expedited": {"start": 4}}}
    assert not Journal(tmp_path, changed, resume=True).done
    assert "environment.threads (was 2, is 1), plans.expedited.start (was 3, is 4)" in caplog.text
    # The other run is still there.
    assert Journal(tmp_path, settings, resume=True).done == {"first"}
    assert not Journal(tmp_path / "elsewhere", settings, resume=True).done
    assert "elsewhere/journal has no interrupted run" in caplog.text


def test_detectron2s_own_evaluator_goes_on_too(tmp_path, uninterrupted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(COCOEvaluator, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt, match="6 finished images"):
            run(tmp_path, evaluator_class=COCOEvaluator)
    document, ran = run(tmp_path, resume=True, evaluator_class=COCOEvaluator)
    assert not ran
    for name in PLANS:
        assert document["models"][name]["accuracy"] == uninterrupted[name][0]


def test_evaluators_that_tell_nothing_are_known():
    class Own(InstanceEvaluator):
        pass

    class Else(COCOEvaluator):
        """May keep what its parent does not."""

    assert can_dump(InstanceEvaluator(NAME)) and can_dump(Own(NAME)) and can_dump(COCOEvaluator(NAME))
    assert not can_dump(Else(NAME)) and not can_dump(SemSegEvaluator.__new__(SemSegEvaluator))


def test_what_figures_depend_on_changes_the_digests(tmp_path):
    first, second = tiny_vit(), tiny_vit()
    second.load_state_dict(first.state_dict())
    assert digest_weights([first]) == digest_weights([second]) != digest_weights([first, second])
    with torch.no_grad():
        second.blocks[1].mlp.fc1.bias[0] += 1e-3
    assert digest_weights([first]) != digest_weights([second])
    assert digest_weights([first.bfloat16()]) != digest_weights([second])

    image = tmp_path / "1.png"
    image.write_bytes(b"image")
    records = [{"file_name": str(image), "image_id": 1, "annotations": [{"bbox": np.arange(4.0)}]}]
    expected = digest_data(records)
    assert expected == digest_data(records)
    assert digest_data([{**records[0], "annotations": [{"bbox": np.arange(4.0) + 1}]}]) != expected
    image.write_bytes(b"another")
    assert digest_data(records) != expected

    assert digest_code([first]) == digest_code([second])
    assert digest_code([first]) != digest_code([Finder(first, 0)])  # from this file too


def test_configs_as_plain_values():
    node = OmegaConf.create({"a": {"names": ["x"], "same": "${b}"}, "b": 2}, flags={"allow_objects": True})
    node.call = LazyCall(time.sleep)(seconds=1)
    plain = to_plain(node)
    assert plain == {"a": {"names": ["x"], "same": 2}, "b": 2, "call": {"_target_": "time.sleep", "seconds": 1}}
    # A part that refers to the rest, and objects, which have no address in them.
    assert to_plain(node.a) == {"names": ["x"], "same": 2}
    assert digest(to_plain({"x": Plan(start=1, reducer=None)})) == digest(to_plain({"x": Plan(start=1, reducer=None)}))
    assert to_plain(partial(time.sleep, seconds=1)) == ["time.sleep", [], {"seconds": 1}]


def test_several_evaluators_are_all_restored(tmp_path):
    subjects = make_subjects(max_dets_per_image=50)
    first, second = subjects["unmodified"].evaluator, subjects["expedited"].evaluator
    in_list = {"unmodified": subjects["unmodified"]._replace(evaluator=DatasetEvaluators([first, second]))}
    for evaluator in (first, second):
        evaluator.reset()
    kept = Journal(tmp_path, {}, resume=False)
    with kept:
        prediction = {"image_id": 1, "instances": [{"image_id": 1, "score": 0.1 + 0.2}]}
        models = {"unmodified": {"run": [1.0] * 6, "peak_memory_mb": 1.0, "evaluators": [[prediction, None]]}}
        kept.append({"image_ids": [1], "models": models, "gflops": {"unmodified": 2.0}, "padded": 0})
    from hourglass.evaluation.compare import _read

    finished, gflops = _read(Journal(tmp_path, {}, resume=True), in_list)
    assert first._predictions == [prediction] and second._predictions == [] and gflops == {"unmodified": 2.0}
    assert finished[0].image_ids == [1] and finished[0].models["unmodified"].run.total == 1.0
