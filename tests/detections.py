"""Annotations in COCO's format, and detections of them."""

import numpy as np


def dataset(seed: int, images: int = 12, digits: int = 1) -> tuple[dict, list[dict]]:
    """
    Objects of three categories, some crowds, and detections: of objects, shaken, and of nothing. With few ``digits``
    their scores tie.
    """
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = (float(value) for value in (*rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2)))
            category = int(rng.integers(1, 4))
            crowd = int(rng.random() < 0.1)
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            objects.append(
                dict(
                    id=len(objects) + 1,
                    image_id=image,
                    category_id=category,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=crowd,
                    segmentation={"size": [100, 100], "counts": [0, 10000]} if crowd else polygon,
                )
            )
            for _ in range(rng.integers(0, 3)):
                box = [x + rng.normal(0, 3), y + rng.normal(0, 3), w * rng.uniform(0.8, 1.2), h * rng.uniform(0.8, 1.2)]
                detections.append(
                    dict(image_id=image, category_id=category, bbox=box, score=round(rng.random(), digits))
                )
        if rng.random() < 0.5:
            box = [*rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2)]
            detections.append(dict(image_id=image, category_id=1, bbox=box, score=round(rng.random(), digits)))
    sized = [dict(id=i, width=100, height=100, file_name=f"{i}.jpg") for i in range(1, images + 1)]
    categories = [dict(id=i, name=str(i)) for i in range(1, 5)]  # the last has no object
    return dict(images=sized, annotations=objects, categories=categories), detections
