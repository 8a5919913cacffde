import copy
import json
from itertools import chain

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Instances, PolygonMasks

import hourglass
from hourglass import InputError, Plan, TokenClustering
from hourglass.checkpoint import load_checkpoint
from hourglass.encoders import Swin
from tests.golden_cases import FOLDER, load, under

pytest.importorskip("transformers")

from projects.mask2former import (  # noqa: E402
    Mask2Former,
    instance_inference,
    optimizer_params,
    panoptic_inference,
    rename_weights,
    semantic_inference,
)
from projects.mask2former.inference import tight_boxes  # noqa: E402

IMAGES = ["mask2former_tiny_io0", "mask2former_tiny_io1"]


def golden_model(**changes) -> Mask2Former:
    backbone = Swin(
        embed_dim=12,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=4,
        out_names=("res2", "res3", "res4", "res5"),
    )
    arguments = dict(
        num_classes=5,
        things=[0, 1, 2],
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        num_queries=10,
        hidden_dim=32,
        mask_dim=32,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=4,
        dim_feedforward=64,
        semantic_on=True,
        instance_on=True,
        object_mask_threshold=0.25,
        overlap_threshold=0.5,
        detections_per_image=12,
    )
    return Mask2Former(backbone, **{**arguments, **changes}).eval()


def golden_weights() -> dict[str, torch.Tensor]:
    return under(load("mask2former_tiny_weights")[1], "weights/")


def official(**changes) -> Mask2Former:
    model = golden_model(**changes)
    model.load_state_dict(model.rename_weights(golden_weights()))
    return model


def small(**changes) -> Mask2Former:
    """Untrained and quick."""
    torch.manual_seed(0)
    changes = {
        "object_mask_threshold": 0.0,
        "encoder_feedforward_dim": 32,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "train_num_points": 256,
        **changes,
    }
    return golden_model(**changes)


def image(height: int, width: int, instances: int | None = None) -> dict:
    generator = torch.Generator().manual_seed(height)
    entry = {"image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)}
    if instances is not None:
        entry["instances"] = Instances((height, width))
        entry["instances"].gt_classes = torch.arange(instances) % 5
        # Stripes of the image.
        stripes = torch.arange(height) * max(instances, 1) // height
        masks = (stripes == torch.arange(instances)[:, None])[:, :, None].expand(-1, -1, width)
        entry["instances"].gt_masks = BitMasks(masks)
    return entry


class TestGolden:
    @pytest.mark.parametrize("name", IMAGES)
    def test_decoders(self, name):
        _, tensors = load(name)
        model = official()
        with torch.no_grad():
            hidden, masks = model.decode(tensors)
            classes = [model.class_predictor(state.transpose(0, 1)) for state in hidden]
        names = [*(f"aux{i}/" for i in range(len(classes) - 1)), ""]
        for prefix, layer_classes, layer_masks in zip(names, classes, masks):
            torch.testing.assert_close(layer_classes, tensors[f"{prefix}pred_logits"], atol=1e-3, rtol=0)
            torch.testing.assert_close(layer_masks, tensors[f"{prefix}pred_masks"], atol=2e-3, rtol=0)

    @pytest.mark.parametrize("name", IMAGES)
    def test_backbone_sees_the_official_input(self, name):
        _, tensors = load(name)
        model = official()
        seen = []
        model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model.backbone.register_forward_hook(lambda *call: seen.append(call[-1]))
        with torch.no_grad():
            model([{"image": tensors["image"]}])
        torch.testing.assert_close(seen[0], tensors["padded_normalised"])
        for feature, value in seen[1].items():
            torch.testing.assert_close(value, tensors[feature], atol=1e-4, rtol=0)

    @pytest.mark.parametrize("name", IMAGES)
    @pytest.mark.parametrize("mode", ["all", "instance_only", "semantic_only"])
    def test_from_image_to_results(self, name, mode):
        case, tensors = load(name)
        height, width = case["output_height_width"]
        model = official(
            panoptic_on=mode == "all",
            instance_on=mode != "semantic_only",
            semantic_on=mode != "instance_only",
        )
        with torch.no_grad():
            (result,) = model([{"image": tensors["image"], "height": height, "width": width}])
        assert set(result) == {key.split("/")[1] for key in tensors if key.startswith(f"{mode}/")}
        if "sem_seg" in result:
            torch.testing.assert_close(result["sem_seg"], tensors[f"{mode}/sem_seg"], atol=1e-3, rtol=0)
        if "panoptic_seg" in result:
            segments, segments_info = result["panoptic_seg"]
            assert (segments != tensors["all/panoptic_seg"]).float().mean() < 1e-3
            assert segments_info == case["segments_info"]
        if "instances" in result:
            expected = under(tensors, f"{mode}/instances/")
            instances = result["instances"]
            assert len(instances) == len(expected["scores"])
            by_score, order = instances.scores.argsort(), expected["scores"].argsort()
            torch.testing.assert_close(instances.scores[by_score], expected["scores"][order], atol=1e-4, rtol=0)
            assert torch.equal(instances.pred_classes[by_score], expected["pred_classes"][order])
            assert (instances.pred_masks[by_score] != expected["pred_masks"][order].bool()).float().mean() < 1e-3


class TestInference:
    """Three queries, two classes, a map of 2 x 4."""

    classes = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]).log()
    masks = torch.tensor([[[4.0, 4, -4, -4]] * 2, [[-4.0, 3, 3, -4]] * 2, [[5.0, 5, 5, 5]] * 2])

    def test_panoptic(self):
        segments, info = panoptic_inference(self.classes, self.masks, {0}, 0.5, 0.5)
        assert segments.tolist() == [[1, 1, 2, 0]] * 2
        assert info == [{"id": 1, "isthing": True, "category_id": 0}, {"id": 2, "isthing": False, "category_id": 1}]

    def test_panoptic_leaves_out_what_is_mostly_covered(self):
        segments, info = panoptic_inference(self.classes, self.masks, {0}, 0.5, overlap_threshold=0.6)
        assert segments.tolist() == [[1, 1, 0, 0]] * 2
        assert [segment["id"] for segment in info] == [1]

    @pytest.mark.parametrize("things, count", [({0}, 2), (set(), 1)])
    def test_stuff_is_joined_and_things_are_not(self, things, count):
        classes = self.classes[[0, 0]]
        masks = torch.tensor([[[4.0, -4]], [[-4.0, 4]]])
        segments, info = panoptic_inference(classes, masks, things, 0.5, 0.5)
        assert len(info) == count
        assert segments.tolist() == [[1, count]]

    def test_nothing_is_an_empty_map(self):
        segments, info = panoptic_inference(self.classes, self.masks, {0}, 0.95, 0.5)
        assert segments.tolist() == [[0] * 4] * 2 and info == []
        assert segments.dtype == torch.int32

    def test_instances(self):
        instances = instance_inference(self.classes, self.masks, 2)
        quality = torch.tensor([4.0, 3.0]).sigmoid()
        torch.testing.assert_close(instances.scores, torch.tensor([0.9, 0.8]) * quality)
        assert instances.pred_classes.tolist() == [0, 1]
        assert instances.pred_masks.tolist() == (self.masks[:2] > 0).tolist()
        assert instances.pred_boxes.tensor.tolist() == [[0, 0, 2, 2], [1, 0, 3, 2]]

    def test_fewer_pairs_than_instances(self):
        assert len(instance_inference(self.classes, self.masks, 100)) == 6
        assert len(instance_inference(self.classes, self.masks, 100, things={1})) == 3

    def test_no_instance(self):
        instances = instance_inference(self.classes, self.masks, 1, things={1})
        assert (
            len(instances) == 0
            and instances.pred_masks.shape == (0, 2, 4)
            and instances.pred_boxes.tensor.shape == (0, 4)
        )

    def test_boxes_are_detectron2s(self):
        masks = (
            torch.rand(20, 7, 5, generator=torch.Generator().manual_seed(0)) > torch.linspace(0, 1, 20)[:, None, None]
        )
        assert not masks[-1].any() and masks[0].all()
        assert torch.equal(tight_boxes(masks), BitMasks(masks).get_bounding_boxes().tensor)

    def test_many_queries_do_not_depend_on_the_chunks(self, monkeypatch):
        torch.manual_seed(0)
        classes, masks = torch.randn(40, 4), torch.randn(40, 5, 6)
        results = []
        for chunk in (1, 16, 100):
            monkeypatch.setattr("projects.mask2former.inference._CHUNK", chunk)
            instances = instance_inference(classes, masks, 30)
            segments, info = panoptic_inference(classes, masks, {0}, 0.3, 0.0)
            results.append(
                [instances.pred_masks, instances.scores, segments, semantic_inference(classes, masks), str(info)]
            )
        for result in results[1:]:
            torch.testing.assert_close(result[:-1], results[0][:-1])
            assert result[-1] == results[0][-1]


class TestModel:
    @torch.no_grad()
    def test_images_of_two_sizes_and_odd_ones(self):
        results = small()([{**image(97, 131), "height": 50, "width": 61}, image(64, 64)])
        for result, size in zip(results, [(50, 61), (64, 64)]):
            assert result["sem_seg"].shape == (5, *size)
            assert result["panoptic_seg"][0].shape == size
            assert result["instances"].pred_masks.shape[1:] == size
            assert len(result["instances"].pred_boxes) == len(result["instances"])

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_a_converted_model_runs(self, dtype):
        result = small().to(dtype)([image(40, 50)])[0]
        assert result["panoptic_seg"][0].shape == (40, 50)

    @torch.no_grad()
    def test_bfloat16_is_close(self):
        model = official(object_mask_threshold=0.0)
        inputs = [image(64, 96)]
        full = model(inputs)[0]["sem_seg"]
        with torch.autocast("cpu", torch.bfloat16):
            half = model(inputs)[0]["sem_seg"]
        assert half.dtype == torch.float32
        assert (half - full).abs().mean() < 0.1 * full.abs().mean()

    @torch.no_grad()
    def test_empty_predictions(self):
        (result,) = small(object_mask_threshold=1.0, things=[])([image(64, 64)])
        segments, info = result["panoptic_seg"]
        assert not segments.any() and info == []
        assert len(result["instances"]) == 0

    @torch.no_grad()
    def test_one_class_and_more_detections_than_pairs(self):
        model = small(num_classes=1, things=None, detections_per_image=100)
        (result,) = model([image(64, 64)])
        assert len(result["instances"]) == 10
        assert result["sem_seg"].shape == (1, 64, 64)

    @pytest.mark.parametrize("amp", [False, True])
    def test_trains(self, amp):
        model = small().train()
        inputs = [image(64, 96, 3), image(50, 64, 1)]
        optimizer = torch.optim.AdamW(optimizer_params(model, 2e-3, 0.05, backbone_multiplier=1.0))
        totals = []
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                losses = model(inputs)
            optimizer.zero_grad()
            total = sum(losses.values())
            total.backward()
            optimizer.step()
            totals.append(total.item())
        assert totals[-1] < 0.8 * totals[0]
        assert len(losses) == 3 * 3
        assert len(small(deep_supervision=False).train()(inputs)) == 3

    def test_losses_are_weighted(self):
        inputs = [image(64, 96, 3)]
        model = small().train()
        torch.manual_seed(1)
        losses = model(inputs)
        model.loss_weights = {name: 2 * weight for name, weight in model.loss_weights.items()}
        torch.manual_seed(1)
        for name, loss in model(inputs).items():
            torch.testing.assert_close(loss, 2 * losses[name])

    @pytest.mark.parametrize("cost, matched", [(100.0, 0), (0.01, 1), (None, 1)])
    def test_the_class_has_a_cost_of_its_own_in_matching(self, cost, matched):
        """The first query has the target's class, the second its mask."""
        matcher = small(class_cost=cost, class_weight=0.01).criterion.matcher
        target = torch.zeros(1, 16, 16)
        target[:, :8] = 1
        masks = torch.stack([-10 * (2 * target[0] - 1), 10 * (2 * target[0] - 1)])[None]
        classes = torch.zeros(1, 2, 6)
        classes[0, 0, 2] = classes[0, 1, 3] = 10
        ((queries, _),) = matcher(masks, classes, [target], [torch.tensor([2])])
        assert queries.tolist() == [matched]

    @pytest.mark.parametrize("counts", [(0, 2), (0, 0), (30, 0)])
    def test_images_without_targets_or_with_more_than_queries(self, counts):
        model = small().train()
        losses = model([image(64, 96, counts[0]), image(50, 64, counts[1])])
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_masks_of_detectron2s_mapper(self):
        model = small().train()
        polygon = image(64, 64, 1)
        polygon["instances"].gt_masks = PolygonMasks([[[0.0, 0, 64, 0, 64, 64, 0, 64]]])
        plain = image(64, 64, 1)
        plain["instances"].gt_masks = plain["instances"].gt_masks.tensor
        losses = []
        for entry in (image(64, 64, 1), polygon, plain):
            torch.manual_seed(0)
            losses.append(torch.stack(list(model([entry]).values())))
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(losses[2], losses[0])
        unannotated = image(64, 64)
        unannotated["instances"] = Instances((64, 64), gt_classes=torch.zeros(0, dtype=torch.int64))
        assert torch.isfinite(sum(model([unannotated]).values()))

    def test_training_without_masks_is_refused(self):
        model = small().train()
        with pytest.raises(InputError, match="has no instances"):
            model([image(64, 64)])
        entry = image(64, 64, 2)
        entry["instances"].gt_classes += 4
        with pytest.raises(InputError, match=r"has classes \[4, 5\], they must be in \[0, 5\)"):
            model([entry])
        entry = image(64, 64, 2)
        entry["instances"].remove("gt_masks")
        with pytest.raises(InputError, match="instances without gt_masks"):
            model([entry])

    def test_a_copy_shares_the_parameters(self):
        model = small()
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        view = copy.deepcopy(model, shared)
        assert all(parameter is expected for parameter, expected in zip(model.parameters(), view.parameters()))
        inputs = [image(64, 96)]
        with torch.no_grad():
            assert torch.equal(model(inputs)[0]["sem_seg"], view(inputs)[0]["sem_seg"])

    @torch.no_grad()
    def test_expedited(self):
        model = official()
        inputs = [image(97, 131)]
        plain = model(inputs)[0]["sem_seg"]
        assert torch.equal(hourglass.expedite(model, Plan())(inputs)[0]["sem_seg"], plain)
        plan = Plan(TokenClustering((3, 3)), start=4, stop=6, scope="window")
        expedited = hourglass.expedite(model, plan)
        assert expedited.state_dict().keys() == model.state_dict().keys()
        assert not torch.equal(expedited(inputs)[0]["sem_seg"], plain)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"in_features": ["res2", "res3", "res4"]}, "in_features must be four of the backbone's"),
            ({"in_features": ["res1", "res3", "res4", "res5"]}, "in_features must be four of the backbone's"),
            ({"in_features": ["res2", "res3", "res5", "res4"]}, r"strides that double, got \[4, 8, 32, 16\]"),
            ({"hidden_dim": 48}, "hidden_dim must be a multiple of 32 and of num_heads, 4, got 48"),
            ({"hidden_dim": 64, "num_heads": 5}, "hidden_dim must be a multiple of 32 and of num_heads, 5, got 64"),
            ({"things": [0, 5]}, r"things must be classes in \[0, 5\), got \[0, 5\]"),
        ],
    )
    def test_wrong_arguments_are_refused(self, changes, message):
        with pytest.raises(InputError, match=message):
            golden_model(**changes)


class TestOptimizerParams:
    def test_every_parameter_is_in_one_group(self):
        model = small()
        groups = optimizer_params(model, 1e-4, 0.05, backbone_multiplier=0.1)
        parameters = [parameter for group in groups for parameter in group["params"]]
        assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))
        options = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        decoder = model.transformer_module.decoder.layers[0]
        attention = model.backbone.layers[0].blocks[0].attn
        assert options[id(attention.qkv.weight)] == pytest.approx((1e-5, 0.05))
        assert options[id(attention.relative_position_bias_table)] == pytest.approx((1e-5, 0))
        assert options[id(decoder.fc1.weight)] == pytest.approx((1e-4, 0.05))
        assert options[id(decoder.final_layer_norm.weight)] == pytest.approx((1e-4, 0))
        assert options[id(model.transformer_module.queries_features.weight)] == pytest.approx((1e-4, 0))

    @pytest.mark.parametrize("factor", [0, 1.5])
    def test_refuses(self, factor):
        with pytest.raises(InputError, match=r"backbone_multiplier must be a factor in \(0, 1\]"):
            optimizer_params(small(), 1e-4, 0.05, factor)


def hugging_face_map() -> list[dict]:
    return json.loads((FOLDER / "mask2former_hf_name_map.json").read_text())["map"]


class TestRenameWeights:
    @pytest.mark.parametrize("kind", ["hf_module_name", "hf_file_name"])
    def test_both_implementations_names_lead_to_one(self, kind):
        # Three rows tell the thirds apart that some weights are split into.
        official, hugging_face = {}, {}
        for number, entry in enumerate(hugging_face_map()):
            rows = torch.arange(3.0) + 10 * number
            if entry["hf"]:
                official[entry["official"]] = rows
            for part, place in zip(rows.chunk(3) if len(entry["hf"]) == 3 else [rows], entry["hf"]):
                hugging_face[place[kind]] = part
        renamed = {
            name: tensor for name, tensor in rename_weights(hugging_face).items() if "position_index" not in name
        }
        expected = rename_weights(official)
        assert len(expected) >= len(official)
        assert renamed.keys() == expected.keys()
        assert all(torch.equal(renamed[name], expected[name]) for name in renamed)
        assert rename_weights(expected).keys() == expected.keys()

    def test_names_are_those_of_hugging_faces_modules(self):
        for entry in hugging_face_map():
            if not entry["official"].startswith("backbone.") and entry["hf"]:
                names = [
                    place["hf_module_name"]
                    .removeprefix("model.")
                    .replace("pixel_level_module.decoder", "pixel_decoder")
                    for place in entry["hf"]
                ]
                assert list(rename_weights({entry["official"]: torch.zeros(3)})) == names

    def test_the_last_norm_of_hugging_faces_swin_is_dropped(self):
        name = "model.pixel_level_module.encoder.swin.layernorm.weight"
        assert rename_weights({name: torch.zeros(1), name.replace("swin.", ""): torch.zeros(1)}) == {}

    @pytest.mark.parametrize("config, size", [("coco_panoptic_swin_t", "tiny"), ("coco_panoptic_swin_l", "large")])
    def test_published_models_fill_those_of_the_configs(self, config, size):
        cfg = LazyConfig.load(str(FOLDER.parents[1] / "configs" / "mask2former" / f"{config}.py"))
        golden = json.loads((FOLDER / f"mask2former_keys_swin_{size}_coco_panoptic.json").read_text())
        with torch.device("meta"):
            model = instantiate(cfg.model)
            weights = {
                entry["name"]: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
                for entry in golden["state_dict"]
            }

        def shapes(state):
            return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}

        assert shapes(rename_weights(weights)) == shapes(model.state_dict())
        parameters = {entry["name"] for entry in golden["state_dict"] if entry["kind"] == "parameter"}
        names = rename_weights({name: weight for name, weight in weights.items() if name in parameters})
        assert names.keys() == dict(model.named_parameters()).keys()

        # What no shape tells.
        swin, options = golden["SWIN"], golden["MASK_FORMER"]
        for name in ("embed_dim", "depths", "num_heads", "window_size", "pretrain_img_size", "drop_path_rate"):
            assert cfg.model.backbone[name] == swin[name.upper()], name
        assert list(cfg.model.pixel_mean) == golden["PIXEL_MEAN"] and list(cfg.model.pixel_std) == golden["PIXEL_STD"]
        assert model.transformer_module.decoder.layers[0].self_attn.num_heads == options["NHEADS"]
        assert model.size_divisibility == options["SIZE_DIVISIBILITY"]
        assert model.object_mask_threshold == options["TEST"]["OBJECT_MASK_THRESHOLD"]
        assert model.overlap_threshold == options["TEST"]["OVERLAP_THRESHOLD"]
        assert model.detections_per_image == golden["TEST.DETECTIONS_PER_IMAGE"]
        assert list(model.loss_weights.values()) == [options[f"{name}_WEIGHT"] for name in ("CLASS", "MASK", "DICE")]
        assert model.criterion.eos_coef == options["NO_OBJECT_WEIGHT"]

    def test_names_of_older_official_checkpoints(self):
        weights = golden_weights()
        old = {
            name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): tensor
            for name, tensor in weights.items()
        }
        assert old.keys() != weights.keys()
        renamed, expected = rename_weights(old), rename_weights(weights)
        assert renamed.keys() == expected.keys()
        assert all(renamed[name] is expected[name] or torch.equal(renamed[name], expected[name]) for name in renamed)


class TestCheckpoints:
    def test_official(self, tmp_path):
        torch.save({"model": golden_weights()}, tmp_path / "a.pth")
        model = golden_model()
        load_checkpoint(model, str(tmp_path / "a.pth"))
        for name, tensor in official().state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)

    def test_ours(self, tmp_path):
        source = small()
        torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
        model = golden_model(encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=3)
        load_checkpoint(model, str(tmp_path / "a.pth"))
        assert torch.equal(model.class_predictor.weight, source.class_predictor.weight)

    def test_of_another_size(self, tmp_path):
        torch.save({"model": golden_weights()}, tmp_path / "a.pth")
        with pytest.raises(InputError, match=r"of another shape .*queries_") as refusal:
            load_checkpoint(golden_model(num_queries=20), str(tmp_path / "a.pth"))
        assert "\n" not in str(refusal.value)

    @pytest.fixture
    def hugging_face(self):
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

        backbone = SwinConfig(
            embed_dim=12,
            depths=[2, 2, 2, 2],
            num_heads=[1, 2, 4, 8],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        config = Mask2FormerConfig(
            backbone_config=backbone,
            num_labels=5,
            num_queries=10,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            num_attention_heads=4,
            encoder_layers=2,
            decoder_layers=4,
            dim_feedforward=64,
        )
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    @pytest.mark.parametrize("parts", [False, True])
    @torch.no_grad()
    def test_hugging_faces_folder(self, tmp_path, hugging_face, parts):
        hugging_face.save_pretrained(tmp_path, **({"max_shard_size": "500KB"} if parts else {}))
        assert (tmp_path / "model.safetensors.index.json").exists() == parts
        model = golden_model()
        load_checkpoint(model, str(tmp_path))
        pixels = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
        expected = hugging_face(pixels)
        hidden, masks = model.decode(model.backbone(pixels))
        classes = model.class_predictor(hidden[-1].transpose(0, 1))
        torch.testing.assert_close(classes, expected.class_queries_logits, atol=1e-3, rtol=0)
        torch.testing.assert_close(masks[-1], expected.masks_queries_logits, atol=1e-3, rtol=0)


def test_any_backbone_will_do():
    class Strides(Backbone):
        """Features at strides 2 to 16."""

        def __init__(self):
            super().__init__()
            self.stages = torch.nn.ModuleList(torch.nn.Conv2d(3 if i == 0 else 8, 8, 2, 2) for i in range(4))
            self._out_features = [f"p{i}" for i in range(4)]
            self._out_feature_channels = dict.fromkeys(self._out_features, 8)
            self._out_feature_strides = {f"p{i}": 2 ** (i + 1) for i in range(4)}

        def forward(self, x):
            features = {}
            for name, stage in zip(self._out_features, self.stages):
                features[name] = x = stage(x)
            return features

    model = Mask2Former(
        Strides(),
        num_classes=2,
        pixel_mean=[0.0] * 3,
        pixel_std=[255.0] * 3,
        in_features=("p0", "p1", "p2", "p3"),
        hidden_dim=32,
        mask_dim=32,
        num_heads=2,
        num_queries=4,
        decoder_layers=2,
        encoder_layers=1,
        size_divisibility=16,
    ).eval()
    with torch.no_grad():
        _, masks = model.decode(model.backbone(torch.zeros(1, 3, 32, 48)))
        assert masks[-1].shape == (1, 4, 16, 24)
        assert model([image(33, 47)])[0]["panoptic_seg"][0].shape == (33, 47)
