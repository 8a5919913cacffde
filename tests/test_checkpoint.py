import argparse
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hourglass import InputError
from hourglass.checkpoint import load_checkpoint, read_checkpoint
from hourglass.encoders import SimpleFeaturePyramid, ViT


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state, "iteration": 7}])
def test_torch_checkpoints(tmp_path, dtype, wrap):
    source, target = model(), model()
    torch.save(wrap({name: tensor.to(dtype) for name, tensor in source.state_dict().items()}), tmp_path / "a.pth")
    load_checkpoint(target, str(tmp_path / "a.pth"))
    for name, tensor in target.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, source.state_dict()[name].to(dtype).float())


def test_pickles_of_detectron2s_model_zoo(tmp_path):
    source, target = model(), model()
    state = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": state, "__author__": "third_party"}))
    load_checkpoint(target, str(tmp_path / "a.pkl"))
    assert torch.equal(target[1].weight, source[1].weight)


def save(tmp_path, **changes):
    state = {**model().state_dict(), **changes}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    torch.save(state, tmp_path / "a.pth")
    return str(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"1.weight": None}, r"of its 4 parameters and buffers 1 missing \(1.weight\)"),
        ({"1.weight": torch.zeros(5, 4)}, r"1 of another shape \(1.weight is \(5, 4\), not \(2, 4\)\)"),
    ],
)
def test_a_checkpoint_that_does_not_fill_the_model_is_refused(tmp_path, changes, message):
    path = save(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as refusal:
        load_checkpoint(model(), path)
    assert "\n" not in str(refusal.value) and "train.allow_partial_checkpoint=true" in str(refusal.value)
    target = model()
    load_checkpoint(target, path, allow_partial=True)
    assert torch.equal(target[0].weight, torch.load(path)["0.weight"])


def test_entries_without_a_place_are_only_warned_of(tmp_path, caplog):
    load_checkpoint(model(), save(tmp_path, other=torch.zeros(1)))
    assert "1 entries that the model has no place for (other)" in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", pickle.dumps([1, 2])])
@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_what_cannot_be_read_is_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} cannot be read") as refusal:
        load_checkpoint(model(), str(tmp_path / name))
    assert "\n" not in str(refusal.value)


class Renamed(nn.Module):
    """A model whose checkpoints may have another name for its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def rename_weights(self, weights):
        assert all(isinstance(weight, torch.Tensor) for weight in weights.values())
        return {name.replace("kernel", "weight"): weight for name, weight in weights.items()}


@pytest.mark.parametrize("name", ["kernel", "weight"])
def test_a_model_renames_what_is_loaded(tmp_path, name):
    weight = torch.arange(3.0)
    torch.save({"model": {name: weight}}, tmp_path / "a.pth")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {name: weight.numpy()}, "__author__": "third_party"}))
    for file in ("a.pth", "a.pkl"):
        target = Renamed()
        load_checkpoint(target, str(tmp_path / file))
        assert torch.equal(target.weight, weight)


def write_folder(folder: Path, state: dict, kind: str, parts: bool) -> None:
    """As Hugging Face's save_pretrained."""
    if kind == "safetensors":
        save, name = pytest.importorskip("safetensors.torch").save_file, "model.safetensors"
    else:
        save, name = torch.save, "pytorch_model.bin"
    if not parts:
        save(state, folder / name)
        return
    for i, (key, tensor) in enumerate(state.items()):
        save({key: tensor}, folder / f"part{i}.{kind}")
    weight_map = {key: f"part{i}.{kind}" for i, key in enumerate(state)}
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("parts", [False, True])
def test_folders_of_hugging_face(tmp_path, kind, parts):
    source, target = model(), model()
    write_folder(tmp_path, source.state_dict(), kind, parts)
    load_checkpoint(target, str(tmp_path))
    assert torch.equal(target[1].weight, source[1].weight)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_on_the_hugging_face_hub(tmp_path, monkeypatch, kind):
    hub = pytest.importorskip("huggingface_hub")
    source, target = model(), model()

    def snapshot_download(name, allow_patterns):
        assert name == "owner/name"
        wanted = "safetensors" in allow_patterns[0]
        if wanted == (kind == "safetensors"):
            write_folder(tmp_path, source.state_dict(), kind, parts=False)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    load_checkpoint(target, "hf://owner/name")
    assert torch.equal(target[1].weight, source[1].weight)


def test_a_name_that_the_hub_refuses():
    pytest.importorskip("huggingface_hub")
    with pytest.raises(InputError, match="hf://no/such/name cannot be read") as refusal:
        load_checkpoint(model(), "hf://no/such/name")
    assert "\n" not in str(refusal.value)


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read .*neither model.safetensors nor pytorch_model.bin"):
        load_checkpoint(model(), str(tmp_path))


def test_folders_that_do_not_fit_are_refused(tmp_path):
    write_folder(tmp_path, {**model().state_dict(), "1.weight": torch.zeros(5, 4)}, "bin", parts=False)
    with pytest.raises(InputError, match=r"1 of another shape \(1.weight is \(5, 4\), not \(2, 4\)\)"):
        load_checkpoint(model(), str(tmp_path))


class Command:
    """Unpickled, it runs a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.pyth", "folder/pytorch_model.bin", "parts/part0.bin"])
def test_a_checkpoint_that_carries_a_command_is_refused_and_runs_nothing(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    content = {"model": model().state_dict(), "__author__": Command(f"touch {tmp_path}/was_run")}
    path.write_bytes(pickle.dumps(content)) if path.suffix == ".pkl" else torch.save(content, path)
    if path.parent.name == "parts":
        index = {"weight_map": {"0.weight": path.name}}
        (path.parent / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as refusal:
        load_checkpoint(model(), str(path if path.parent == tmp_path else path.parent))
    assert f"it holds {os.system.__module__}.system: a file of weights must hold only" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "was_run").exists()


def test_an_index_names_files_of_its_folder(tmp_path):
    torch.save(model().state_dict(), tmp_path / "elsewhere.bin")
    (tmp_path / "folder").mkdir()
    index = {"weight_map": {"0.weight": "../elsewhere.bin"}}
    (tmp_path / "folder" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="its index names ../elsewhere.bin, which is not a file in it"):
        load_checkpoint(model(), str(tmp_path / "folder"))


def test_a_config_in_a_checkpoint_is_named_and_the_way_to_leave_it_out(tmp_path):
    torch.save({"model": model().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="it holds argparse.Namespace: .*Save the weights alone") as refusal:
        load_checkpoint(model(), str(tmp_path / "a.pth"))
    assert "weights_only" not in str(refusal.value)


def test_pickles_of_caffe2_and_detectron(tmp_path):
    """Names without dots are Caffe2's; classes move from the background's first place to its last."""
    blobs = {
        "cls_score_w": np.arange(6, dtype=np.float32).reshape(3, 2),
        "cls_score_b": np.array([0.0, 1.0, 2.0], np.float32),
        "cls_score_w_momentum": np.zeros((3, 2), np.float32),
    }
    target = nn.Module()
    target.predictor = nn.Module()
    target.predictor.cls_score = nn.Linear(2, 3)
    for name, content in (("a.pkl", {"blobs": blobs, "cfg": "MODEL: {}"}), ("b.pkl", blobs)):
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
        nn.init.zeros_(target.predictor.cls_score.weight)
        load_checkpoint(target, str(tmp_path / name))
        assert target.predictor.cls_score.bias.tolist() == [1, 2, 0]
        assert target.predictor.cls_score.weight.tolist() == [[2, 3], [4, 5], [0, 1]]


def test_checkpoints_of_pycls(tmp_path):
    source, target = model(), nn.Module()
    target.backbone = model()
    torch.save({"model_state": {**source.state_dict(), "2.num_batches_tracked": torch.zeros(1)}}, tmp_path / "a.pyth")
    load_checkpoint(target, str(tmp_path / "a.pyth"))
    assert torch.equal(target.backbone[1].weight, source[1].weight)


def test_arrays_of_a_foreign_byte_order_and_safetensors(tmp_path):
    source, target = model(), model()
    state = {name: tensor.numpy().astype(">f4") for name, tensor in source.state_dict().items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": state, "__author__": "third_party"}))
    load_checkpoint(target, str(tmp_path / "a.pkl"))
    assert torch.equal(target[1].weight, source[1].weight)
    pytest.importorskip("safetensors.torch").save_file(source.state_dict(), tmp_path / "a.safetensors")
    target = model()
    load_checkpoint(target, str(tmp_path / "a.safetensors"))
    assert torch.equal(target[1].weight, source[1].weight)


def renamed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "prefix", ["model.", "_orig_mod.", "module.", "state_dict.", "module.model.", "model._orig_mod.", "detector."]
)
def test_a_prefix_before_all_names_is_left_out(tmp_path, caplog, prefix):
    source, target = model(), model()
    torch.save({"model": {**renamed(source.state_dict(), prefix), "loss.weight": torch.ones(1)}}, tmp_path / "a.pth")
    load_checkpoint(target, str(tmp_path / "a.pth"))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())
    # torch.compile's is taken out wherever it is.
    assert all(repr(f"{part}.") in caplog.text or repr(prefix) in caplog.text for part in prefix.split(".")[:-1])


def test_wrappers_of_parts_are_left_out(tmp_path):
    source, target = nn.Module(), nn.Module()
    source.backbone, target.backbone = model(), model()
    state = renamed(source.backbone.state_dict(), "backbone._orig_mod._checkpoint_wrapped_module.")
    torch.save(state, tmp_path / "a.pth")
    load_checkpoint(target, str(tmp_path / "a.pth"))
    assert torch.equal(target.backbone[1].weight, source.backbone[1].weight)


def test_a_prefix_is_left_out_before_a_model_renames(tmp_path):
    torch.save({"state_dict": {"module.kernel": torch.arange(3.0)}}, tmp_path / "a.pth")
    target = Renamed()
    load_checkpoint(target, str(tmp_path / "a.pth"))
    assert torch.equal(target.weight, torch.arange(3.0))


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"model_ema": state, "iteration": 1},
        lambda state: {"ema": {"model": state}},
        lambda state: {"model": state, "model_ema": renamed(state, "x"), "decay": torch.tensor(0.9)},
        lambda state: {"state_dict": renamed(state, "module."), "meta": {"epoch": 1}},
    ],
)
def test_weights_under_a_name(tmp_path, nest):
    source, target = model(), model()
    torch.save(nest(source.state_dict()), tmp_path / "a.pth")
    load_checkpoint(target, str(tmp_path / "a.pth"))
    assert torch.equal(target[1].weight, source[1].weight)


def test_of_two_sets_of_weights_the_models_is_read_and_the_other_named(tmp_path, caplog):
    torch.save({"model": model().state_dict(), "model_ema": model().state_dict()}, tmp_path / "a.pth")
    load_checkpoint(model(), str(tmp_path / "a.pth"))
    assert "the weights under 'model' are read, those under 'model_ema' are not" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        ({"student": {"0.weight": torch.ones(1)}, "teacher": {"0.weight": torch.ones(1)}}, "'student', 'teacher'"),
        ({"iteration": 3, "meta": {}}, "it holds no tensors, only 'iteration', 'meta'"),
        ([torch.ones(1)], "it holds a list, not tensors by their names"),
        ({}, "it holds no tensors, only nothing"),
    ],
)
def test_checkpoints_without_one_set_of_weights_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=message):
        load_checkpoint(model(), str(tmp_path / "a.pth"))


def test_a_model_that_is_there_twice_is_refused(tmp_path):
    state = {**renamed(model().state_dict(), "student."), **renamed(model().state_dict(), "teacher.")}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match="a.pth holds the model's weights under 'student.' and under 'teacher.'"):
        load_checkpoint(model(), str(tmp_path / "a.pth"))


def test_a_prefix_of_a_part_is_named(tmp_path):
    state = renamed(model().state_dict(), "detector.")
    del state["detector.0.bias"]
    torch.save(state, tmp_path / "a.pth")
    for partial in (False, True):
        with pytest.raises(InputError, match="3 of its names are the model's behind 'detector.'"):
            load_checkpoint(model(), str(tmp_path / "a.pth"), allow_partial=partial)


def test_entries_that_are_no_tensors_fill_nothing(tmp_path, caplog):
    load_checkpoint(model(), save(tmp_path, extra_state="text"))
    assert "1 entries that are no tensors (extra_state)" in caplog.text
    torch.save({**model().state_dict(), "1.bias": 3}, tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"1 missing \(1.bias\)"):
        load_checkpoint(model(), str(tmp_path / "b.pth"))


def detector() -> nn.Module:
    target = nn.Module()
    vit = ViT(img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2, pretrain_img_size=32)
    target.backbone = SimpleFeaturePyramid(vit, "last_feat", out_channels=4, scale_factors=(1.0,))
    return target


@pytest.fixture
def pretrained(tmp_path):
    """As MAE's: an encoder's names alone, with its class token's position and what only pretraining has."""
    state = OrderedDict(detector().backbone.net.state_dict())
    state.update({"cls_token": torch.zeros(1, 1, 8), "mask_token": torch.zeros(1, 1, 8), "norm.weight": torch.zeros(8)})
    torch.save({"model": state}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth", state


def test_pretrained_weights_of_an_encoder_fill_it_by_their_ends(pretrained, caplog):
    path, state = pretrained
    target = detector()
    load_checkpoint(target, f"{path}?matching_heuristics=True", allow_partial=True)
    filled = target.backbone.net.state_dict()
    assert len(filled) > 20 and all(torch.equal(tensor, state[name]) for name, tensor in filled.items())
    count = len(target.state_dict())
    assert f"fills {len(filled)} of the model's {count} parameters and buffers" in caplog.text
    with pytest.raises(InputError, match="does not fit the model, .* missing .*backbone.simfp"):
        load_checkpoint(detector(), f"{path}?matching_heuristics=True")


def test_without_the_query_what_fills_nothing_is_refused_and_the_query_advised(pretrained):
    path, state = pretrained
    for query in ("", "?matching_heuristics=False"):
        with pytest.raises(InputError, match="fills none of the model's parameters") as refusal:
            load_checkpoint(detector(), f"{path}{query}", allow_partial=True)
        assert "names are the model's without 'backbone.net.', add ?matching_heuristics=True" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_buffers_alone_are_no_weights(tmp_path):
    norm = nn.BatchNorm1d(3)
    torch.save({"running_mean": torch.ones(3), "running_var": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="fills none of the model's parameters"):
        load_checkpoint(norm, str(tmp_path / "a.pth"), allow_partial=True)


def test_queries_that_are_none_of_detectron2s(tmp_path):
    path = save(tmp_path)
    with pytest.raises(InputError, match="matching_heuristics must be True or False, got 'yes'"):
        load_checkpoint(model(), f"{path}?matching_heuristics=yes")
    with pytest.raises(InputError, match="a.pth.map=cpu cannot be read"):
        load_checkpoint(model(), f"{path}?map=cpu")
    os.rename(path, tmp_path / "what?.pth")
    load_checkpoint(model(), str(tmp_path / "what?.pth"))


def test_addresses_are_resolved_as_detectron2_does(tmp_path, monkeypatch):
    from detectron2.utils.file_io import PathManager
    from iopath.common.file_io import PathHandler

    class Handler(PathHandler):
        def _get_supported_prefixes(self):
            return ["checkpoints://"]

        def _get_local_path(self, path, force=False, **kwargs):
            return str(tmp_path / path.removeprefix("checkpoints://"))

    PathManager.register_handler(Handler(), allow_override=True)
    source = nn.Module()
    source.backbone = model()
    torch.save(model().state_dict(), tmp_path / "a.pth")
    load_checkpoint(source, "checkpoints://a.pth?matching_heuristics=True")
    assert torch.equal(source.backbone[1].weight, torch.load(tmp_path / "a.pth", weights_only=True)["1.weight"])


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    load_checkpoint(model(), "~/a.pth")


def test_what_detectron2_writes_is_read_whole(tmp_path):
    """Its optimizer's state and the number of its iteration among it."""
    source = model()
    optimizer = torch.optim.AdamW(source.parameters(), lr=0.1)
    source(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    trainer = {"iteration": 4, "optimizer": optimizer.state_dict(), "hooks": {"LRScheduler": {"last_epoch": 5}}}
    torch.save({"model": source.state_dict(), "trainer": trainer, "iteration": 4}, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")
    assert set(read) == {"model", "trainer", "iteration"} and read["trainer"]["hooks"] == trainer["hooks"]
    assert torch.equal(
        read["trainer"]["optimizer"]["state"][0]["exp_avg"], optimizer.state[source[0].weight]["exp_avg"]
    )


def test_tensors_without_names_fill_nothing(tmp_path):
    torch.save({0: torch.zeros(4, 3), 1: torch.zeros(4)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="of its 4 parameters and buffers 4 missing"):
        load_checkpoint(model(), str(tmp_path / "a.pth"))
