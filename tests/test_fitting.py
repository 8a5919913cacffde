"""Calibration: what is fitted, what its file holds, and what it is refused for."""

import copy

import pytest
import torch
from torch import nn

import hourglass
from hourglass import AveragePooling, BipartiteMatching, InputError, LinearBlocks, Plan, TokenClustering, calibrate
from hourglass.encoders.calibration import Calibration
from hourglass.fitting import FOLDS, RIDGES, Moments, Recorder, calibrate_plans, fit
from tests import small_swin as of_swin
from tests import small_vit as of_vit
from tests.models import images

PLAN = Plan(TokenClustering((3, 3)), 1, 4)


class Model(nn.Module):
    """An encoder, and a head that must not run."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.backbone = encoder

    def forward(self, inputs):
        self.backbone(inputs)
        raise AssertionError("calibration needs the encoder's blocks alone")


def error(encoder, plan: Plan, held_out: list[torch.Tensor]) -> float:
    view = hourglass.expedite(encoder, plan)
    with torch.no_grad():
        pairs = [(encoder(image), view(image)) for image in held_out]
    return float(sum((a[name] - b[name]).square().sum() for a, b in pairs for name in a))


def record(block, reducer, tokens: list[torch.Tensor]):
    """The fit of what a reducer makes of a block, and the moments that it saw."""
    recorder = Recorder()
    for i, image_tokens in enumerate(tokens):
        recorder.fold = i % FOLDS
        recorder(0, image_tokens, [block], reducer)
    return fit(recorder.moments[0])


@pytest.mark.parametrize("reducer", [TokenClustering((4, 4)), AveragePooling((4, 4))], ids=["clustering", "pooling"])
def test_blocks_that_are_affine_are_restored_exactly(reducer):
    """y = x A + a. What is missing is d (A - I), to first order what it is of any block."""
    draw = torch.Generator().manual_seed(0)
    matrix, constant = torch.randn(8, 8, generator=draw), torch.randn(8, generator=draw)
    tokens = [torch.randn(1, 16, 16, 8, generator=draw) for _ in range(8)]
    fitted = record(lambda tokens, place: tokens @ matrix + constant, reducer, tokens)
    assert fitted.ridge == RIDGES[0] and fitted.rank == 8
    assert fitted.remaining < 1e-6 < 0.1 < fitted.before
    if fitted.form == "detail":
        torch.testing.assert_close(fitted.tensors["tokens"], matrix - torch.eye(8), atol=2e-3, rtol=0)


def test_a_change_of_few_directions_is_fitted_in_few():
    draw = torch.Generator().manual_seed(0)
    matrix = torch.eye(32) + torch.randn(32, 2, generator=draw) @ torch.randn(2, 32, generator=draw) / 4
    tokens = [torch.randn(1, 16, 16, 32, generator=draw) for _ in range(8)]
    fitted = record(lambda tokens, place: tokens @ matrix, AveragePooling((4, 4)), tokens)
    assert fitted.rank == 2 and fitted.tensors["tokens"].shape == (32, 2) and fitted.remaining < 1e-6


def test_the_error_left_is_that_of_images_that_are_not_seen():
    """What blocks make is noise: a fit must not say that it leaves less than that noise's own variance."""
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randn(1, 8, 8, 32, generator=draw) for _ in range(8)]
    fitted = record(lambda tokens, place: torch.randn(tokens.shape, generator=draw), AveragePooling((4, 4)), tokens)
    assert fitted.remaining > 1
    assert fitted.ridge == RIDGES[-1]


@pytest.mark.parametrize(
    "make, plan, size",
    [
        (of_vit.tiny_vit, PLAN, (64, 64)),
        (of_vit.tiny_vit, Plan(TokenClustering((3, 3)), 1, 4, scope="window"), (64, 64)),
        (of_vit.tiny_vit, Plan(LinearBlocks(), 1, 4), (64, 64)),
        (of_swin.tiny_swin, Plan(AveragePooling(0.5), 1, 7), (128, 192)),  # in three stages
    ],
    ids=["vit", "windows", "affine", "swin"],
)
def test_it_restores_images_better_that_it_has_not_seen(make, plan, size, tmp_path):
    encoder = make()
    before = copy.deepcopy(encoder.state_dict())
    calibration = calibrate(Model(encoder), plan, images(8, size), "smooth ones")
    held_out = images(4, size, first=100)
    calibrated = plan.calibrated(calibration)
    after = error(encoder, calibrated, held_out)
    assert after < 0.9 * error(encoder, plan.to_be_calibrated(), held_out)
    for stage in calibration.seen["stages"]:
        assert 0 <= stage["left"] < stage["left without"]

    calibration.save(tmp_path / "calibration.pth")
    read = Plan(plan.reducer, plan.start, plan.stop, plan.scope, calibration=tmp_path / "calibration.pth")
    assert read.describe() == calibrated.describe()
    assert error(encoder, read, held_out) == after
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)


def test_images_of_another_kind_are_restored_as_without_it():
    """Those that it was fitted to, and their like, are corrected in full."""
    encoder = of_vit.tiny_vit()
    calibrated = PLAN.calibrated(calibrate(encoder, PLAN, images(8)))
    plain, view = hourglass.expedite(encoder, PLAN), hourglass.expedite(encoder, calibrated)
    shares = []
    view.reducer.corrections["0"].guard.register_forward_hook(lambda guard, inputs, share: shares.append(share))
    for image in images(8):
        of_vit.last(view, image)
    assert all(float(share) == 1 for share in shares)
    strange = [40 * image for image in images(1)] + [image.flip(1).sign() * 30 for image in images(1)]
    for image in strange:
        torch.testing.assert_close(of_vit.last(view, image), of_vit.last(plain, image), atol=1e-5, rtol=1e-5)
    assert all(float(share) == 0 for share in shares[8:])


@pytest.mark.parametrize("autocast", [False, True])
def test_tokens_whose_mean_is_far_larger_than_their_spread_are_fitted(autocast):
    """As some channels' of a ViT are. Products are not rounded to bfloat16 either."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.eye(32) + torch.randn(32, 32, generator=draw) / 100
    tokens = [torch.randn(1, 16, 16, 32, generator=draw) for _ in range(4)]
    mean = 30 * torch.randn(32, generator=draw)
    fits = []
    for offset in (torch.zeros(32), mean):
        moments = [Moments() for _ in range(2)]
        for i, image_tokens in enumerate(tokens):
            reduction = AveragePooling((4, 4))(image_tokens + offset)
            refined, output = reduction.tokens @ matrix, (image_tokens + offset) @ matrix
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                moments[i % 2].observe(image_tokens + offset, reduction, refined, output)
        fits.append(fit(moments, ("full",), (1e-2,), guard=False))
    assert fits[1].before == pytest.approx(fits[0].before, rel=0.01)
    assert fits[1].remaining == pytest.approx(fits[0].remaining, rel=0.05)


def test_images_that_are_all_the_same_are_fitted():
    calibration = calibrate(of_vit.tiny_vit(use_abs_pos=False), PLAN, [torch.zeros(1, 3, 64, 64)] * 2)
    assert all(torch.isfinite(value).all() for value in calibration.corrections[0].values())


def test_maps_that_are_not_finite_are_refused_in_a_line():
    encoder = of_vit.tiny_vit()
    with torch.no_grad():
        encoder.blocks[2].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="must be finite, got nan or inf"):
        calibrate(encoder, PLAN, images(2))


def test_what_it_makes_belongs_to_the_expedited_model():
    encoder = of_vit.tiny_vit()
    plan = PLAN.calibrated(calibrate(encoder, PLAN, images(4)))
    view = hourglass.expedite(encoder, plan)
    names = set(view.state_dict()) - set(encoder.state_dict())
    assert {"reducer.corrections.0.tokens", "reducer.corrections.0.constant"} <= names
    assert not any(name.startswith("reducer") for name, _ in view.named_parameters())
    again = copy.deepcopy(view)
    (image,) = images(1, first=50)
    torch.testing.assert_close(of_vit.last(again, image), of_vit.last(view, image), atol=0, rtol=0)
    assert of_vit.last(view.double(), image.double()).dtype == torch.float64
    assert '"digest"' not in str(PLAN.describe()) and plan.describe()["calibration"]["images"] == 4


def test_it_compiles_to_one_graph():
    encoder = of_vit.tiny_vit()
    view = hourglass.expedite(encoder, PLAN.calibrated(calibrate(encoder, PLAN, images(4))))
    (image,) = images(1, first=50)
    expected = of_vit.last(view, image)
    torch._dynamo.reset()
    compiled = torch.compile(view, backend="eager", fullgraph=True)
    torch.testing.assert_close(of_vit.last(compiled, image), expected, atol=1e-5, rtol=1e-5)


def test_another_plan_encoder_or_weights_are_refused_in_a_line():
    encoder = of_vit.tiny_vit()
    calibration = calibrate(encoder, PLAN, images(4))
    for other_plan, message in (
        (Plan(PLAN.reducer, 2, 4), "start was 1, and is 2"),
        (Plan(TokenClustering((4, 3)), 1, 4), r"reducer.grid was \[3, 3\], and is \[4, 3\]"),
        (Plan(AveragePooling((3, 3)), 1, 4), "reducer"),
    ):
        with pytest.raises(InputError, match=f"made for another plan: .*{message}"):
            other_plan.calibrated(calibration)
    Plan(PLAN.reducer, 1, 4, attention="plain").calibrated(calibration)  # the same to rounding
    former = copy.deepcopy(calibration)  # a file from before the argument had its present name
    former.plan["reducer"]["restore"] = former.plan["reducer"].pop("restore_mode")
    PLAN.calibrated(former)
    with pytest.raises(InputError, match="reducer.restore_mode was 'features', and is 'update'"):
        former.plan["reducer"]["restore"] = "features"
        PLAN.calibrated(former)
    plan = PLAN.calibrated(calibration)
    with pytest.raises(InputError, match="another encoder .class ViT, parameters .*, not this .class Swin"):
        hourglass.expedite(of_swin.tiny_swin(), plan)

    later = of_vit.tiny_vit()
    with torch.no_grad():
        later.blocks[2].mlp.fc1.weight.mul_(1.2)
    view = hourglass.expedite(later, plan)  # its weights may still be loaded
    with pytest.raises(InputError, match="made for other weights: .* most in blocks.2.mlp.fc1.weight"):
        of_vit.last(view, *images(1))
    later.load_state_dict(encoder.state_dict())
    assert torch.equal(of_vit.last(view, *images(1)), of_vit.last(hourglass.expedite(encoder, plan), *images(1)))


@pytest.mark.parametrize("name", ["blocks.0.attn.proj.weight", "blocks.3.mlp.fc2.bias", "blocks.1.norm1.weight"])
def test_one_parameter_that_differs_makes_other_weights(name):
    """However large the others are."""
    encoder = of_vit.tiny_vit()
    with torch.no_grad():
        encoder.pos_embed.add_(30)
    calibration = calibrate(encoder, PLAN, images(4))
    calibration.check_weights(encoder)
    with torch.no_grad():
        encoder.get_parameter(name).mul_(1.05).add_(1e-3)
    with pytest.raises(InputError, match=f"made for other weights: .* most in {name}"):
        calibration.check_weights(encoder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_the_same_weights(dtype):
    encoder = of_vit.tiny_vit()
    calibration = calibrate(encoder, PLAN, images(4))
    calibration.check_weights(copy.deepcopy(encoder).to(dtype))


def test_what_cannot_be_calibrated_is_refused_in_a_line(tmp_path):
    encoder = of_vit.tiny_vit()
    for plan, message in (
        (Plan(), "needs a plan with a reducer"),
        (Plan(TokenClustering((3, 3)), published=True), "needs a plan with a reducer that is not run as published"),
        (
            Plan(TokenClustering((3, 3), restore_mode="features"), 1, 4),
            'restores something else: use restore_mode="update"',
        ),
        (Plan(BipartiteMatching(4), 1, 4), "BipartiteMatching|MergeEachWindow"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(encoder, plan, images(2))
    with pytest.raises(InputError, match="needs at least 2 images, got 1"):
        calibrate(encoder, PLAN, images(1))
    with pytest.raises(InputError, match="calibration must be a Calibration, its file or None, got 3"):
        Plan(TokenClustering((3, 3)), calibration=3)
    with pytest.raises(InputError, match="calibration must be None in a plan without a reducer"):
        Plan(calibration=tmp_path / "x.pth")
    with pytest.raises(InputError, match="missing.pth cannot be read .FileNotFoundError"):
        Plan(TokenClustering((3, 3)), calibration=tmp_path / "missing.pth")
    torch.save({"model": {}}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="weights.pth is not a calibration file"):
        Plan(TokenClustering((3, 3)), calibration=str(tmp_path / "weights.pth"))
    torch.save({"format": "hourglass calibration 1", "corrections": 3}, tmp_path / "torn.pth")
    with pytest.raises(InputError, match="torn.pth is damaged"):
        Calibration.read(tmp_path / "torn.pth")


def test_a_failed_calibration_leaves_the_model_as_it_was():
    encoder = of_vit.tiny_vit().train()
    view = hourglass.expedite(encoder, PLAN)
    with pytest.raises(InputError):
        calibrate(view, PLAN, images(1))
    assert encoder.training and view.training
    torch.testing.assert_close(
        of_vit.last(view.eval(), *images(1)), of_vit.last(hourglass.expedite(encoder.eval(), PLAN), *images(1))
    )


def test_plans_that_are_calibrated_together_are_as_each_alone():
    """In a Swin plans begin and end in any stage."""
    encoder = of_swin.tiny_swin()
    plans = [
        Plan(AveragePooling(0.5), 1, 7),
        Plan(TokenClustering(0.5), 2, 3),
        Plan(LinearBlocks(), 3, 6),
        Plan(AveragePooling(0.5), 3, 7, proportional=False),
    ]
    held_out = images(2, (128, 192), first=100)
    for plan, calibration in zip(plans, calibrate_plans(encoder, plans, images(4, (128, 192)))):
        alone = calibrate(encoder, plan, images(4, (128, 192)))
        assert calibration.plan == alone.plan and calibration.corrections.keys() == alone.corrections.keys()
        errors = [error(encoder, plan.calibrated(fitted), held_out) for fitted in (calibration, alone)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)
        for first, tensors in alone.corrections.items():
            for name, value in tensors.items():
                assert calibration.corrections[first][name].shape == value.shape
