"""Searching for a plan: what is predicted, what is chosen, and what is refused."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hourglass
from hourglass import AveragePooling, InputError, Plan, TokenClustering, launch
from hourglass.commands import search_settings
from hourglass.evaluation import Comparison
from hourglass.fitting import Recorder, fit
from hourglass.search import Goal
from hourglass.search.estimate import SCATTER, SLOPE, SLOPE_DEVIATION, counted, discount, estimate, learn_slopes
from hourglass.search.front import Candidate, enumerate_plans, make_pool, pareto_front
from hourglass.search.latency import Latency, measure_latency
from hourglass.search.measured import Measured, Result
from hourglass.search.options import KEYS, make_options
from hourglass.search.report import write_plan
from hourglass.search.run import BASE, Images, Ran, Row, Search, _labelled, describe, key
from hourglass.search.trace import Errors, measure_errors, relative, trace
from tests import small_swin as of_swin
from tests import small_vit as of_vit
from tests.models import images


class TestGoal:
    def test_it_is_read(self):
        assert Goal.parse(["keep=0.99"]) == Goal(keep=0.99)
        assert Goal.parse(["speed=2", "labels=none", "seed=3"]) == Goal(speed=2.0, labels="none", seed=3)
        assert str(Goal(keep=0.99, labels="none")) == "keep=0.99 labels=none"

    @pytest.mark.parametrize(
        "words, message",
        [
            (["keep=1.2"], "keep must be over 0 and under 1, .* got 1.2"),
            (["keep=nan"], "keep must be over 0 and under 1"),
            (["speed=0.5"], "speed must be over 1, .* got 0.5"),
            (
                ["keep=0.9", "speed=2"],
                "either keep, such as keep=0.99, or speed, such as speed=2, got keep=0.9 speed=2",
            ),
            (["labels=none"], "either keep, such as keep=0.99, or speed, such as speed=2, got labels=none"),
            (["keep=much"], "must have keep=a number, got 'keep=much'"),
            (["kept=0.9"], "must be keep=..., speed=..., labels=..., seed=..., got 'kept=0.9'"),
            (["keep"], "got 'keep'"),
            (["keep=0.9", "keep=0.8"], "must have keep once"),
            (["keep=0.9", "labels=some"], "labels must be auto or none, got some"),
            (["keep=0.9", "seed=-1"], "seed must be at least 0"),
        ],
    )
    def test_what_is_none_is_refused_in_a_line(self, words, message):
        with pytest.raises(InputError, match=message):
            Goal.parse(words)


class TestOptions:
    def test_budgets_suit_the_windows(self):
        assert {option.scope for option in make_options({14})} == {"window"}
        grids = {option.reducer.grid for option in make_options({14})}
        assert grids == {(10, 10), (9, 9), (7, 7), (5, 5)}
        assert all(0 < option.share < 1 for option in make_options({7}))
        assert (
            {option.scope for option in make_options({})}
            == {option.scope for option in make_options({7, 9})}
            == {"map"}
        )
        assert len({option.name for option in make_options({16})}) == len(make_options({16}))


@pytest.fixture(scope="module")
def traced():
    """A tiny ViT, its maps of four images, and options of two budgets."""
    vit = of_vit.tiny_vit()
    return trace(vit, images(4, (64, 96)))


@pytest.fixture(scope="module")
def errors(traced):
    return measure_errors(traced)


class TestErrors:
    def test_the_maps_are_the_encoders(self, traced):
        (stage,), ((kept, *_),) = traced.stages, traced.maps
        assert len(kept) == len(stage.blocks) + 1 == traced.depth + 1
        vit = traced.view
        with torch.no_grad():
            tokens = kept[0]
            for block, after in zip(traced.original_blocks, kept[1:]):
                tokens = block(tokens)
                torch.testing.assert_close(tokens, after, atol=1e-4, rtol=1e-4)
        assert isinstance(vit, torch.nn.Module)

    def test_an_error_is_that_of_its_plan(self, traced, errors):
        """As calibrating the plan itself finds it, from the same tokens and folds."""
        for option, start, stop in ((0, 1, 3), (3, 2, 4), (5, 0, 2)):
            chosen = traced.options[option]
            if (start, stop, option) not in errors.remaining:
                continue
            view = hourglass.expedite(traced.view, Plan(chosen.reducer, start, stop, chosen.scope))
            recorder = Recorder()
            for image, kept in enumerate(traced.maps[0]):
                recorder.fold = image % 2
                with torch.no_grad():
                    recorder(0, kept[start], traced.stages[0].blocks[start:stop], _bound(view))
            expected = fit(recorder.moments[0], ("full",), (1e-2,)).remaining
            assert errors.remaining[start, stop, option] == pytest.approx(expected, rel=1e-3)

    def test_pooled_keys_have_the_error_of_their_block(self, traced, errors):
        for (block, keys), error in errors.pooled.items():
            assert traced.original_blocks[block].window_size == 0
            view = traced.family.placed(traced.original_blocks[block], True, keys=keys)
            with torch.no_grad():
                found_errors = [relative(view(kept[block]), kept[block + 1]) for kept in traced.maps[0]]
            assert error == pytest.approx(np.mean(found_errors), rel=1e-3)
        assert errors.pooled

    def test_fewer_tokens_err_more_in_the_mean(self, traced, errors):
        def mean(share):
            chosen = [i for i, option in enumerate(traced.options) if option.share == share]
            return np.mean([error for (_, _, option), error in errors.remaining.items() if option in chosen])

        shares = sorted({option.share for option in traced.options})
        assert mean(shares[0]) > mean(shares[-1])

    def test_the_errors_of_stages_add_up(self):
        swin = trace(of_swin.tiny_swin(), images(2, (128, 192)))
        assert len(swin.stages) > 1 and swin.stages[1].first == len(swin.stages[0].blocks)
        remaining = {(0, 1, 0): 0.1, (1, 2, 0): 0.2, (0, 2, 0): 0.4, (2, 3, 0): 0.8}
        table = Errors(remaining, {1: 3.0}, {})
        first = swin.stages[0].stop
        assert table.of_plan(swin, 0, 1, 0, 1) == pytest.approx(0.1 * (3.0 if first > 1 else 1.0))
        if first == 2:
            assert table.of_plan(swin, 0, 3, 0, 1) == pytest.approx(0.4 + 0.8)

    def test_what_a_plan_may_not_run_is_not_measured(self, traced, errors):
        windows = traced.stages[0].windows
        for start, stop, option in errors.remaining:
            scope = traced.options[option].scope
            assert scope == "map" or any(windows[start:stop])
        for plan in enumerate_plans(traced, errors, _even(traced)):
            if plan.start < 2 and plan.stop < 4:
                hourglass.expedite(traced.view, plan.plan(traced))


def test_plans_that_an_encoder_with_convolutions_refuses_are_not_tried():
    vit = of_vit.tiny_vit(residual_block_indexes=(3,))
    traced = trace(vit, images(2, (64, 64)))
    refused = 0
    for option in traced.options:
        for start, stop in ((0, 2), (2, 4), (3, 5)):
            plan = Plan(option.reducer, start, stop, scope=option.scope)
            if traced.supports(option, start, stop):
                hourglass.expedite(vit, plan)
            else:
                with pytest.raises(InputError):
                    hourglass.expedite(vit, plan)
                refused += 1
    assert refused


def _bound(view):
    from hourglass.encoders import find_encoder

    return find_encoder(view)[1].reducer


def _even(traced) -> Latency:
    """Every block takes 10 ms in full, 4 on fewer tokens and 7 with pooled keys; reducing takes 2."""
    full, reduced, reducing, pooled = {}, {}, {}, {}
    for number, stage in enumerate(traced.stages):
        for kind in stage.kinds:
            full[number, kind] = 10.0
            for option in range(len(traced.options)):
                reduced[number, kind, option], reducing[number, option] = 4.0, 2.0
            for keys in KEYS[1:]:
                if kind[0] == 0:
                    pooled[number, kind, keys] = 7.0
    return Latency(100.0, full, reduced, reducing, pooled)


class TestLatency:
    def test_a_plans_time_is_the_sum_of_its_parts(self, traced):
        latency = _even(traced)
        windows = traced.stages[0].windows
        assert latency.of_plan(traced, 0, 0, None, 1) == 100
        assert latency.of_plan(traced, 1, 3, 0, 1) == 100 - 2 * 6 + 2
        outside = sum(window == 0 for i, window in enumerate(windows) if not 1 <= i < 3)
        assert latency.of_plan(traced, 1, 3, 0, 2) == 100 - 2 * 6 + 2 - 3 * outside

    def test_blocks_that_were_timed_beside_other_work_make_no_plan_free(self, traced):
        """The sum of the blocks is over the encoder's time: every plan's is its share of that."""
        slow = _even(traced)._replace(encoder=10.0)
        total = 10.0 * traced.depth
        assert slow.of_plan(traced, 0, 0, None, 1) == pytest.approx(10)
        assert slow.of_plan(traced, 1, 3, 0, 1) == pytest.approx(10 * (total - 2 * 6 + 2) / total)
        assert slow.of_plan(traced, 0, traced.depth, 0, 1) > 0

    def test_it_is_measured_for_all_that_plans_are_made_of(self, traced, errors, monkeypatch):
        monkeypatch.setattr("hourglass.search.latency.ROUNDS", 1)
        latency = measure_latency(traced, of_vit.tiny_vit(), images(1, (64, 96))[0], "cpu")
        assert latency.encoder > 0
        for plan in enumerate_plans(traced, errors, latency):
            assert math.isfinite(plan.time) and plan.error >= 0


def candidate(time: float, error: float, option: int | None = 0) -> Candidate:
    return Candidate(1, 2, option, 1, time, error)


class TestFront:
    def test_none_of_it_is_beaten(self):
        times = [(10, 0.5), (9, 0.2), (8, 0.2), (7, 0.4), (12, 0.1), (6, 0.6)]
        front = pareto_front([candidate(*arguments) for arguments in times])
        assert [(plan.time, plan.error) for plan in front] == [(12, 0.1), (8, 0.2), (7, 0.4), (6, 0.6)]

    def test_each_kind_has_one_of_its_own(self, traced):
        kinds = {candidate(1, 1, i).kind(traced): i for i in range(len(traced.options))}
        assert len(kinds) == 3
        first, second, third = kinds.values()
        plans = [
            candidate(8, 0.010, first),
            candidate(7, 0.015, second),
            candidate(8, 0.050, third),  # five times the error of another at the same time
            candidate(6, 0.500, first),  # a model finds nothing then
            candidate(20, 0.001, first),  # slower than what changes nothing
        ]
        pool = make_pool(traced, plans, slowest=10)
        assert [plan.time for front in pool.values() for plan in front] == [8, 7]

    def test_fast_attention_alone_is_no_plan_of_it(self, traced):
        """The sum of its parts may be less by a rounding."""
        fast = candidate(10 - 1e-12, 0.0, None)._replace(start=0, stop=0)
        assert make_pool(traced, [fast], slowest=10) == {}
        assert list(make_pool(traced, [fast, fast._replace(keys=2)], slowest=10)) == ["keys"]

    def test_a_plan_with_pooled_keys_is_of_a_kind_of_its_own(self, traced):
        """Its errors are not those of fewer tokens, and do not push such plans out."""
        plain, pooled = candidate(8, 0.02), candidate(8, 0.01)._replace(keys=2)
        pool = make_pool(traced, [plain, pooled], slowest=10)
        assert [front for front in pool.values()] == [[plain], [pooled]]


def result(agreement: float, labelled: float | None = None, noise: float = 0.0, speed: float = 2.0) -> Result:
    draw = np.random.default_rng(0).normal(size=501)
    draw[0] = 0
    labels = {} if labelled is None else {"segm.AP": labelled + noise * draw}
    return Result(10.0, speed, {"segm.AP": np.full(501, 100.0 * agreement)}, labels)


class TestEstimate:
    def test_without_labels_it_is_a_share_of_what_agreement_loses(self):
        kept, lower = estimate(result(0.96))
        assert kept == pytest.approx(1 - SLOPE * discount(0.04), abs=1e-4) and 0.95 < lower < kept
        assert estimate(result(1.0)) == pytest.approx((1.0, 1.0), abs=1e-3)

    def test_labels_count_as_far_as_they_are_sure(self):
        prior = estimate(result(0.96))[0]
        sure, unsure = (estimate(result(0.96, 0.95, noise))[0] for noise in (0.0005, 0.1))
        assert sure == pytest.approx(0.95, abs=0.002) and unsure == pytest.approx(prior, abs=0.002)
        assert sure < unsure

    def test_the_figure_that_loses_most_counts(self):
        two = result(0.99)._replace(agreement={"bbox.AP": np.full(501, 90.0), "segm.AP": np.full(501, 99.0)})
        assert estimate(two)[0] == pytest.approx(1 - SLOPE * discount(0.1), abs=1e-3)

    def test_with_labels_only_the_figures_that_they_measure_count(self):
        """A Mask2Former also gives boxes, which its config does not evaluate."""
        alone = result(0.99, 0.99, 0.01)
        both = alone._replace(agreement=alone.agreement | {"bbox.AP": np.full(501, 90.0)})
        assert estimate(both) == estimate(alone) and counted(both) == ["segm.AP"]
        measured = both._replace(labelled=alone.labelled | {"bbox.AP": np.array([0.9])})  # it cannot be resampled
        assert set(counted(measured)) == {"bbox.AP", "segm.AP"} and estimate(measured) < estimate(alone)
        unlabelled = both._replace(labelled={"segm.AP": np.full(501, np.nan)})
        assert estimate(unlabelled) == estimate(both._replace(labelled={}))
        assert estimate(unlabelled)[0] == pytest.approx(1 - SLOPE * discount(0.1), abs=1e-3)

    def test_a_figure_that_cannot_be_resampled_is_known_by_its_share(self):
        """It has no samples where Detectron2's own evaluator gives it."""
        drawn = np.array([50.0, 60.0, 0.0])
        full, lossy = (
            SimpleNamespace(
                accuracy={"bbox": {"AP": 50 * share}, "panoptic_seg": {"PQ": 40 * share}},
                samples={"bbox.AP": drawn * share},
            )
            for share in (1.0, 0.5)
        )
        shares = _labelled(Comparison({BASE: full, "plan": lossy}), "plan")
        np.testing.assert_array_equal(shares["bbox.AP"], [0.5, 0.5, np.nan])
        np.testing.assert_array_equal(shares["panoptic_seg.PQ"], [0.5])

    def test_the_slope_is_learnt_from_plans_on_the_same_images(self):
        """Plans whose labels share a noise: the slope shows on heavy ones, and light ones are known by it."""

        def plans(slope: float, noise: float) -> list[Result]:
            return [result(1 - lost, 1 - slope * discount(lost), noise) for lost in (0.01, 0.04, 0.1, 0.2, 0.3)]

        for slope in (0.2, 1.0):
            learnt = learn_slopes(plans(slope, 0.005))["segm.AP"]
            assert learnt.samples[0] == pytest.approx(slope, abs=0.04) and learnt.deviation < 0.18
            light = plans(slope, 0.005)[1]
            kept, lower = estimate(light, {"segm.AP": learnt})
            assert kept == pytest.approx(1 - slope * discount(0.04), abs=1e-3)
            assert kept - lower < 0.6 * (estimate(light)[0] - estimate(light)[1])
            settled = learnt.settled()
            assert settled.samples.shape == (1,) and settled.deviation > learnt.deviation
        unsure = learn_slopes(plans(1.0, 1.0))["segm.AP"]
        assert unsure.samples[0] == pytest.approx(SLOPE, abs=0.05)
        assert unsure.deviation == pytest.approx((SLOPE_DEVIATION**2 + SCATTER**2) ** 0.5, rel=0.05)
        assert learn_slopes([result(0.9)]) == {}

    def test_plans_that_differ_in_their_slope_make_it_unsure(self):
        results = [result(1 - lost, 1 - 0.6 * discount(lost), 0.001) for lost in (0.1, 0.2, 0.3, 0.4)]
        differing = [result(0.8, 1 - slope * discount(0.2), 0.001) for slope in (0.2, 0.4, 0.8, 1.0)]
        assert learn_slopes(results)["segm.AP"].deviation < 0.16
        assert learn_slopes(differing)["segm.AP"].deviation == pytest.approx(0.316, rel=0.1)

    def test_a_model_that_finds_nothing_keeps_nothing(self):
        """Also without labels, and where plans lose less of labels than of agreement."""
        assert estimate(result(0.0)) == pytest.approx((0.0, 0.0), abs=1e-3)
        slopes = learn_slopes([result(1 - lost, 1.0, 0.003) for lost in (0.01, 0.03, 0.05)])
        assert estimate(result(0.0), slopes)[0] == pytest.approx(0.0, abs=1e-3)
        assert 0.4 < estimate(result(0.3))[0] < 0.6

    def test_the_first_changes_cost_least_and_a_model_that_finds_nothing_has_lost_all(self):
        losses = discount(np.linspace(0, 1, 11))
        assert losses[0] == 0 and losses[-1] == pytest.approx(1)
        assert (np.diff(losses, 2) > 0).all()

    def test_nothing_found_is_refused(self):
        nothing = result(0.9)._replace(agreement={"segm.AP": np.full(501, np.nan)})
        with pytest.raises(InputError, match="finds nothing with a score over 0.7"):
            estimate(nothing)
        with pytest.raises(InputError, match="gives no boxes, masks"):
            estimate(nothing._replace(agreement={}))


class TestMeasured:
    def test_what_is_measured_is_measured_once(self, tmp_path, traced, errors):
        path, settings = tmp_path / "new" / "search.json", {"weights": "a"}
        first = Measured(path, settings)
        assert not first.resumed
        latency = _even(traced)
        assert first.errors(lambda: errors) == errors and first.latency(lambda: latency) == latency
        first.add("rank 32", {"plan": result(0.9, 0.98, 0.01)})

        def never():
            raise AssertionError("measured again")

        again = Measured(path, settings)
        assert again.resumed and again.errors(never) == errors and again.latency(never) == latency
        stored = again.result("rank 32", "plan")
        np.testing.assert_allclose(stored.labelled["segm.AP"], result(0.9, 0.98, 0.01).labelled["segm.AP"], atol=1e-6)
        assert again.result("rank 64", "plan") is None and again.result("rank 32", "other") is None

    def test_without_labels_what_was_measured_with_them_is_reused(self, tmp_path):
        measured = Measured(tmp_path / "search.json", {})
        plans = [Plan(AveragePooling((8, 8)), 1, 3, scope="window"), Plan(keys=4)]
        measured.add("rank 32, with labels", {key(plans[0]): result(0.9, 0.98, 0.01)})
        measured.add("rank 32", {key(plans[1]): result(0.8)})
        goal = Goal(keep=0.99, labels="none")
        # There is no model: what is known is not calibrated, either.
        search = Search(None, None, goal, measured, build_evaluator=lambda name: None)
        results = search._measure(plans, [], "rank 32")
        assert [found.agreement["segm.AP"][0] for found in results.values()] == [90, 80]
        assert all(found.labelled == {} for found in results.values())

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1, "settings": {"weights": "b"}}'])
    def test_another_models_or_a_torn_file_is_not_gone_on_from(self, content, tmp_path):
        path = tmp_path / "search.json"
        path.write_text(content)
        measured = Measured(path, {"weights": "a"})
        assert not measured.resumed and measured.result("rank 32", "plan") is None
        assert measured.differing == (["weights"] if "settings" in content else [])
        measured.conclude(goal="keep=0.9")
        assert json.loads(path.read_text())["found"] == {"goal": "keep=0.9"}


def row(name: str, kept: float, lower: float, verdict: str = "", images: int = 60) -> Row:
    return Row(name, Plan(keys=2), 1.0, result(0.9), images, kept, lower, verdict)


class TestChoice:
    @staticmethod
    def choose(monkeypatch, rows: list[Row], checked: dict[str, float]) -> tuple[str, list[str]]:
        """The answer, and the lines of the log; "" for fast attention alone."""
        lines = []
        search = Search(None, None, Goal(keep=0.99), None, None, log=lines.append)
        monkeypatch.setattr(
            search, "_check", lambda row: {row.name: row._replace(kept=checked[row.name], images=30, plan=row.plan)}
        )
        outcome = search._choose(rows)
        found = [name for name, answer in outcome.checked.items() if outcome.reached and answer.plan is outcome.plan]
        return "".join(found), lines

    def test_the_fastest_that_is_sure_to_keep_enough(self, monkeypatch):
        rows = [row("a", 0.999, 0.996), row("b", 0.998, 0.992), row("c", 0.996, 0.988), row("d", 0.999, 0.995)]
        assert self.choose(monkeypatch, rows, {"b": 0.994})[0] == "b"
        assert self.choose(monkeypatch, rows[2:], {})[0] == ""

    def test_one_that_a_faster_one_beats_does_not_stop_it(self, monkeypatch):
        rows = [row("a", 0.995, 0.988, "a faster one keeps more"), row("b", 0.998, 0.992)]
        assert self.choose(monkeypatch, rows, {"b": 0.99})[0] == "b"

    def test_few_images_more_do_not_outweigh_many(self, monkeypatch):
        """0.998 on 60 and 0.98 on 30 is 0.992 in all, 0.972 on 30 is 0.9893."""
        rows = [row("a", 0.999, 0.995, "a faster one keeps more"), row("b", 0.998, 0.992)]
        assert self.choose(monkeypatch, rows, {"b": 0.98})[0] == "b"
        answer, (line,) = self.choose(monkeypatch, rows, {"a": 0.985, "b": 0.972})
        assert answer == "a" and "b keeps about 97.2 %" in line and "98.9 % with those" in line
        answer, lines = self.choose(monkeypatch, rows, {"a": 0.965, "b": 0.972})
        assert answer == "" and len(lines) == 2

    def test_controls_are_not_judged_by_the_slope_of_plans(self, monkeypatch):
        """Plans that lose nothing against labels have a slope of nearly 0; a control that loses 5 % is no such plan."""
        sets = Images([None] * 30, [None] * 90, [None] * 30, "two images")
        search = Search(None, sets, Goal(keep=0.99), None, None)
        search._slopes = learn_slopes([result(1 - lost, 1.0, 0.003) for lost in (0.01, 0.03, 0.05)])
        plan = Plan(AveragePooling((8, 8)), 1, 3, scope="window")
        monkeypatch.setattr(
            search, "_measure", lambda plans, images, phase: {key(each): result(0.88, 0.95, 0.02) for each in plans}
        )
        answer, *controls = search._check(Row("a", plan, 2.0, result(0.96), 90, 0.998, 0.993)).values()
        assert answer.kept > 0.97
        assert len(controls) == 2
        for control in controls:
            assert 0.95 < control.kept < 0.97

    def test_blocks_that_cost_more_than_their_error_are_learnt(self, traced):
        """Of two plans that have not run and have the same error, the one without such blocks is to lose less."""
        search = Search(None, Images([None], [None] * 90, [None] * 30, "two images"), Goal(keep=0.99), None, None)
        runs = [((0, 2), 0.98), ((1, 3), 0.996), ((2, 4), 0.995), ((0, 3), 0.97)]
        ran = [(candidate(10, 0.01)._replace(start=start, stop=stop), kept) for (start, stop), kept in runs]
        search._ran = [Ran(each, each.plan(traced), 2.0, result(kept, kept, 0.001)) for each, kept in ran]
        first, last = (candidate(9, 0.01)._replace(start=start, stop=stop) for start, stop in ((0, 1), (3, 4)))
        losses = search._predict(traced, {"of any kind": [first, last]})
        assert losses[first] > 2 * losses[last]

    @staticmethod
    def rounds(monkeypatch, traced, share: float, goal: Goal) -> tuple[list[list[float]], list[float]]:
        """Of a model that loses so much of a plan's error: the speeds of each round, and those that reach the goal."""
        plans = [candidate(20 / 1.08**i, 0.002 * 1.3**i) for i in range(20)]
        monkeypatch.setattr("hourglass.search.run.trace", lambda model, images: traced)
        monkeypatch.setattr("hourglass.search.run.enumerate_plans", lambda *measured: plans)
        measured = SimpleNamespace(errors=lambda measure: None, latency=lambda measure: Latency(24.0, {}, {}, {}, {}))
        search = Search(None, Images([None] * 4, [None] * 40, [None] * 10, ""), goal, measured, None)
        rounds = []

        def run(traced, encoder, candidates, number):
            rounds.append([encoder / each.time for each in candidates])
            for each in candidates:
                lost = each.error * share
                found = result(1 - 4 * lost, 1 - lost, 0.0001, encoder / each.time)
                search._ran.append(Ran(each, json.dumps([each.time]), found.speed, found))

        monkeypatch.setattr(search, "_run", run)
        monkeypatch.setattr(search, "_choose", lambda rows: rows)
        monkeypatch.setattr("hourglass.search.run.key", lambda plan: plan)
        monkeypatch.setattr("hourglass.search.run.describe", lambda plan: plan)
        rows = search.run()
        return rounds, [row.result.speed for row in rows if goal.keep is None or row.lower >= goal.keep]

    @pytest.mark.parametrize("share", [0.08, 0.15, 0.3, 0.6, 1.2])
    def test_rounds_close_in_on_the_goal(self, monkeypatch, traced, share):
        """1 % is lost at an error of 0.01 / share: models differ by a factor of ten in what an error costs."""
        (first, *later), reached = self.rounds(monkeypatch, traced, share, Goal(keep=0.99))
        fastest_that_keeps = 1.2 * 1.08 ** int(math.log(0.01 / share / 0.002) / math.log(1.3))
        assert 0.9 * fastest_that_keeps < max(reached) <= fastest_that_keeps + 1e-9
        assert len(first) == 3 and 1 <= len(later) <= 2
        missed = [speed for speed in first if speed > fastest_that_keeps + 1e-9]
        assert all(max(set(first) - set(missed)) < speed for speed in later[0])
        assert not missed or all(speed < min(missed) for speed in later[0])

    def test_with_a_speed_those_that_lose_least_run(self, monkeypatch, traced):
        rounds, ran = self.rounds(monkeypatch, traced, 0.3, Goal(speed=1.6))
        assert all(speed > 1.6 for speeds in rounds for speed in speeds) and min(ran) < 1.6 * 1.08
        assert len(ran) == 7 and sorted(ran)[2] < 1.6 * 1.08**3


def test_plans_have_names():
    plan = Plan(TokenClustering((8, 8)), 2, 6, scope="window", keys=2)
    assert describe(plan) == "TokenClustering 8 x 8 a window, blocks 2 to 5, keys of 2 x 2"
    assert describe(Plan(keys=4)) == "keys of 4 x 4 tokens" and describe(Plan()) == "fast attention"
    assert describe(Plan(AveragePooling(0.5), 2)) == "AveragePooling 0.5 x 0.5 a map, blocks 2 to the last"
    assert key(plan) == key(Plan(TokenClustering((8, 8)), 2, 6, scope="window", keys=2)) != key(Plan(keys=2))


class TestConfig:
    def test_it_is_found_through_a_link(self, tmp_path):
        (tmp_path / "far" / "away" / "found").mkdir(parents=True)
        (tmp_path / "output").symlink_to(tmp_path / "far" / "away" / "found")
        path = tmp_path / "output" / "plan.py"
        write_plan(path, Plan(keys=2), str(launch.DEMO), [], ["model", "dataloader", "plan"], "A plan.")
        assert launch.load_config(str(path), []).plan["keys"] == 2


@pytest.mark.parametrize(
    "override, same",
    [
        ("dataloader.test.num_workers=1", True),
        ("dataloader.test.mapper.image_format=BGR", False),
        ("dataloader.image_scaling=percentiles", False),
        ("dataloader.evaluator.max_dets_per_image=200", False),
    ],
)
def test_measurements_of_other_inputs_or_figures_are_not_reused(override, same):
    vit = of_vit.tiny_vit()
    before, after = (
        search_settings(launch.load_config(str(launch.DEMO), overrides), vit, [{"image_id": 1}])
        for overrides in ([], [override])
    )
    assert (before == after) == same
