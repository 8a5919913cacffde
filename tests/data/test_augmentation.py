import numpy as np
import pytest
from detectron2.data import transforms as T

from hourglass import InputError
from hourglass.data import EnlargeShortestEdge, RandomStain, StretchContrast


def run(augmentation: T.Augmentation, image: np.ndarray, masks: np.ndarray | None = None) -> T.AugInput:
    inputs = T.AugInput(image.copy(), sem_seg=None if masks is None else masks.copy())
    augmentation(inputs)
    return inputs


def drawn(height: int = 20, width: int = 30, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (height, width, 3), dtype=np.uint8)


class TestStretchContrast:
    def test_the_percentiles_become_the_ends(self):
        dark = drawn(low=3, high=12)
        stretched = run(StretchContrast(0, 100), dark).image
        assert stretched.dtype == np.uint8 and stretched.min() == 0 and stretched.max() == 255
        expected = np.round((dark.astype(float) - 3) * 255 / 8)
        np.testing.assert_array_equal(stretched, expected)

    def test_what_lies_outside_is_clipped(self):
        image = np.full((10, 10, 3), 100, np.uint8)
        image[0, 0], image[0, 1], image[5:] = 255, 0, 120
        stretched = run(StretchContrast(5, 95), image).image
        assert stretched[0, 0, 0] == 255 and stretched[0, 1, 0] == 0
        assert stretched[2, 2, 0] == 0 and stretched[7, 7, 0] == 255

    def test_an_image_of_one_value_stays(self):
        image = np.full((4, 4, 3), 7, np.uint8)
        np.testing.assert_array_equal(run(StretchContrast(), image).image, image)

    def test_refusals(self):
        for low, high in ((50, 50), (-1, 99), (1, 101)):
            with pytest.raises(InputError, match="percentiles with low < high"):
                StretchContrast(low, high)


class TestEnlargeShortestEdge:
    def test_smaller_images_grow_with_their_masks(self):
        masks = drawn()[..., 0]
        inputs = run(EnlargeShortestEdge(40), drawn(20, 30), masks)
        assert inputs.image.shape == (40, 60, 3)
        np.testing.assert_array_equal(inputs.sem_seg[::2, ::2], masks)

    def test_larger_ones_stay(self):
        image = drawn(50, 41)
        np.testing.assert_array_equal(run(EnlargeShortestEdge(40), image).image, image)

    def test_zoom_is_from_its_range(self):
        np.random.seed(0)
        sides = [run(EnlargeShortestEdge(40, zoom=(0.5, 2.0)), drawn(20, 20)).image.shape[0] for _ in range(300)]
        assert 20 <= min(sides) < 22 and 76 < max(sides) <= 80
        # As often smaller as larger.
        assert 0.4 < np.mean(np.array(sides) < 40) < 0.6

    def test_refusals(self):
        with pytest.raises(InputError, match="length must be a whole number of at least 1, got 0"):
            EnlargeShortestEdge(0)
        with pytest.raises(InputError, match="zoom must be two factors over 0, the smaller one first"):
            EnlargeShortestEdge(40, zoom=(2.0, 0.5))


class TestRandomStain:
    def test_without_jitter_an_image_is_itself(self):
        image = drawn()
        np.testing.assert_allclose(run(RandomStain(0, 0), image).image.astype(int), image, atol=1)

    def test_an_image_without_colour_stays(self):
        gray = np.repeat(drawn()[..., :1], 3, axis=2)
        np.testing.assert_array_equal(run(RandomStain(0.9, 0.5), gray).image, gray)

    def test_a_stain_stays_a_stain(self):
        """Pixels of haematoxylin alone keep the direction of its optical density, whatever the strength."""
        np.random.seed(1)
        direction = np.array([0.65, 0.70, 0.29])
        strengths = np.linspace(0.1, 0.9, 12)
        image = np.round(256 * 10 ** -(strengths[:, None, None] * direction) - 1).astype(np.uint8)
        image = np.repeat(image, 5, axis=1)
        varied = run(RandomStain(scale=0.3, shift=0), image).image
        assert (varied != image).any()
        density = -np.log10((varied.astype(float) + 1) / 256)[:, 0]
        cosine = density @ direction / np.linalg.norm(density, axis=1) / np.linalg.norm(direction)
        assert cosine.min() > 0.999

    def test_refusals(self):
        with pytest.raises(InputError, match="scale must be a number from 0 to below 1, got 1"):
            RandomStain(scale=1)
        with pytest.raises(InputError, match="shift must be a number from 0 to below 1, got -0.1"):
            RandomStain(shift=-0.1)
