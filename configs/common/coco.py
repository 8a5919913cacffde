import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)

from hourglass.evaluation import InstanceEvaluator

image_size = 1024

dataloader = dict(
    # Of images of 16 bits: "full" range, or "percentiles" (1 to 99.8) of each image's own.
    image_scaling="full",
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(DatasetMapper)(
            is_train=True,
            # Large scale jitter.
            augmentations=[
                L(T.RandomFlip)(horizontal=True),
                L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=image_size, target_width=image_size),
                L(T.FixedSizeCrop)(crop_size=(image_size, image_size), pad=False),
            ],
            image_format="RGB",
            use_instance_mask=True,
            # Cropping cuts objects, and their boxes with them.
            recompute_boxes=True,
        ),
        total_batch_size=64,
        num_workers=4,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=image_size, max_size=image_size)],
            image_format="${...train.mapper.image_format}",
        ),
        num_workers=4,
    ),
    # The fast implementation needs Detectron2's compiled extension and is unofficial.
    evaluator=L(InstanceEvaluator)(dataset_name="${..test.dataset.names}", tasks=("bbox", "segm"), use_fast_impl=False),
)
