"""What a plan's blocks run on, over an image."""

import numpy as np
import pytest
import torch

from hourglass import (
    AveragePooling,
    BipartiteMatching,
    DensityPeaks,
    Plan,
    SkipBlocks,
    TokenClustering,
    TokenSelection,
    expedite,
)
from hourglass.reduction.scope import EachWindow
from hourglass.report.tokens import Tokens, draw_tokens, find_clusters, find_clusters_in_windows, find_tokens
from tests.detectors import Detector, tiny_vit


@pytest.mark.parametrize("size", [(16, 16), (20, 13)])
@pytest.mark.parametrize("reducer", [TokenClustering((3, 4)), AveragePooling((3, 2)), DensityPeaks((3, 3))])
def test_clusters_in_windows_are_those_of_one_token_at_a_time(reducer, size):
    torch.manual_seed(0)
    tokens = torch.randn(1, *size, 7)
    each_window = EachWindow(reducer, 8)
    reduction = each_window(tokens)
    assert torch.equal(find_clusters_in_windows(tokens, reduction, each_window), find_clusters(tokens, reduction))


def seen(plan: Plan) -> Tokens | None:
    torch.manual_seed(0)
    view = expedite(Detector(tiny_vit()), plan).eval()
    return find_tokens(view, plan, {"image": torch.rand(3, 64, 48)})


def test_tokens_of_plans():
    assert seen(Plan()) is None
    clusters = seen(Plan(TokenClustering((3, 2)), 1))
    assert clusters.full == clusters.labels.shape and clusters.running == 6
    assert set(np.unique(clusters.labels)) <= set(range(6)) and clusters.blocks[0] == 1
    assert clusters.size == (64, 48)
    assert [cell * side for cell, side in zip(clusters.cell, clusters.full)] == [64, 48]
    skipped = seen(Plan(SkipBlocks(), 1))
    assert skipped.labels is None and skipped.running == 0


def test_merged_tokens_are_those_after_the_last_block():
    merged = seen(Plan(BipartiteMatching(0.25), 1, scope="window"))
    assert merged.merged and merged.running == len(np.unique(merged.labels)) < merged.labels.size


@pytest.mark.parametrize("windowed", [(0, 1), ()])
def test_selected_tokens_are_those_that_the_first_block_runs_on(windowed):
    torch.manual_seed(0)
    reducer = TokenSelection("random")
    plan = Plan(reducer)
    encoder = tiny_vit(window_block_indexes=windowed)
    view = expedite(Detector(encoder), plan).eval()
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *reducer.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))  # so that attention changes what is selected
    inputs, ran = {"image": torch.rand(3, 64, 48)}, []
    shown = find_tokens(view, plan, inputs)
    reducer.register_forward_hook(lambda _, arguments, selection: ran.append(selection.positions))
    view([inputs])
    rows, columns = ran[0].reshape(-1, 2).long().numpy().T
    expected = np.zeros(shown.full, bool)
    expected[rows, columns] = True
    assert 0 < shown.running < expected.size and np.array_equal(shown.selected, expected)


def test_pictures_of_tokens():
    image = np.full((64, 96, 3), 100, np.uint8)
    labels = np.arange(24).reshape(4, 6)
    tokens = Tokens((4, 6), labels, False, None, 2, (16.0, 16.0), (64, 96), 24, (0, 1))
    drawn = draw_tokens(image, tokens)
    assert drawn.shape[1] == 800
    orange = (drawn == (255, 120, 0)).all(axis=2)
    step = 800 / 6
    assert orange[:, round(2 * step)].mean() > 0.9 and not orange[: round(step), : round(step)].any()
    assert (drawn[:, round(step)] != 100).any(axis=1).mean() > 0.9  # a border
    selected = np.zeros((4, 6), bool)
    selected[0] = True
    dark = draw_tokens(image, tokens._replace(labels=None, selected=selected, window=0))
    assert (dark[: int(step) - 1] == 100).all() and (dark[int(step) + 1 :] < 50).all()
