import pickle

import pytest
import torch

from hourglass import InputError, TokenSelection
from hourglass.reduction import collect_losses
from hourglass.reduction.selection import Selector


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def selection(target=0.5, blocks=2, **kwargs) -> TokenSelection:
    """Selectors that keep about half of random tokens."""
    torch.manual_seed(0)
    reducer = TokenSelection("random", target, **kwargs)
    reducer.bind([8] * blocks)
    with torch.no_grad():
        for parameter in reducer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return reducer.eval()


def log_odds(selector: Selector, token: torch.Tensor) -> float:
    """The MLP of the paper, by its formula."""
    norm, first, _, second, _ = (layer.double() for layer in selector)
    x = token.double()
    x = (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt() * norm.weight + norm.bias
    x = first.weight @ x + first.bias
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    keep, skip = second.weight @ x + second.bias
    return float((keep - skip).detach())


def test_selection_equals_the_reference():
    reducer, tokens = selection(), draw(1, 5, 7, 8)
    for block in range(2):
        reduction = reducer(tokens, block)
        selector = _double(reducer.blocks[block])
        odds = [log_odds(selector, token) for token in tokens.view(35, 8)]
        kept = [i for i in range(35) if odds[i] >= 0]
        assert 0 < len(kept) < 35
        assert torch.equal(reduction.tokens[0, 0], tokens.view(35, 8)[kept])
        assert reduction.positions[0, 0].tolist() == [[i // 7, i % 7] for i in kept]
        restored = reduction.restore(reduction.tokens + 1).view(35, 8)
        for i in range(35):
            assert torch.equal(restored[i], tokens.view(35, 8)[i] + (1 if i in kept else 0))


def _double(selector: Selector) -> Selector:
    copied = Selector(8)
    copied.load_state_dict(selector.state_dict())
    return copied.double()


def test_an_image_may_keep_everything_or_nothing():
    reducer, tokens = selection(), draw(1, 3, 4, 8)
    for bias, count in ((1e4, 12), (-1e4, 0)):
        with torch.no_grad():
            reducer.blocks[0][3].bias.copy_(torch.tensor([bias, 0.0]))
        reduction = reducer(tokens, 0)
        assert reduction.tokens.shape == (1, 1, count, 8)
        assert torch.equal(reduction.restore(reduction.tokens), tokens)


def test_the_mask_is_drawn_with_the_probability_of_keeping_and_has_its_gradient():
    reducer = selection()
    probabilities = reducer.blocks[0](draw(50, 8))[:, 0].exp().detach()
    likeliest = (probabilities - 0.4).abs().argmin()
    tokens, probability = draw(50, 8)[likeliest].expand(1, 100, 100, 8), probabilities[likeliest]
    assert 0.2 < probability < 0.8
    mask = reducer.mask(tokens, 0)
    assert mask.shape == (1, 100, 100, 1) and set(mask.detach().round(decimals=6).unique().tolist()) == {0, 1}
    torch.testing.assert_close(mask.mean().detach(), probability, atol=0.02, rtol=0)
    mask.sum().backward()
    assert all(parameter.grad.ne(0).any() for parameter in reducer.blocks[0].parameters())


def test_the_loss_is_the_ratio_loss():
    reducer, tokens = selection(target=[0.7, 0.49], loss_weight=3.0), draw(2, 6, 6, 8)
    with collect_losses() as collected:
        shares = [reducer.mask(tokens, block).mean() for block in range(2)]
    expected = 3.0 * ((shares[0] - 0.7) ** 2 + (shares[1] - 0.49) ** 2) / 2
    torch.testing.assert_close(collected.losses["loss_selection"], expected)
    assert set(collected.figures) == {"kept/0", "kept/1"}
    reducer.mask(tokens, 0)  # outside, nothing is collected
    assert len(collected.losses) == 1


@pytest.mark.parametrize("target", [0.25, 0.6, 1.0])
def test_inference_keeps_the_share_that_was_trained_for(target):
    """Whatever the probabilities are, once the running mean has settled."""
    reducer, tokens = selection(target=target), draw(1, 40, 40, 8)
    for _ in range(200):
        reducer.mask(tokens, 0)
    kept = reducer(tokens, 0).tokens.shape[2]
    assert abs(kept / 1600 - target) < 0.01
    # A map of other tokens keeps another number: the share is not forced on an image.
    assert reducer(3 + tokens.flip(3) * torch.linspace(0, 1, 40)[:, None], 0).tokens.shape[2] != kept


def test_selectors_come_back_from_their_own_file_and_from_a_models_checkpoint(tmp_path):
    reducer, tokens = selection(), draw(1, 5, 7, 8)
    reducer.mask(tokens, 1)
    expected = reducer(tokens, 1).tokens
    torch.save(reducer.state_dict(), tmp_path / "reducer.pth")
    of_model = {f"backbone.net.reducer.{name}": value for name, value in reducer.state_dict().items()}
    torch.save(
        {"model": {"backbone.net.pos_embed": torch.zeros(3), **of_model}, "iteration": 5}, tmp_path / "model.pth"
    )
    for name in ("reducer.pth", "model.pth"):
        again = TokenSelection(str(tmp_path / name))
        again.bind([8, 8])
        assert torch.equal(again(tokens, 1).tokens, expected)
        assert again.thresholds[1] == reducer.thresholds[1] != 0


def test_refusals(tmp_path):
    torch.save({"some": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_text("no checkpoint")
    torch.save(selection().state_dict(), tmp_path / "reducer.pth")
    trained, shares = tmp_path / "reducer.pth", "target must be a share of tokens in "
    for make, message in (
        (lambda: TokenSelection(), 'must be a file of trained selectors, or "random" to train new ones, got None'),
        (lambda: TokenSelection("missing.pth"), "selectors missing.pth cannot be read"),
        (lambda: TokenSelection(tmp_path / "broken.pth"), "cannot be read"),
        (lambda: TokenSelection(tmp_path / "other.pth"), "holds no selectors"),
        (lambda: TokenSelection("random", 0), shares + r"\(0, 1\], or one for each block, got 0"),
        (lambda: TokenSelection("random", [0.5, 2]), r"got \[0.5, 2\]"),
        (lambda: TokenSelection("random", "half"), "got 'half'"),
        (lambda: TokenSelection("random", loss_weight=0), "loss_weight must be a number over 0, got 0"),
        (lambda: TokenSelection("random", temperature="warm"), "temperature must be a number over 0, got 'warm'"),
        (lambda: TokenSelection("random", [0.5, 0.5]).bind([8, 8, 8]), "target must be one share or 3"),
        (lambda: TokenSelection(trained).bind([8]), "are for 2 blocks of 8 channels, the plan has 1 of 8"),
        (lambda: TokenSelection(trained).bind([8, 16]), "the plan has 2 of 8, 16"),
    ):
        with pytest.raises(InputError, match=message) as refusal:
            make()
        assert "\n" not in str(refusal.value)


class Malicious:
    """Pickled as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["selectors.pth", "selectors.pkl", "selectors.bin"])
@pytest.mark.parametrize("make", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_selectors_are_data_and_run_nothing(tmp_path, name, make):
    marker, path = tmp_path / "ran", tmp_path / name
    make({"thresholds": torch.zeros(1), "blocks.0.0.weight": Malicious(marker)}, path)
    with pytest.raises(InputError) as refusal:
        TokenSelection(str(path))
    assert not marker.exists() and "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value) and "open" in str(refusal.value)


@pytest.mark.parametrize("content", [{}, {"thresholds": 3}, [1], {"model": 3}, {"thresholds": torch.zeros(2)}])
def test_files_that_hold_no_selectors_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match="selectors .*other.pth"):
        TokenSelection(str(tmp_path / "other.pth"))
