"""Masks, crops and tiles of Hephaestus (2022), pixel by pixel."""
import numpy as np
import pytest
from interferograms import FRAMES, SHAPE, annotation, box

from data_prep import hephaestus_annotations as notes
from data_prep import hephaestus_crops
from ssl_jax.errors import UserError

# What OpenCV 5.0 fills.
FILLED = {
    ((1, 1), (12, 2), (7, 5), (13, 10), (2, 9), (5, 6)): '''
        ...............
        .######........
        ..###########..
        ...#########...
        ...#######.....
        ....####.......
        .....####......
        ....#######....
        ...#########...
        ..###########..
        ........######.
        ...............''',
    ((0, 8), (14, 0), (2, 0), (13, 10), (6, 3)): '''
        ..#############
        ...###########.
        ....########...
        .....#####.....
        .....###.......
        ....#####......
        ..###....#.....
        .##.......#....
        #..........#...
        ............#..
        .............#.
        ...............'''}


def test_polygons_are_filled_as_by_opencv():
    for corners, picture in FILLED.items():
        expected = np.array([list(row.strip()) for row in picture.split()]) == '#'
        corners = np.array(corners)
        for turned in (corners, corners[::-1], np.roll(corners, 2, 0)):
            np.testing.assert_array_equal(hephaestus_crops.fill_polygon((12, 15), turned), expected)
        shifted = hephaestus_crops.fill_polygon((9, 15), corners - [3, 2])      # partly outside
        np.testing.assert_array_equal(shifted[:, :12], expected[2:11, 3:])
    point = hephaestus_crops.fill_polygon((3, 3), np.array([[1, 1]] * 3))
    assert point.sum() == 1 and point[1, 1]


def test_masks():
    parsed = notes.parse(annotation(1, FRAMES[0], 'Mogi', 'Dyke', polygons=[box(3, 4, 9, 8), box(7, 6, 12, 11)]))
    first, second = masks = hephaestus_crops.get_segmentation(parsed, SHAPE)
    assert first.dtype == np.uint8 and set(np.unique(first)) == {0, 1} and set(np.unique(second)) == {0, 2}
    assert (first[4:9, 3:10] == 1).all() and first.sum() == 35                  # corners truncated, outline included
    assert hephaestus_crops.mask_boundaries(second) == ((6, 7), (11, 12))
    overlap = (first > 0) & (second > 0)
    assert overlap.sum() == 9
    assert (hephaestus_crops.merge_masks(masks, 0)[overlap] == 1).all()
    assert (hephaestus_crops.merge_masks(masks, 1)[overlap] == 2).all()
    assert (hephaestus_crops.merge_masks(masks, compat=True)[overlap] == 3).all()
    assert hephaestus_crops.get_segmentation(notes.parse(annotation(1)), SHAPE) == []
    with pytest.raises(UserError, match='no boundaries'):
        hephaestus_crops.mask_boundaries(np.zeros((3, 3), np.uint8))
    with pytest.raises(UserError, match=r'annotation 1: segmentation_mask\[1\] reaches to x=12, y=11, .* is 11 wide'):
        hephaestus_crops.get_segmentation(parsed, (20, 11))
    with pytest.raises(UserError, match='x=-3, y=1'):
        hephaestus_crops.get_segmentation(notes.parse(annotation(1, FRAMES[0], 'Sill', polygons=[box(-4, 1, 9, 9)])),
                                          SHAPE)


def object_at(top, left, bottom, right, shape=SHAPE):
    mask = np.zeros(shape, np.uint8)
    mask[top:bottom + 1, left:right + 1] = 3
    return mask


def test_a_crop_holds_the_whole_pattern():
    image = np.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE)
    rng = np.random.default_rng(0)
    for place in ((0, 0, 4, 6), (35, 45, 39, 51), (10, 20, 25, 35), (12, 12, 12, 12)):
        mask, corners = object_at(*place), set()
        for _ in range(300):
            crop, seen = hephaestus_crops.crop_around_object(image, [mask], 0, 16, rng=rng)
            assert crop.shape == seen.shape == (16, 16) and (seen > 0).sum() == (mask > 0).sum()
            corners.add(divmod(int(crop[0, 0]), SHAPE[1]))
        lows = [max(last - 15, 0) for last in place[2:]]
        highs = [min(first, n - 16) for first, n in zip(place, SHAPE)]
        for axis in (0, 1):     # every place is drawn, no other
            assert {c[axis] for c in corners} == set(range(lows[axis], highs[axis] + 1))
    large = object_at(2, 3, 30, 8)
    rows = {int(hephaestus_crops.crop_around_object(image, [large], 0, 16, rng=rng)[0][0, 0]) // SHAPE[1]
            for _ in range(200)}
    assert rows == set(range(2, 16))    # filled by the pattern
    with pytest.raises(UserError, match='52x40 pixels is smaller than a crop of 41'):
        hephaestus_crops.crop_around_object(image, [large], 0, 41, rng=rng)


def test_crops_as_published():
    """By the published rule: the right edge is drawn from [last + max(size - first, 0), min(first + size, width))."""
    image = np.arange(80 * 90).reshape(80, 90)
    mask, other = object_at(30, 40, 37, 51, (80, 90)), object_at(35, 50, 36, 53, (80, 90))
    draws, rng = np.random.RandomState(999), np.random.RandomState(hephaestus_crops.COMPAT_SEED)
    lost = 0
    for _ in range(100):
        crop, seen = hephaestus_crops.crop_around_object(image, [mask, other], 0, 20, rng=rng, compat=True)
        right, down = draws.randint(51, 60), draws.randint(37, 50)
        np.testing.assert_array_equal(crop, image[down - 20:down, right - 20:right])
        np.testing.assert_array_equal(seen, (mask + other)[down - 20:down, right - 20:right])
        lost += right == 51
    assert lost     # the last column of the pattern is missing there
    with pytest.warns(UserWarning, match='cut to 8'):
        window = hephaestus_crops.crop_window([mask], 0, 8, rng=np.random.RandomState(0), compat=True)
    assert 22 <= window[0].start <= 29 and 32 <= window[1].start <= 39
    with pytest.raises(UserError, match='no place for a crop of 60'):
        hephaestus_crops.crop_window([object_at(30, 40, 37, 51, (80, 70))], 0, 60, rng=rng, compat=True)
    with pytest.warns(UserWarning), pytest.raises(UserError, match='leave the image'):
        hephaestus_crops.crop_window([object_at(1, 1, 30, 30)], 0, 29, rng=np.random.RandomState(0), compat=True)


def test_tiles():
    image = np.arange(25 * 33).reshape(25, 33)
    tiles = hephaestus_crops.image_tiling(image, 8)
    assert len(tiles) == 12 and {t.shape for t in tiles} == {(8, 8)}
    np.testing.assert_array_equal(tiles[5], image[8:16, 8:16])
    for k, tile in enumerate(tiles):
        row, column = hephaestus_crops.tile_corner(k, image.shape, 8)
        assert tile[0, 0] == image[row, column]
    assert hephaestus_crops.tile_corner(12, image.shape, 8) is None
    assert hephaestus_crops.tile_corner(0, (7, 30), 8) is None and hephaestus_crops.tile_corner(0, (30, 7), 8) is None
    assert hephaestus_crops.image_tiling(None, 8) == hephaestus_crops.image_tiling(image, 40) == []
