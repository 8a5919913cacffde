import pytest
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from omegaconf import OmegaConf

from hourglass import InputError, Plan, TokenClustering
from hourglass.overrides import apply_overrides


def config():
    cfg = OmegaConf.create(
        {"train": {"output_dir": "output", "seed": 0}, "list": [{"a": 1}], "alias": "${train.seed}"},
        flags={"allow_objects": True},
    )
    cfg.plan = L(Plan)(reducer=L(TokenClustering)(grid=[4, 4]), start=2)
    return cfg


def test_known_keys_and_arguments_of_calls_are_taken():
    cfg = config()
    apply_overrides(cfg, ["plan.start=4", "plan.reducer.grid=[20,20]", "plan.reducer.k=3", "plan.scope=window"])
    apply_overrides(cfg, ["train.output_dir=a/b", "list.0.a=2", "alias=5", "plan.stop=null"])
    assert cfg.plan.start == 4 and list(cfg.plan.reducer.grid) == [20, 20] and cfg.plan.reducer.k == 3
    assert cfg.plan.scope == "window" and cfg.train.output_dir == "a/b" and cfg.list[0].a == 2 and cfg.alias == 5


def test_arguments_are_those_of_the_target_that_is_given_with_them():
    cfg = config()
    apply_overrides(cfg, ["plan.reducer.restore_mode=features", "plan.reducer._target_=hourglass.AveragePooling"])
    assert cfg.plan.reducer.restore_mode == "features"
    cfg = config()
    apply_overrides(cfg, ["plan.reducer.r=0.2", "plan.reducer._target_=hourglass.BipartiteMatching"])
    assert dict(cfg.plan.reducer) == {"_target_": "hourglass.BipartiteMatching", "r": 0.2}  # which takes no grid
    with pytest.raises(InputError, match="plan.reducer has no 'k'"):
        apply_overrides(config(), ["plan.reducer.k=3", "plan.reducer._target_=hourglass.AveragePooling"])


def test_the_former_name_of_an_argument_is_taken():
    cfg = config()
    apply_overrides(cfg, ["plan.reducer.restore=features"])
    assert instantiate(cfg.plan).reducer.restore_mode == "features"
    apply_overrides(cfg, ["plan.reducer._target_=hourglass.DensityPeaks"])
    assert instantiate(cfg.plan).reducer.restore_mode == "features"
    apply_overrides(cfg, ["plan.reducer.restore_mode=features"])
    with pytest.raises(InputError, match="restore_mode must be given once"):
        instantiate(cfg.plan)
    with pytest.raises(InputError, match="did you mean 'plan.reducer.restore_mode'"):
        apply_overrides(config(), ["plan.reducer.restor=features"])


# Each of them means something in Hydra's grammar, or is no part of it.
TEXTS = ["/tmp/a=b", "=", "a=b=c", "~/model.pth", "/data/model(1).pth", "a)b", "a,b", "x,y,z", "#1", "/a/#b", "a{b"]
TEXTS += ["a}b", "a[0].pth", "set]", "it's.pth", 'the "best".pth', "modèle/ü.pth", "模型.pth", "a b.pth", "a\\b.pth"]
TEXTS += ["C:\\runs", "a:b", "hf://owner/name", "detectron2://b.pkl?matching_heuristics=True", "100%", "a&b|c;d"]
TEXTS += ["glob(*)", "", "@x"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is(text):
    cfg = config()
    apply_overrides(cfg, [f"train.output_dir={text}"])
    assert cfg.train.output_dir == text


@pytest.mark.parametrize(
    "text, value",
    [
        *(("4", 4), ("-0.5", -0.5), ("1e-3", 1e-3), ("null", None), ("true", True), ("'4'", "4"), ('"a=b"', "a=b")),
        *(("[1,2]", [1, 2]), ("{a: 1}", {"a": 1}), ("[[1,a],{b: 2}]", [[1, "a"], {"b": 2}]), ("${train.seed}", 0)),
    ],
)
def test_values_of_hydras_grammar_stay_what_they_are(text, value):
    cfg = config()
    apply_overrides(cfg, [f"train.output_dir={text}"])
    assert cfg.train.output_dir == value and isinstance(cfg.train.output_dir, str) == isinstance(value, str)


@pytest.mark.parametrize(
    "override, message",
    [
        ("plan.strat=4", "unknown key 'plan.strat': plan has no 'strat'; did you mean 'plan.start'?"),
        ("plan.reducer.gird=[4,4]", "did you mean 'plan.reducer.grid'?"),
        ("trian.seed=1", "the config has no 'trian'; did you mean 'train.seed'?"),
        ("train.xyzzy=1", "it takes output_dir, seed"),
        ("plan.start.deep=1", "unknown key"),
        ("list.7.a=1", "unknown key 'list.7.a'"),
        ("plan.start", "cannot be parsed"),
        ("plan.reducer.grid=[20", "cannot be parsed"),
        ("plan.reducer.grid={a", "cannot be parsed"),
        ("train.output_dir='a", "cannot be parsed"),
        ("=4", "unknown key ''"),
        ("train output=4", "cannot be parsed"),
        ("~plan.start", "is not accepted"),
        ("+plan.new=1", "is not accepted"),
    ],
)
def test_refusals(override, message):
    cfg = config()
    with pytest.raises(InputError) as refusal:
        apply_overrides(cfg, [override])
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert cfg == config()


def test_a_target_that_cannot_be_called_is_refused():
    with pytest.raises(InputError, match="_target_ must be the dotted name of a callable, got 'hourglass'"):
        apply_overrides(config(), ["plan.reducer._target_=hourglass"])
