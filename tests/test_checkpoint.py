import pickle

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
