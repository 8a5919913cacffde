import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from hourglass import InputError
from hourglass.checkpoint import load_checkpoint


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
